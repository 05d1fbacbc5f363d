"""Stable regions: what stands out is found once, with its own box."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from groundwork.colour import Colour, draw, matrix_of
from pretext_tasks.stable_regions import (
    KINDS,
    Boxes,
    RegionKeys,
    kinds_of,
    shared_areas,
    stable_regions,
)

View = npt.NDArray[np.uint8]


def _scene(*shapes: tuple[str, tuple[int, int, int, int], str], noise: float = 2.0) -> View:
    """Draw ellipses and rectangles on a grey ground with a little noise."""
    image = Image.new("RGB", (192, 160), (170, 160, 150))
    pen = ImageDraw.Draw(image)
    for kind, box, colour in shapes:
        getattr(pen, kind)(box, fill=colour)
    pixels = np.asarray(image).astype(np.float64)
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _overlaps(boxes: npt.NDArray[np.float32], box: tuple[int, int, int, int]) -> list[float]:
    true = np.array([[box[0], box[1], box[2] + 1, box[3] + 1]], np.float32)
    shared = shared_areas(boxes, true)[:, 0]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    overlaps: list[float] = (
        shared / (areas + (true[0, 2:] - true[0, :2]).prod() - shared)
    ).tolist()
    return overlaps


SHAPES = (
    ("ellipse", (20, 30, 60, 66), "#402080"),
    ("rectangle", (90, 20, 130, 50), "#f0f0e8"),
    ("ellipse", (100, 90, 112, 102), "#c03030"),  # 13 px
    ("ellipse", (30, 100, 75, 140), "#b0886a"),  # of the ground's brightness, nearly
)


@pytest.mark.parametrize(
    ("resolutions", "least"), [((384, 256), 0.8), ((134,), 0.7), ((192, 128), 0.7)]
)
def test_every_shape_is_found_once(resolutions: tuple[int, ...], least: float) -> None:
    boxes = stable_regions(_scene(*SHAPES), RegionKeys(resolutions=resolutions))
    assert boxes.dtype == np.float32
    for _, box, colour in SHAPES:
        overlaps = sorted(_overlaps(boxes, box))
        assert overlaps[-1] > least, colour
        assert overlaps[-2] < 0.4, colour


def test_a_flat_picture_has_none() -> None:
    assert stable_regions(np.full((64, 64, 3), 120, np.uint8), RegionKeys()).shape == (0, 4)


def test_what_lies_in_a_region_is_left_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outer, inner, apart = (40, 30, 120, 110), (60, 50, 90, 80), (150, 10, 170, 30)
    candidates = np.array([outer] * 9 + [inner] * 12 + [apart] * 3, np.float32)
    candidates += np.random.default_rng(0).uniform(-0.4, 0.4, candidates.shape).astype(np.float32)
    monkeypatch.setattr("pretext_tasks.stable_regions._candidates", lambda view, keys: candidates)
    view = _scene()

    def found(**changes: Any) -> list[list[float]]:
        boxes = stable_regions(view, RegionKeys(votes=0, **changes))
        return [[float(round(side)) for side in box] for box in boxes.tolist()]

    assert found(larger=6.0) == [list(outer), list(apart)]
    assert found(larger=6.0, inside=1.0) == [list(outer), list(inner), list(apart)]
    assert found(larger=0.0) == [list(inner), list(outer), list(apart)]


@pytest.mark.parametrize(
    ("changes", "gone"),
    [({"area": 0.02}, 0), ({"side": 20.0}, 2), ({"votes": 1000.0}, 0), ({"ratio": 1.05}, 1)],
)
def test_limits_leave_out(changes: dict[str, Any], gone: int) -> None:
    boxes = stable_regions(_scene(*SHAPES), RegionKeys(**changes))
    best = [max(_overlaps(boxes, box), default=0.0) for _, box, _ in SHAPES]
    assert best[gone] < 0.6
    assert (max(best) > 0.7) == ("votes" not in changes)  # so many votes leave nothing


def test_no_more_than_most_and_the_best_of_them() -> None:
    view = _scene(*SHAPES)
    every = stable_regions(view, RegionKeys())
    assert len(every) > 2
    np.testing.assert_array_equal(stable_regions(view, RegionKeys(most=2)), every[:2])


@pytest.mark.parametrize("resolutions", [(192,), (134,), (63,), (384, 256), (134, 63)])
def test_boxes_stay_inside_the_picture(resolutions: tuple[int, ...]) -> None:
    cut = (("ellipse", (-20, -20, 30, 30), "#203060"), ("ellipse", (170, 130, 215, 190), "#802010"))
    boxes = stable_regions(_scene(*cut), RegionKeys(resolutions=resolutions))
    assert len(boxes) >= 2
    assert (boxes >= 0).all() and (boxes[:, 2] <= 192).all() and (boxes[:, 3] <= 160).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_larger_picture_is_looked_at_in_the_same_way() -> None:
    keys, picture = RegionKeys(resolutions=(192, 96)), _scene(*SHAPES)
    small = stable_regions(picture, keys)
    large = picture.repeat(3, 0).repeat(3, 1)
    np.testing.assert_allclose(stable_regions(large, keys), 3 * small, atol=1.5)


def test_a_small_picture_is_looked_at_once() -> None:
    picture = _scene(*SHAPES)
    once = stable_regions(picture, RegionKeys(resolutions=(192,)))
    np.testing.assert_array_equal(stable_regions(picture, RegionKeys()), once)
    assert len(once)


def test_shared_areas_by_hand() -> None:
    first = np.array([[0, 0, 4, 4]], np.float32)
    second = np.array([[2, 1, 6, 3], [4, 0, 6, 3], [0, 0, 4, 4]], np.float32)
    assert shared_areas(first, second).tolist() == [[4, 0, 16]]


def test_kinds_by_hand() -> None:
    """Size from 0 to 2 times 8, darker or brighter 0 or 1, redder 2, bluer 4."""
    view = _scene(
        ("rectangle", (10, 10, 17, 17), "#402010"),  # 8 px of 192: small; darker, redder, yellower
        ("rectangle", (60, 40, 78, 58), "#d0d8f0"),  # 19 px: middling; brighter, greener, bluer
        ("rectangle", (110, 80, 160, 130), "#203050"),  # 51 px: large; darker, greener, bluer
        noise=0.0,
    )
    boxes = np.array([[10, 10, 18, 18], [60, 40, 79, 59], [110, 80, 161, 131]], np.float32)
    assert kinds_of(view, boxes).tolist() == [0 + 0 + 2 + 0, 8 + 1 + 0 + 4, 16 + 0 + 0 + 4]


def test_kinds_at_the_border_of_a_view() -> None:
    view = _scene(("rectangle", (0, 0, 30, 30), "#101010"), noise=0.0)
    whole = np.array([[0, 0, 31, 31], [0, 0, 192, 160]], np.float32)
    kinds = kinds_of(view, whole)
    assert kinds[0] % 2 == 0 and (kinds < KINDS).all()
    assert kinds_of(view, np.zeros((0, 4), np.float32)).shape == (0,)


def test_kinds_are_of_what_the_network_sees() -> None:
    view = _scene(("rectangle", (60, 40, 78, 58), "#d06050"), noise=0.0)  # redder, yellower, darker
    boxes = np.array([[60, 40, 79, 59]], np.float32)
    assert kinds_of(view, boxes).tolist() == [8 + 0 + 2 + 0]
    assert kinds_of(view, boxes, np.eye(3)).tolist() == [8 + 0 + 2 + 0]
    exchanged = np.eye(3)[[2, 1, 0]]  # red and blue
    assert kinds_of(view, boxes, exchanged).tolist() == kinds_of(view[:, :, ::-1], boxes).tolist()
    grey = np.full((3, 3), 1 / 3)
    assert kinds_of(view, boxes, grey).tolist() == [8]
    for channels in (1, 2, 4):  # a colour's matrix is for RGB
        odd = np.resize(view, (*view.shape[:2], channels))
        assert len(kinds_of(odd, boxes, exchanged)) == 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 50), (400, 2), (20, 3000)])
def test_strips_and_dots_have_no_regions(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
    assert stable_regions(picture, RegionKeys()).shape == (0, 4)


def test_no_more_candidates_are_compared_than_there_is_time_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def shared(first: Boxes, second: Boxes) -> Boxes:
        compared.append(len(first))
        return shared_areas(first, second)

    monkeypatch.setattr("pretext_tasks.stable_regions.shared_areas", shared)
    noise = np.random.default_rng(0).integers(0, 255, (288, 384, 3)).astype(np.uint8)
    stable_regions(noise, RegionKeys())
    monkeypatch.setattr("pretext_tasks.stable_regions._CANDIDATES", 10**9)
    stable_regions(noise, RegionKeys())
    assert compared[0] == 3000 < compared[1]


def test_a_grey_picture_has_no_colours_whatever_is_drawn() -> None:
    shapes = [(kind, box, f"#{level}{level}{level}") for (kind, box, _), level in
              zip(SHAPES, ("20", "f0", "60", "c0"), strict=True)]  # fmt: skip
    view = _scene(*shapes, noise=0.0)
    view = np.repeat(view[:, :, :1], 3, axis=2)
    boxes = stable_regions(view, RegionKeys())
    assert len(boxes)
    for seed in range(40):
        drawn = draw(Colour(), np.random.default_rng(seed))
        assert not (kinds_of(view, boxes, matrix_of(drawn)) % 8 >= 2).any()
