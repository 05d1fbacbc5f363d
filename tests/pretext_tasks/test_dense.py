"""Dense: points are the same place in both views, and features are read there."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from groundwork.backbones.contract import Backbone
from groundwork.data.decode import open_picture
from groundwork.errors import UsageError
from pretext_tasks.dense import (
    Dense,
    DenseConfig,
    features_at,
    partner_found,
    shared_area,
)

MakeBatch = Callable[..., dict[str, Tensor]]
SMALL: dict[str, Any] = {"hidden_width": 16, "projection_width": 8}


def _generator(position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[0, position]))


def _ramp(width: int, height: int) -> bytes:
    """A picture whose red says x and whose green says y."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack((x * 255 / (width - 1), y * 255 / (height - 1), 0 * x), 2)
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_point_shows_the_same_place_in_both_views(position: int) -> None:
    config = DenseConfig(rotate=0.75, points=8, window_scale=(0.5, 1.0))
    views = Dense.views(config, 64)(open_picture(_ramp(200, 150)), _generator(position))
    seen = []
    for number in (1, 2):
        points = views[f"points_{number}"]
        assert points.dtype == np.float32 and (np.abs(points) <= 1).all()
        level = torch.from_numpy(views[f"view_{number}"]).permute(2, 0, 1)[None].float()
        seen.append(features_at(level, torch.from_numpy(points)[None]))
    # 255 grey levels over 200 px; a view's cell is up to 3 px of the picture.
    torch.testing.assert_close(seen[0][:, :2], seen[1][:, :2], atol=5.0, rtol=0)


def test_the_second_view_overlaps_as_much_as_was_asked(make_jpeg: Callable[..., bytes]) -> None:
    picture = make_jpeg(0, 200, 150)
    config = DenseConfig(overlap=1.0, crop_scale=(0.2, 0.2))  # which no other crop reaches
    views = Dense.views(config, 64)(open_picture(picture), _generator(0))
    assert np.array_equal(np.abs(views["points_1"]), np.abs(views["points_2"]))


def test_any_overlap_is_enough_where_none_is_asked_for(make_jpeg: Callable[..., bytes]) -> None:
    config = DenseConfig(overlap=0.0, crop_scale=(0.3, 0.6), flip=0.0)
    same = 0
    for position in range(20):
        views = Dense.views(config, 64)(open_picture(make_jpeg(0)), _generator(position))
        same += np.allclose(views["points_1"], views["points_2"])
    assert same < 3


def test_areas_by_hand() -> None:
    assert shared_area((0, 0, 4, 4), (2, 1, 6, 3)) == 4
    assert shared_area((0, 0, 4, 4), (4, 0, 6, 3)) == 0
    assert shared_area((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_features_are_read_at_the_middles_of_cells() -> None:
    level = torch.arange(8.0).reshape(1, 1, 2, 4)
    # Middles of the first and last cell, and half way between the first two of the lower row.
    points = torch.tensor([[[-0.75, -0.5], [0.75, 0.5], [-0.5, 0.5]]])
    assert features_at(level, points).flatten().tolist() == [0.0, 7.0, 4.5]


def test_partners_are_found_where_features_say_where(make_batch: MakeBatch) -> None:
    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    assert partner_found(rows, rows * 2) == 1
    assert partner_found(rows, rows.flip(0)) == 0


@pytest.fixture
def make_task(tiny_backbone: Callable[[], Backbone]) -> Callable[..., Dense]:
    def make(**changes: Any) -> Dense:
        torch.manual_seed(0)
        return Dense(tiny_backbone(), DenseConfig(**SMALL | changes))

    return make


def test_the_loss_is_the_weighted_mean_over_levels_and_the_whole(
    make_task: Callable[..., Dense], make_batch: MakeBatch
) -> None:
    batch = make_batch(Dense, DenseConfig(**SMALL))
    points, whole, both = (
        make_task(whole=share)(batch).loss.detach() for share in (0.0, 1.0, 0.25)
    )
    torch.testing.assert_close(both, 0.75 * points + 0.25 * whole)


def test_a_neck_is_trained_and_kept(make_task: Callable[..., Dense], make_batch: MakeBatch) -> None:
    task = make_task(neck="n")
    task(make_batch(Dense, task.config)).loss.backward()
    assert all(parameter.grad is not None for parameter in task.parameters())
    assert set(task.product()) == {"backbone", "neck"}


def test_a_size_that_no_backbone_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        Dense.views(DenseConfig(), 100)
