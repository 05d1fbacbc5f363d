"""Claims about drawing: boxes are where they were said to be, and leave the rest as it was."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from finetune.draw import colour_of, draw_boxes, ink_on

NAMES = ("car", "boat")


def drawn(
    boxes: list[list[float]],
    classes: list[int],
    scores: list[float] | None = None,
    size: tuple[int, int] = (200, 160),
    names: tuple[str, ...] = NAMES,
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = Image.new("RGB", size, (90, 90, 90))
    result = draw_boxes(
        image,
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(classes, np.int64),
        names,
        None if scores is None else np.array(scores),
    )
    assert image.getextrema() == ((90, 90),) * 3  # the picture that was given is left alone
    return np.asarray(result)


def test_only_what_is_near_the_edges_changes() -> None:
    pixels = drawn([[40, 60, 140, 130]], [0], [0.5])
    changed = (pixels != 90).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60 - 13, 129, 40, 139)
    assert not changed[62:128, 42:138].any()  # inside of an outline of two pixels
    assert (pixels[129, 40:140] == colour_of(0)).all() and (
        pixels[60:130, 139] == (255, 0, 0)
    ).all()


def test_no_box_changes_nothing() -> None:
    assert (drawn([], [], []) == 90).all()


def test_a_name_is_written_where_there_is_room() -> None:
    narrow = drawn([[40, 60, 50, 130]], [0], names=("a long name of a class", ""))
    assert not (narrow[:60] != 90).any()
    wide = drawn([[40, 60, 190, 130]], [0], names=("a long name of a class", ""))
    assert (wide[47:60] != 90).any()


def test_the_better_box_lies_on_top() -> None:
    box = [20.0, 60.0, 180.0, 150.0]
    assert tuple(drawn([box, box], [0, 1], [0.9, 0.3])[100, 20]) == colour_of(0)
    assert tuple(drawn([box, box], [0, 1], [0.3, 0.9])[100, 20]) == colour_of(1)


def test_boxes_at_the_edge_and_without_area() -> None:
    pixels = drawn([[0, 0, 200, 160], [50, 50, 50, 50], [199.5, 159.5, 200, 160]], [0, 1, 1])
    assert tuple(pixels[159, 199]) != (90, 90, 90) and tuple(pixels[100, 0]) == colour_of(0)


def test_outlines_grow_with_the_picture() -> None:
    pixels = drawn([[400, 400, 2400, 2400]], [0], size=(3200, 2600))
    assert (pixels[2396:2400, 1000] == colour_of(0)).all() and (pixels[2395, 1000] == 90).all()
    small = drawn([[400, 400, 420, 420]], [0], size=(3200, 2600))
    assert (small[402:418, 402:418] == 90).all()


@pytest.mark.parametrize("number", range(20))
def test_classes_have_colours_of_their_own_that_can_be_written_on(number: int) -> None:
    colour = colour_of(number)
    assert all(colour != colour_of(other) for other in range(20) if other != number)
    ink, ground = (
        np.dot((0.299, 0.587, 0.114), one) for one in (ImageColor.getrgb(ink_on(colour)), colour)
    )
    assert abs(ink - ground) > 100


def test_a_crowd_has_its_classs_colour_and_says_that_it_is_one() -> None:
    box = [[20.0, 40.0, 180.0, 140.0]]
    plain, crowd = drawn(box, [1]), drawn(box, [-2])
    assert (crowd[139, 20:180] == colour_of(1)).all()
    tag = [(pixels[27:40] != 90).any(2).any(0).sum() for pixels in (plain, crowd)]
    assert tag[1] > tag[0]  # "boat (crowd)" is longer
