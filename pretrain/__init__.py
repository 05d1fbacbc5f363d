"""The first stage: a backbone learns from unlabeled pictures."""
