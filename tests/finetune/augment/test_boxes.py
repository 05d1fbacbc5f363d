"""What finetune.augment.boxes promises, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from finetune.augment.boxes import Rule, area, mapped, overlap, uncovered


def boxes(*rows: tuple[float, float, float, float]) -> npt.NDArray[np.float32]:
    return np.array(rows, np.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    ("box", "survives"),
    [
        ((10, 10, 30, 30), True),
        ((-15, 10, 5, 30), True),  # exactly a quarter of it
        ((-15.1, 10, 4.9, 30), False),
        ((90, 90, 110, 110), True),  # a corner: exactly a quarter
        ((91, 90, 111, 110), False),
        ((-1, 50, 2, 90), True),  # two pixels wide, two thirds
        ((-1, 50, 1.9, 90), False),  # under two pixels wide
        ((50, 50, 51.9, 90), False),  # was never two pixels wide
        ((30, 30, 10, 40), False),  # inverted
        ((30, 30, 30, 40), False),  # without area
        ((math.nan, 10, 30, 30), False),
        ((120, 10, 140, 30), False),  # outside
    ],
)
def test_a_box_survives_by_its_visible_share_and_its_sides(
    box: tuple[float, float, float, float], survives: bool
) -> None:
    _, kept = Rule(0.25, 2.0).clip(boxes(box), (0, 0, 100, 100), np.zeros(1, np.int64))
    assert kept.tolist() == [survives]


def test_boxes_are_clipped_to_the_window() -> None:
    clipped, kept = Rule().clip(
        boxes((-5, 10, 30, 130), (40, 40, 50, 50)), (2, 0, 100, 90), np.zeros(2, np.int64)
    )
    assert clipped.tolist() == [[2, 10, 30, 90], [40, 40, 50, 50]]
    assert kept.tolist() == [True, True]
    assert clipped.dtype == np.float32
    none, kept = Rule().clip(boxes(), (0, 0, 10, 10), np.zeros(0, np.int64))
    assert none.shape == (0, 4)
    assert kept.shape == (0,)


def test_corners_and_ellipse_of_a_turned_box() -> None:
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    matrix = np.array([[cos, -sin, 5], [sin, cos, -3]])
    around = boxes((-20, -10, 20, 10))
    [corners] = mapped(around, matrix).tolist()
    assert corners[2] - 5 == pytest.approx(20 * cos + 10 * sin, rel=1e-6)
    assert corners[3] + 3 == pytest.approx(20 * sin + 10 * cos, rel=1e-6)
    [ellipse] = mapped(around, matrix, "ellipse").tolist()
    assert ellipse[2] - 5 == pytest.approx(math.hypot(20 * cos, 10 * sin), rel=1e-6)
    assert ellipse[3] + 3 == pytest.approx(math.hypot(20 * sin, 10 * cos), rel=1e-6)
    # A disc's box stays as it is, where corners make it wider by a third.
    [disc] = mapped(boxes((-10, -10, 10, 10)), matrix, "ellipse").tolist()
    assert disc == pytest.approx([-5, -13, 15, 7], abs=1e-5)


@pytest.mark.parametrize(
    ("cover", "left_over"),
    [
        ((0, 0, 15, 40), (15, 10, 30, 30)),  # the left side
        ((20, 10, 50, 30), (10, 10, 20, 30)),  # the right side
        ((10, 0, 30, 14), (10, 14, 30, 30)),  # the upper side
        ((0, 25, 40, 40), (10, 10, 30, 25)),  # the lower side
        ((0, 0, 15, 29), (10, 10, 30, 30)),  # not the whole of the left side
        ((15, 0, 20, 40), (10, 10, 30, 30)),  # through the middle
        ((40, 0, 60, 40), (10, 10, 30, 30)),  # beside it
    ],
)
def test_a_box_ends_where_its_whole_side_is_covered(
    cover: tuple[float, float, float, float], left_over: tuple[float, float, float, float]
) -> None:
    assert uncovered(boxes((10, 10, 30, 30)), cover).tolist() == [list(left_over)]


def test_a_box_that_is_covered_altogether_has_no_area() -> None:
    assert area(uncovered(boxes((10, 10, 30, 30)), (0, 0, 40, 40))).tolist() == [0]


def test_area_and_overlap() -> None:
    some = boxes((0, 0, 10, 20), (5, 5, 3, 9))
    assert area(some).tolist() == [200, 0]
    assert overlap(some, (5, 10, 50, 50)).tolist() == [50, 0]
    assert overlap(some, (20, 20, 50, 50)).tolist() == [0, 0]
