"""What groundwork.data.resize promises."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from groundwork.data.resize import Box, cut_boxes


def photograph(width: int, height: int) -> Image.Image:
    """Soft areas with much grain, which a wrong filter would show."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    grain = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(soft // 2 + grain // 2)


@pytest.mark.parametrize("box", [(50, 40, 450, 380), (100, 100, 160, 150), (0, 0, 640, 480)])
@pytest.mark.parametrize("size", [(224, 224), (200, 60), (400, 340), (16, 16)])
def test_whole_and_fractional_boxes_are_resized_alike(
    box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    image = photograph(640, 480)
    left, top, right, bottom = (float(edge) for edge in box)
    (whole,) = cut_boxes(image, [(left, top, right, bottom)], size)
    expected = np.asarray(image.crop(box).resize(size, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(whole - expected).max() <= 1
    hair: Box = (left + 1e-4, top + 1e-4, right - 1e-4, bottom - 1e-4)
    (fractional,) = cut_boxes(image, [hair], size)
    # Averaging blocks first, where a box shrinks to less than a quarter, is not quite the same.
    limit = 2 if max((right - left) / size[0], (bottom - top) / size[1]) < 4 else 12
    assert np.abs(fractional - expected).max() <= limit
    assert np.abs(fractional - expected).mean() < 1.5


def test_boxes_of_both_kinds_keep_their_order() -> None:
    image = photograph(64, 48)
    boxes = [(1.5, 2.0, 20.0, 30.0), (8.0, 8.0, 40.0, 40.0), (0.0, 0.0, 33.25, 20.0)]
    boxes.append((30.0, 10.0, 64.0, 48.0))
    for crop, box in zip(cut_boxes(image, boxes, (32, 32)), boxes, strict=True):
        assert np.array_equal(crop, cut_boxes(image, [box], (32, 32))[0])


@pytest.mark.parametrize("edge", [0.0, 0.25])
@pytest.mark.parametrize("side", [64, 16, 4, 2])
def test_nothing_beyond_the_box_bleeds_in(edge: float, side: int) -> None:
    values = np.full((96, 96, 3), 255, np.uint8)
    values[32:64, 32:64] = 0
    box = (32 + edge, 32 + edge, 64 - edge, 64 - edge)
    (crop,) = cut_boxes(Image.fromarray(values), [box], (side, side))
    assert crop.shape == (side, side, 3)
    assert crop.max() == 0


def test_a_box_of_the_size_asked_for_is_copied() -> None:
    image = photograph(64, 48)
    (crop,) = cut_boxes(image, [(10.0, 8.0, 42.0, 40.0)], (32, 32))
    assert np.array_equal(crop, np.asarray(image)[8:40, 10:42])
    crop[:] = 0
    assert np.asarray(image)[8:40, 10:42].any()


def test_a_crop_beyond_pillows_own_limit_is_the_same_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    boxes = [(3.0, 5.0, 51.0, 33.0), (3.5, 5.25, 51.0, 33.0)]
    plain = cut_boxes(Image.fromarray(pixels), boxes, (24, 14))
    monkeypatch.setattr("groundwork.data.resize._CROP_PIXELS", 0)
    for one, other in zip(plain, cut_boxes(Image.fromarray(pixels), boxes, (24, 14)), strict=True):
        np.testing.assert_array_equal(one, other)
