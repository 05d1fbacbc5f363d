"""What pretext_tasks.crops promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from groundwork.errors import UsageError
from pretext_tasks.crops import Turn, check_side, draw_crop, draw_turn

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
DRAWS = 4000


def ours(width: int, height: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    generator = np.random.default_rng(1)
    return np.array([draw_crop(width, height, SCALE, RATIO, generator) for _ in range(DRAWS)])


def torchvisions(width: int, height: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    picture = torch.empty(1, height, width)
    boxes = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(DRAWS):
            top, left, tall, wide = RandomResizedCrop.get_params(picture, list(SCALE), list(RATIO))
            boxes.append((left, top, left + wide, top + tall))
    return np.array(boxes, np.float64)


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (900, 300), (500, 500)])
def test_area_ratio_and_place_are_distributed_as_torchvisions(width: int, height: int) -> None:
    quantiles = np.linspace(0.05, 0.95, 19)
    measured = []
    for boxes in (ours(width, height), torchvisions(width, height)):
        left, top, right, bottom = boxes.T
        measured.append(
            {
                "area": np.quantile((right - left) * (bottom - top) / (width * height), quantiles),
                "ratio": np.quantile(np.log((right - left) / (bottom - top)), quantiles),
                "centre x": np.quantile((left + right) / 2 / width, quantiles),
                "centre y": np.quantile((top + bottom) / 2 / height, quantiles),
            }
        )
    # The standard error of a quantile of 4000 draws is below 0.008 of a range of 1; of both, 0.012.
    for name, one in measured[0].items():
        assert np.abs(one - measured[1][name]).max() < 0.04, name


def test_every_crop_is_of_whole_pixels_inside_and_keeps_its_bounds() -> None:
    generator = np.random.default_rng(2)
    for width, height in [(640, 480), (1, 1), (33, 100), (2, 20000)]:
        for _ in range(500):
            left, top, right, bottom = draw_crop(width, height, SCALE, RATIO, generator)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert all(edge.is_integer() for edge in (left, top, right, bottom))
            wide, tall = right - left, bottom - top
            assert (wide - 0.5) / (tall + 0.5) <= RATIO[1] + 1e-9
            assert (wide + 0.5) / (tall - 0.5) >= RATIO[0] - 1e-9


def test_after_ten_tries_the_largest_centred_crop_is_taken() -> None:
    generator = np.random.default_rng(3)
    # 20000 x 2: a crop of half the area is never as square as 3/4..4/3; 2 * 4/3 rounds to 3.
    assert draw_crop(20000, 2, (0.5, 1), (0.75, 4 / 3), generator) == (9998, 0, 10001, 2)
    assert draw_crop(2, 20000, (0.5, 1), (0.5, 2), generator) == (0, 9998, 2, 10002)
    # The ratio is allowed but more than the whole is asked for: the whole.
    assert draw_crop(40, 40, (1.5, 2), (0.75, 4 / 3), generator) == (0, 0, 40, 40)


def test_the_generator_alone_decides() -> None:
    boxes = [draw_crop(640, 480, SCALE, RATIO, np.random.default_rng(4)) for _ in range(2)]
    assert boxes[0] == boxes[1]
    assert boxes[0] != draw_crop(640, 480, SCALE, RATIO, np.random.default_rng(5))


def test_views_are_mirrored_and_turned_as_often_as_is_asked() -> None:
    generator = np.random.default_rng(6)
    turns = [draw_turn(0.5, 0.75, generator) for _ in range(4000)]
    assert abs(np.mean([turn.mirrored for turn in turns]) - 0.5) < 0.05
    for quarters in range(4):
        assert abs(np.mean([turn.quarters == quarters for turn in turns]) - 0.25) < 0.03
    assert {draw_turn(0.0, 0.0, generator) for _ in range(50)} == {Turn(False, 0)}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_points_turn_as_views_do(mirrored: bool, quarters: int) -> None:
    view = np.zeros((4, 4, 3), np.uint8)
    view[0, 2] = 1
    turn = Turn(mirrored, quarters)
    x, y = (turn.of_points(np.array([[2.5, 0.5]]) / 4)[0] * 4).astype(int)
    assert turn.of_view(view)[y, x, 0] == 1


def test_a_side_that_no_backbone_takes_is_refused() -> None:
    check_side(64, "this needs")
    for side in (0, 31, 100):
        with pytest.raises(UsageError, match=f"image_size={side}: this needs a side"):
            check_side(side, "this needs")
