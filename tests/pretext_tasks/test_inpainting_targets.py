"""What inpainting predicts: patches of pixels, features."""

from __future__ import annotations

import pytest
import torch

from pretext_tasks.inpainting_targets import (
    Latents,
    normalise_patches,
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


def test_a_network_that_says_the_same_everywhere_has_nothing_to_predict() -> None:
    image = torch.rand(2, 3, 64, 64)
    target = Latents(image, {8: torch.full((2, 5, 8, 8), 3.0)})
    assert target.maps[8].abs().max() < 1e-3
    hidden = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    shown = target.shown(torch.zeros(2, 5, 8, 8), hidden)
    assert all(value.isfinite().all() for value in shown.values())
    assert target.metrics(torch.zeros(2, 5, 8, 8), hidden)["hidden_cosine"].abs() < 1e-3
