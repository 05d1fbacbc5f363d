"""The anchor-free head: parameters, biases, anchor points, decoding by hand, objectness."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finetune.head import BINS, Anchors, DetectionHead, anchors_of
from groundwork.backbones.yolo12 import SCALES
from groundwork.necks.yolo12 import Features

# Parameters of the public heads at 80 classes, the 16 fixed places of the bins counted.
PARAMETERS = {"n": 464912, "s": 850368, "m": 1472704, "l": 1472704, "x": 3237952}


@pytest.mark.parametrize("letter", SCALES)
def test_the_head_has_the_public_number_of_parameters(letter: str) -> None:
    channels = [SCALES[letter].channels(c) for c in (256, 512, 1024)]
    head = DetectionHead(channels, 80)
    assert sum(p.numel() for p in head.parameters()) == PARAMETERS[letter]


def _features() -> Features:
    torch.manual_seed(0)
    return Features(*(torch.rand(2, 8, 8 // f, 12 // f) for f in (1, 2, 4)))


def test_logits_stand_level_after_level_and_row_by_row() -> None:
    head = DetectionHead((8, 8, 8), 3).eval()
    features = _features()
    raw = head(features)
    assert raw.boxes.shape == (2, 96 + 24 + 6, 4 * BINS)
    assert raw.classes.shape == (2, 96 + 24 + 6, 3)
    assert raw.objectness is None
    p4 = head.classes[1](features.p4)
    torch.testing.assert_close(raw.classes[:, 96 + 6 * 2 + 5], p4[:, :, 2, 5])


def test_biases_start_at_five_cells_of_a_class_and_at_sides_two_strides_away() -> None:
    head = DetectionHead((8, 8, 8), 4, objectness=True)
    assert head.objectness is not None

    def bias(branch: nn.Module) -> Tensor:
        assert isinstance(branch, nn.Sequential)
        last = branch[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        return last.bias.detach()

    for level, stride in enumerate((8, 16, 32)):
        expected = torch.full((4,), math.log(5 / 4 / (640 / stride) ** 2))
        torch.testing.assert_close(bias(head.classes[level]), expected)
        distances = head.distances(bias(head.boxes[level]))
        torch.testing.assert_close(distances, torch.full((4,), 1.98), atol=0.01, rtol=0)
        objectness = bias(head.objectness[level]).item()
        assert objectness == pytest.approx(math.log(5 / (640 / stride) ** 2))


def test_a_head_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one class, not 0"):
        DetectionHead((8, 8, 8), 0)


def test_objectness_is_one_logit_a_cell() -> None:
    raw = DetectionHead((8, 8, 8), 3, objectness=True)(_features())
    assert raw.objectness is not None
    assert raw.objectness.shape == (2, 126)
    raw.objectness.sum().backward()


def test_anchor_points_are_the_middles_of_the_cells() -> None:
    anchors = anchors_of(32, 64, torch.zeros(1))
    assert anchors.points.shape == (32 + 8 + 2, 2)
    assert anchors.points[:9].tolist() == [
        *([4.0 + 8 * column, 4.0] for column in range(8)),
        [4.0, 12.0],
    ]
    assert anchors.points[32:34].tolist() == [[8.0, 8.0], [24.0, 8.0]]
    assert anchors.points[40:].tolist() == [[16.0, 16.0], [48.0, 16.0]]
    assert anchors.strides.tolist() == [8.0] * 32 + [16.0] * 8 + [32.0] * 2


def test_a_distance_is_the_expectation_over_the_bins_in_strides() -> None:
    """Worked by hand: left 2 and 4 alike, top surely 0, right even over all bins, bottom 15."""
    logits = torch.full((4, BINS), -1e4)
    logits[0, 2] = logits[0, 4] = 0.0
    logits[1, 0] = 0.0
    logits[2] = 3.0
    logits[3, 15] = 0.0
    head = DetectionHead((8, 8, 8), 1)
    anchors = Anchors(torch.tensor([[100.0, 60.0]]), torch.tensor([8.0]))
    boxes = head.decode(logits.view(1, 1, 4 * BINS), anchors)
    assert head.distances(logits.view(1, 1, 4 * BINS)).tolist() == [[[3.0, 0.0, 7.5, 15.0]]]
    assert boxes.tolist() == [[[100 - 24.0, 60.0, 100 + 60.0, 60 + 120.0]]]
