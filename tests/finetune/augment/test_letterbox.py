"""What finetune.augment.letterbox promises: the frame, and boxes that come back exactly."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.augment.contract import Item
from finetune.augment.letterbox import Letterbox, framed, letterbox_geometry
from tests.finetune.augment.drawn import Dealer

SIZES = [(320, 320), (640, 384), (32, 640)]
PICTURES = [(640, 480), (575, 480), (333, 1000), (1, 1), (70, 4000), (640, 384), (20, 20)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("width", "height"), PICTURES)
def test_boxes_go_with_the_picture(size: tuple[int, int], width: int, height: int) -> None:
    geometry = letterbox_geometry(width, height, size)
    generator = np.random.default_rng(0)
    boxes = (generator.random((100, 4)) * [width, height, width, height]).astype(np.float32)
    scale, left, top = geometry
    assert np.allclose(geometry.apply(boxes), boxes * scale + [left, top, left, top], atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("width", "height"), PICTURES)
def test_a_picture_fills_its_frame_one_way_and_lies_centred_the_other(
    size: tuple[int, int], width: int, height: int
) -> None:
    geometry = letterbox_geometry(width, height, size)
    frame = framed(np.full((height, width, 3), 255, np.uint8), geometry, size)
    assert frame.shape == (*size, 3)
    assert frame.flags.c_contiguous
    tall, wide = geometry.shown(width, height)
    assert tall == size[0] or wide == size[1]
    inside = frame[geometry.top : geometry.top + tall, geometry.left : geometry.left + wide]
    assert (inside == 255).all()
    assert np.count_nonzero(frame == 114) == frame.size - inside.size
    assert abs(size[0] - tall - 2 * geometry.top) <= 1
    assert abs(size[1] - wide - 2 * geometry.left) <= 1


def test_an_item_of_the_right_size_is_left_alone_but_for_boxes_that_do_not_count() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    boxes = np.array([[3, 4, 50, 60], [-10, 5, 30, 30], [5, 5, 6, 6]], np.float32)
    item = Letterbox()(Item(pixels, boxes, np.arange(3)), Dealer(0, (128, 128)))
    assert np.array_equal(item.pixels, pixels)
    assert item.boxes.tolist() == [[3, 4, 50, 60], [0, 5, 30, 30]]
    assert item.classes.tolist() == [0, 1]
