"""The detection probe: it tells features that show objects from those that do not, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Backbone, Level, Pyramid
from groundwork.data.label_table import HeldOut
from groundwork.data.labels import open_labeled
from groundwork.errors import DataError, UsageError
from groundwork.settings import DetectionProbeSettings
from pretrain.detection_probe import DetectionProbe, open_detection_probe, read_pictures

SIDE, STEPS = 64, 60


class Colours(Backbone):
    """A backbone whose levels are the mean colours of their cells, times a parameter."""

    name = "colours"
    levels = (Level(8, 16), Level(16, 16), Level(32, 16))
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, image: Tensor) -> Pyramid:
        colours = functional.pad(self.norm(image) * self.scale, (0, 0, 0, 0, 0, 13))  # 16 channels
        return Pyramid(*(functional.avg_pool2d(colours, stride) for stride in (8, 16, 32)))


class Blind(Colours):
    """The same with every cell's own place lost."""

    def forward(self, image: Tensor) -> Pyramid:
        levels = super().forward(image)
        return Pyramid(*(x.mean((2, 3), keepdim=True).expand_as(x) for x in levels))


def probe_of(root: Path, **changes: object) -> DetectionProbe:
    keys = {"data": str(root), "image_size": SIDE, "steps": STEPS, "batch_size": 5}
    settings = DetectionProbeSettings.model_validate(keys | changes)
    found = open_detection_probe(settings, cache=root / "cache", cache_bytes=10**6)
    assert found is not None
    return found


@pytest.mark.slow
def test_features_that_show_where_things_are_score_higher(labeled: Path) -> None:
    probe = probe_of(labeled, steps=250)
    seeing, blind = probe.measure(Colours()), probe.measure(Blind())
    assert set(seeing) == {"probe/ap", "probe/ap50"}
    assert seeing["probe/ap50"] > blind["probe/ap50"] + 0.2


def test_the_scale_of_features_says_nothing(labeled: Path) -> None:
    probe = probe_of(labeled, steps=10)
    one, other = probe.measure(Colours()), probe.measure(Colours(1000.0))
    assert one["probe/ap"] == pytest.approx(other["probe/ap"], abs=0.02)


def test_a_measurement_moves_nothing_and_can_be_had_again(labeled: Path) -> None:
    probe = probe_of(labeled, steps=5)
    backbone = Colours().train()
    backbone.norm.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    first = probe.measure(backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training and not backbone.norm.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    torch.manual_seed(5)
    assert probe.measure(backbone) == first


def test_features_go_through_the_neck_where_there_is_one(labeled: Path) -> None:
    seen: list[int] = []

    class Neck(nn.Module):
        def forward(self, pyramid: Pyramid) -> Pyramid:
            seen.append(len(pyramid.c3))
            return pyramid

    probe_of(labeled, steps=1).measure(Colours(), Neck())
    assert sum(seen) == 10 + 10 + 4  # statistics, training, validation


def test_features_that_are_not_finite_find_nothing(labeled: Path) -> None:
    assert probe_of(labeled).measure(Colours(torch.nan)) == {"probe/ap": 0.0, "probe/ap50": 0.0}


def test_boxes_follow_the_picture_into_its_frame(labeled: Path) -> None:
    samples = open_labeled(str(labeled), "train", cache=labeled, cache_bytes=10**6)
    found = read_pictures(samples, 10, 128)
    for pixels, truth in zip(found.pixels, found.truth, strict=True):
        for box, label in zip(truth.annotations.boxes, truth.annotations.classes, strict=True):
            left, top, right, bottom = box.round().astype(int)
            inner = pixels[top + 2 : bottom - 2, left + 2 : right - 2].float().mean((0, 1))
            assert inner[2 * int(label)] > 240  # red and blue squares


def test_unreadable_pictures_are_left_out_and_a_set_without_boxes_is_told(
    labeled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = labeled / "images" / "train"
    first, *others = sorted(pictures.glob("*.png"))
    first.write_bytes(b"")
    where: dict[str, Any] = {"cache": labeled / "cache", "cache_bytes": 10**6}
    frames = read_pictures(open_labeled(str(labeled), "train", **where), 64, SIDE)
    assert len(frames.truth) == len(others)
    assert "leaves out a picture" in caplog.text and first.name in caplog.text
    for path in others:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no readable pictures"):
        read_pictures(open_labeled(str(labeled), "train", **where), 64, SIDE)


def test_validation_without_boxes_is_told(labeled: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = labeled / "annotations" / "val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    found = probe_of(labeled, steps=1).measure(Colours())
    assert found["probe/ap"] == 0 and "probe/ap will be 0" in caplog.text


def test_nothing_named_is_no_probe_and_a_missing_split_is_told(labeled: Path) -> None:
    settings = DetectionProbeSettings()
    assert open_detection_probe(settings, cache=labeled, cache_bytes=10**6) is None
    train = labeled / "annotations" / "train.json"
    train.rename(labeled / "train.away")
    settings = DetectionProbeSettings(data=str(labeled))
    with pytest.raises(DataError, match=r"no train split .* must not learn from test and val"):
        open_detection_probe(settings, cache=labeled, cache_bytes=10**6)
    (labeled / "train.away").rename(train)
    (labeled / "annotations" / "val.json").unlink()
    with pytest.raises(DataError, match=r"no validation split .* probe\.detection\.val"):
        probe_of(labeled)


def test_what_is_held_out_is_what_fine_tuning_holds_out(labeled: Path) -> None:
    with pytest.raises(UsageError, match=r"holdout=0\.2: there are pictures for validation"):
        probe_of(labeled, holdout=0.2)
    (labeled / "annotations" / "val.json").unlink()
    held_out = open_labeled(
        str(labeled), "train", cache=labeled, cache_bytes=10**6, held_out=HeldOut(0.4, kept=True)
    )
    expected = read_pictures(held_out, 10, SIDE)
    probe = probe_of(labeled, holdout=0.4)
    assert len(probe._train.truth) + len(probe._val.truth) == 10
    assert torch.equal(probe._val.pixels, expected.pixels)


def test_other_classes_are_refused(labeled: Path) -> None:
    file = labeled / "annotations" / "val.json"
    document = json.loads(file.read_text())
    document["categories"][0]["name"] = "green"
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"red|green"):
        probe_of(labeled)


def test_a_list_chooses_the_labeled_pictures(labeled: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("00.png\n03.png\n")
    probe = probe_of(labeled, train_list=str(names))
    assert len(probe._train.truth) == 2
