"""What training sees of a labeled picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.augment import Rule, build
from finetune.augment.settings import Augment
from finetune.detector import build_detector
from finetune.head import Raw, anchors_of
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
    anchors = anchors_of(SIZE, SIZE, torch.zeros(1))
    losses = []
    for thought in (0.0, 3.0):  # added to the logits of class 1 within crowds

        def think(_: nn.Module, __: object, raw: Raw, thought: float = thought) -> Raw:
            classes = raw.classes.clone()
            for box, row in zip(batch["crowds"], batch["crowds_sample"], strict=True):
                within = ((anchors.points > box[:2]) & (anchors.points < box[2:])).all(1)
                classes[row, within, 1] += thought
            return raw._replace(classes=classes)

        hook = training.detector.head.register_forward_hook(think)
        with torch.no_grad():
            losses.append(
                [training(one).parts["classification"] for one in (batch, batch | nobody)]
            )
        hook.remove()
    assert torch.equal(losses[0][0], losses[1][0])
    assert losses[0][1] < losses[1][1]


def test_what_a_cut_leaves_of_a_crowd_stays_a_crowd() -> None:
    """Under a quarter of a box is no box any more; of a crowd it is a crowd still."""
    rule = Rule()
    box, window = np.array([[0, 0, 40, 40]], np.float32), (36.0, 0.0, 80.0, 80.0)
    assert not rule.clip(box, window, np.array([1]))[1][0]
    clipped, kept = rule.clip(box, window, np.array([-2]))
    assert kept[0] and clipped[0].tolist() == [36, 0, 40, 40]
    assert not rule.clip(box, (50.0, 0.0, 80.0, 80.0), np.array([-2]))[1][0]


def test_crowds_are_drawn_among_what_training_sees(crowded: LabeledSamples) -> None:
    training = Training(build_detector("yolo12n", 2), LossKeys())
    batch = _batch(crowded, Augment())
    seen = training.seen(batch)
    assert len(seen["boxes"]) == len(batch["boxes"]) + len(batch["crowds"])
    assert set(seen["classes"].tolist()) == {0, -2}


def test_a_mosaic_passes_over_a_damaged_picture_and_only_that_one_is_named(labeled: Path) -> None:
    """Its header can be read, so it is found out when a mosaic of another picture decodes it."""
    broken = labeled / "images" / "train" / "03.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    samples = open_labeled(str(labeled), "train", cache=labeled, cache_bytes=10**6)
    augment = Augment.model_validate({"mosaic": {"prob": 1.0}, "mixup": {"prob": 1.0}})
    views = DetectionViews(samples, build(augment, mixing=True), [SIZE], 0, 10, 0)
    order = Order(samples.shard_sizes, seed=0, window_shards=16)
    loader = Loader(samples, order, views, seed=0, batch_size=10, reading=samples.reading)
    batches = iter(loader)
    named = [one.key for _ in range(6) for one in next(batches).replaced]
    loader.close()
    assert len(named) == 6 and {Path(key).name for key in named} == {"03"}
