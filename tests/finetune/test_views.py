"""What training sees of a labeled picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.augment import build
from finetune.augment.settings import Augment
from finetune.detector import build_detector
from finetune.recipe import LossKeys
from finetune.training import Training
from finetune.views import DetectionViews
from groundwork.data.labels import LabeledSamples, open_labeled
from groundwork.data.loader import Loader
from groundwork.data.order import Order

SIZE = 64


@pytest.fixture
def crowded(labeled: Path) -> LabeledSamples:
    """The training pictures, the second box of each a crowd."""
    file = labeled / "annotations" / "train.json"
    document = json.loads(file.read_text())
    for annotation in document["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 2)
    file.write_text(json.dumps(document))
    return open_labeled(str(labeled), "train", cache=labeled, cache_bytes=10**6)


def _batch(samples: LabeledSamples, augment: Augment) -> dict[str, Tensor]:
    views = DetectionViews(samples, build(augment, mixing=True), [SIZE], 0, 10, 0)
    order = Order(samples.shard_sizes, seed=0, window_shards=16)
    loader = Loader(samples, order, views, seed=0, batch_size=10, reading=samples.reading)
    try:
        return next(iter(loader)).views
    finally:
        loader.close()


def test_a_crowd_goes_through_the_chain_and_is_no_box_to_find(crowded: LabeledSamples) -> None:
    batch = _batch(crowded, Augment())
    assert set(batch["classes"].tolist()) == {0} and len(batch["boxes"]) == len(batch["classes"])
    assert set(batch["crowd_classes"].tolist()) == {1} and len(batch["crowds"]) > 0
    assert len(batch["crowds"]) == len(batch["crowd_classes"]) == len(batch["crowds_sample"])
    # Squares of class 1 are blue, and red ones of class 0: boxes lie on their own, whatever moved.
    for boxes, rows, channel in (("boxes", "boxes_sample", 0), ("crowds", "crowds_sample", 2)):
        lit = []
        for box, row in zip(batch[boxes].tolist(), batch[rows].tolist(), strict=True):
            left, top, right, bottom = (int(side) for side in np.round(box))
            inside = batch["image"][row, top:bottom, left:right, channel].float()
            lit.append(inside.mean().item())
        assert np.median(lit) > 150, boxes


def test_a_crowd_is_neither_found_nor_background(crowded: LabeledSamples) -> None:
    """The loss is the same whatever is thought of the crowd's class inside the crowd."""
    torch.manual_seed(0)
    training = Training(build_detector("yolo12n", 2), LossKeys()).eval()
    batch = _batch(crowded, Augment())
    nobody = {
        "crowds": torch.zeros(0, 4),
        "crowds_sample": torch.zeros(0, dtype=torch.long),
        "crowd_classes": torch.zeros(0, dtype=torch.long),
    }
    with torch.no_grad():
        asked, left = training(batch | nobody), training(batch)
    assert left.parts["classification"] < asked.parts["classification"]
    assert torch.equal(left.parts["localisation"], asked.parts["localisation"])


def test_crowds_are_drawn_among_what_training_sees(crowded: LabeledSamples) -> None:
    training = Training(build_detector("yolo12n", 2), LossKeys())
    batch = _batch(crowded, Augment())
    seen = training.seen(batch)
    assert len(seen["boxes"]) == len(batch["boxes"]) + len(batch["crowds"])
    assert set(seen["classes"].tolist()) == {0, -2}
