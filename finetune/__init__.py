"""The second stage: a detector on the pretrained backbone, trained, evaluated, exported."""
