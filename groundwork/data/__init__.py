"""From pictures on a disk or in a bucket to this rank's batches, in one exact order."""
