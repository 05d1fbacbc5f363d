"""Two views: one decode for both, and a spread that can be worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from groundwork.colour import Colour
from groundwork.data.decode import Picture, open_picture
from pretext_tasks.two_views import TwoViews, spread

VIEWS = TwoViews(64, (1.0, 1.0), (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.0, (Colour(), Colour()))


def test_both_views_are_cut_in_one_decode(
    make_jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    cut = Picture.cut

    def count(
        picture: Picture,
        boxes: Sequence[tuple[float, float, float, float]],
        size: tuple[int, int] | int,
    ) -> list[npt.NDArray[np.uint8]]:
        asked.append(len(boxes))
        return cut(picture, boxes, size)

    monkeypatch.setattr(Picture, "cut", count)
    entries = VIEWS(open_picture(make_jpeg(0, 200, 150)), np.random.default_rng(0))
    assert asked == [2]
    assert not np.array_equal(entries["view_1"], entries["view_2"])


def test_spread_is_one_for_directions_that_point_everywhere() -> None:
    crossed = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -5.0]])
    assert spread(crossed).item() == pytest.approx(1.0)
    assert spread(crossed[[0, 2]]).item() == pytest.approx(math.sqrt(0.5))
    assert spread(crossed[:1].expand(4, 2)).item() == 0.0


@pytest.mark.parametrize(("flip", "kinds"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_flips_follow_their_probability(
    make_jpeg: Callable[..., bytes], flip: float, kinds: int
) -> None:
    views = TwoViews(32, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), flip, 0.0, (Colour(), Colour()))
    data = make_jpeg(3, 32, 32)
    plain = open_picture(data).pixels()
    seen = set()
    for position in range(20):
        view = views(open_picture(data), np.random.default_rng(position))["view_1"]
        seen.add(view.tobytes())
    assert len(seen) == kinds
    assert (np.ascontiguousarray(plain[:, ::-1]).tobytes() in seen) == (flip > 0)


def test_both_views_lie_in_one_window(
    make_jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = TwoViews(32, (0.02, 0.05), (0.5, 1.0), (3 / 4, 4 / 3), 0.5, 0.0, (Colour(), Colour()))
    cut = Picture.cut
    boxes: list[tuple[float, float, float, float]] = []

    def note(
        picture: Picture,
        wanted: Sequence[tuple[float, float, float, float]],
        size: tuple[int, int] | int,
    ) -> list[npt.NDArray[np.uint8]]:
        boxes.extend(wanted)
        return cut(picture, wanted, size)

    monkeypatch.setattr(Picture, "cut", note)
    data = make_jpeg(1, 400, 300)
    for position in range(30):
        boxes.clear()
        views(open_picture(data), np.random.default_rng(position))
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        # 5 % of the area at the widest ratio: no side over 90 pixels.
        assert right - left <= 90
        assert bottom - top <= 90
