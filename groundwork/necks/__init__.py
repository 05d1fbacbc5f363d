"""Necks: what stands between a backbone's pyramid and a detector's head."""
