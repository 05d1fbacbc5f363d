"""What inpainting predicts: patches of pixels, directions of edges, features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretext_tasks.inpainting_targets import (
    Histograms,
    Latents,
    by_channel,
    normalise_patches,
    oriented,
)


def test_a_patch_loses_mean_and_deviation_of_its_own() -> None:
    """Three channels of 1, 2, .. 12 in the left patch: mean 6.5, unbiased variance 13."""
    left = torch.arange(1.0, 13.0).view(1, 3, 2, 2)
    right = torch.full((1, 3, 2, 2), 5.0)
    target = normalise_patches(torch.cat([left, right], dim=3), patch=2, eps=3.0)
    assert torch.allclose(target.value[..., :2], (left - 6.5) / 4)
    assert torch.equal(target.value[..., 2:], torch.zeros(1, 3, 2, 2))  # flat: no division by 0
    assert target.mean[0, 0].tolist() == [[6.5, 6.5, 5.0, 5.0]] * 2
    assert target.deviation[0, 0, 0].tolist() == pytest.approx([4.0, 4.0, 3.0**0.5, 3.0**0.5])


def test_without_a_patch_the_target_is_the_picture() -> None:
    image = torch.rand(1, 3, 4, 4)
    target = normalise_patches(image, patch=None, eps=1.0)
    assert torch.equal(target.value * target.deviation + target.mean, image)


def _ramp(angle: float, side: int = 16) -> Tensor:
    """A picture that grows brighter in one direction, 1 3 side side; 0 is to the right."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rising = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    return (0.5 + 0.01 * rising).expand(1, 3, side, side)


@pytest.mark.parametrize(
    ("angle", "expected"), [(10, 0), (30, 1), (90, 4), (150, 7), (170, 8), (190, 0), (270, 4)]
)
def test_a_gradient_is_counted_in_the_bin_of_its_direction(angle: float, expected: int) -> None:
    """Bins are of 20 degrees, and opposite directions are one."""
    inner = by_channel(oriented(_ramp(angle))[:, :, 2:-2, 2:-2]).sum(dim=(3, 4))
    assert inner.argmax(2).tolist() == [[expected] * 3]
    assert torch.equal((inner > 0).sum(2), torch.ones(1, 3, dtype=torch.long))
    # Two neighbours lie two pixels apart.
    assert inner.max().item() / 144 == pytest.approx(0.02, rel=1e-4)


def test_histograms_have_length_one_where_there_are_edges_and_none_where_there_are_not() -> None:

    def of(image: Tensor, side: int) -> Tensor:
        return Histograms(image, (side,)).maps[side]

    assert of(torch.full((1, 3, 16, 16), 0.3), 8).abs().max() == 0
    grain = 0.3 + (torch.rand(1, 3, 64, 64) - 0.5) * 4 / 255  # two grey levels around
    lengths = by_channel(of(grain, 8)).square().sum(2).sqrt()
    assert lengths.mean() < 0.45
    edge = torch.full((1, 3, 16, 16), 0.3)
    edge[..., 4:] += 20 / 255
    assert by_channel(of(edge, 8))[0, :, :, 0, 0].square().sum(1).sqrt().min() > 0.85
    noise = of(torch.rand(2, 3, 32, 32), 16)
    assert noise.shape == (2, 27, 2, 2)
    lengths = by_channel(noise).square().sum(2).sqrt()
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=3e-3)


def test_a_network_that_says_the_same_everywhere_has_nothing_to_predict() -> None:
    image = torch.rand(2, 3, 64, 64)
    target = Latents(image, {8: torch.full((2, 5, 8, 8), 3.0)})
    assert target.maps[8].abs().max() < 1e-3
    hidden = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    shown = target.shown(torch.zeros(2, 5, 8, 8), hidden)
    assert all(value.isfinite().all() for value in shown.values())
    assert target.metrics(torch.zeros(2, 5, 8, 8), hidden)["hidden_cosine"].abs() < 1e-3


def test_an_edge_is_drawn_along_itself() -> None:
    """Brightness rises to the right: the edge, and the line in each cell, stand upright."""
    target = Histograms(_ramp(5), (8,))
    hidden = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    drawn = target.shown(target.maps[8], hidden)["edges"]
    cell = drawn[0, 0, :8, :8]
    assert cell.sum(0).max() > 3 * cell.sum(1).max()
