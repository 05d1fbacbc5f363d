"""Noise inside the network: present in training, absent in evaluation, sized to the map."""

from __future__ import annotations

import pytest
import torch

from finetune.detector import build_detector
from finetune.recipe import Regularize
from finetune.regularize import FeatureNoise, regularize
from groundwork.errors import UsageError


@pytest.mark.parametrize("side", [2, 3, 8, 10, 40])
def test_dropblock_zeroes_squares_of_at_most_half_a_map(side: int) -> None:
    torch.manual_seed(0)
    noise = FeatureNoise(0.2, 7, 0.0)
    out = noise(torch.ones(4, 16, side, side))
    share = float((out == 0).float().mean())
    assert 0 < share < 0.6
    assert torch.equal(noise.eval()(torch.ones(4, 16, side, side)), torch.ones(4, 16, side, side))


def test_spatial_dropout_takes_whole_channels() -> None:
    torch.manual_seed(0)
    out = FeatureNoise(0.0, 7, 0.5)(torch.ones(2, 64, 4, 4))
    channels = out.flatten(2)
    assert all(len(set(one.tolist())) == 1 for one in channels.flatten(0, 1))
    assert 0.2 < float((channels[..., 0] == 0).float().mean()) < 0.8


def test_noise_changes_no_name_and_nothing_in_evaluation() -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 2)
    image = torch.rand(2, 3, 64, 64)
    names = list(detector.state_dict())
    plain = detector.eval()(image)
    regularize(detector, Regularize(dropblock=0.1, spatial_dropout=0.1, stochastic_depth=0.3))
    assert list(detector.state_dict()) == names
    assert torch.equal(detector.eval()(image).classes, plain.classes)
    with torch.no_grad():
        detector.backbone.train()
        assert not torch.equal(detector(image).classes, detector(image).classes)


def test_stochastic_depth_needs_branches_to_drop() -> None:
    detector = build_detector("timm/test_resnet", 2)
    with pytest.raises(UsageError, match="stochastic_depth"):
        regularize(detector, Regularize(stochastic_depth=0.1))
