"""Mosaic, MixUp, CutMix, GridMask and crops: how pictures are laid, blended, hidden and cut."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.augment import (
    CutMix,
    GridMask,
    Item,
    MixUp,
    Mosaic,
    RandomAffine,
    RandomCrop,
)
from finetune.augment.contract import Compose
from tests.finetune.augment.drawn import FIRST, SIZE, Dealer, picture, run

GREY = 114


def plain(value: int, height: int, width: int) -> Item:
    pixels = np.full((height, width, 3), value, np.uint8)
    return Item(pixels, np.array([[0, 0, width, height]], np.float32), np.array([value]))


class Plain(Dealer):
    """Deals out plain pictures of the values 1, 2, 3 ..., each of the same shape."""

    shape = SIZE

    def other(self) -> Item:
        self.dealt += 1
        return plain(self.dealt, *self.shape)


@pytest.mark.parametrize(("tiles", "others"), [(4, 3), (9, 8)])
def test_a_mosaic_shows_all_its_pictures_on_a_canvas_of_twice_the_size(
    tiles: int, others: int
) -> None:
    for seed in range(10):
        source = Plain(seed)
        item = Mosaic(1.0, 9 if tiles == 9 else 4)(plain(200, *SIZE), source)
        assert source.dealt == others
        assert item.pixels.shape == (2 * SIZE[0], 2 * SIZE[1], 3)
        assert set(np.unique(item.pixels)) - {GREY} == {200, *range(1, others + 1)}


def test_the_point_in_which_four_pictures_meet_lies_in_the_middle_half() -> None:
    meets = []
    for seed in range(200):
        canvas = Mosaic(1.0)(plain(200, *SIZE), Plain(seed)).pixels[:, :, 0]
        rows, columns = np.nonzero(canvas == 200)
        meets.append((rows.max() + 1, columns.max() + 1))
    low, high = np.min(meets, axis=0), np.max(meets, axis=0)
    assert (low >= SIZE[0] / 2).all()
    assert (high <= 1.5 * SIZE[0]).all()
    assert (high - low > 0.9 * SIZE[0]).all()


def test_flat_pictures_fill_most_of_the_window_that_is_seen() -> None:
    class Flat(Plain):
        shape = (48, 96)

    def grey(seed: int) -> float:
        canvas = Mosaic(1.0)(plain(200, 48, 96), Flat(seed)).pixels
        window = canvas[SIZE[0] // 2 : 3 * SIZE[0] // 2, SIZE[1] // 2 : 3 * SIZE[1] // 2]
        return float((window == GREY).mean())

    # Alone, such a picture leaves half of the frame grey.
    assert np.mean([grey(seed) for seed in range(100)]) < 0.2
    assert max(grey(seed) for seed in range(100)) <= 0.27


def test_a_window_out_of_a_mosaic_shows_objects_at_the_drawn_scale() -> None:
    alone, joined = [], []
    chain = Compose([Mosaic(1.0), RandomAffine(0, (0.5, 0.5), 0.0, 0.0)])
    for seed in range(30):
        item = run(chain, seed)
        sides = dict(zip(item.classes.tolist(), item.boxes[:, 2] - item.boxes[:, 0], strict=True))
        first = picture(FIRST)
        joined.append(sides.get(10 * FIRST + 3))
        alone.append(first.boxes[3, 2] - first.boxes[3, 0])
    shown = [one / two for one, two in zip(joined, alone, strict=True) if one is not None]
    assert np.median(shown) == pytest.approx(0.5)


def test_mixup_blends_with_the_drawn_weight_and_keeps_all_boxes() -> None:
    weights = []
    for seed in range(300):
        item = MixUp(1.0, 32.0)(plain(200, *SIZE), Plain(seed))
        assert item.classes.tolist() == [200, 1]
        value = int(item.pixels[0, 0, 0])
        assert (item.pixels == value).all()
        weights.append((value - 1) / 199)
    assert np.mean(weights) == pytest.approx(0.5, abs=0.02)
    # Beta(32, 32) has the variance 1 / (4 * 65).
    assert np.std(weights) == pytest.approx(0.062, abs=0.01)


def test_mixup_centres_both_pictures_and_darkens_neither() -> None:
    class Tall(Plain):
        shape = (96, 48)

    item = MixUp(1.0)(plain(200, 48, 96), Tall(0))
    assert item.pixels.shape == (96, 96, 3)
    assert (item.pixels[24:72, :24] == 200).all()
    assert (item.pixels[:24, 24:72] == 1).all()
    assert (item.pixels[:24, :24] == GREY).all()
    assert 1 < item.pixels[48, 48, 0] < 200
    assert item.boxes.tolist() == [[0, 24, 96, 72], [24, 0, 72, 96]]


def test_cutmix_pastes_a_rectangle_of_the_drawn_share() -> None:
    shares = []
    for seed in range(300):
        item = CutMix(1.0)(plain(200, *SIZE), Plain(seed))
        pasted = item.pixels[:, :, 0] == 1
        shares.append(pasted.mean())
        if 0.3 < pasted.mean() < 0.7:  # both boxes survive
            rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
            assert item.boxes[-1].tolist() == [
                columns[0],
                rows[0],
                columns[-1] + 1,
                rows[-1] + 1,
            ]
    # The other's box is kept from a quarter on; Beta(1, 1) is uniform.
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.quantile(shares, 0.25) == pytest.approx(0.25, abs=0.07)


def test_gridmask_hides_the_share_that_its_ratio_says() -> None:
    for ratio in (0.4, 0.6, 0.8):
        hidden = [
            (GridMask(1.0, ratio, (0.1, 0.25))(plain(9, *SIZE), Dealer(seed)).pixels == GREY).mean()
            for seed in range(100)
        ]
        assert np.mean(hidden) == pytest.approx((1 - ratio) ** 2, abs=0.03)


def test_gridmask_drops_only_what_it_hides() -> None:
    boxes = np.array([[x, y, x + 3, y + 3] for x in range(96 - 3) for y in range(0, 93, 7)])
    item = Item(np.zeros((*SIZE, 3), np.uint8), boxes.astype(np.float32), np.arange(len(boxes)))
    result = GridMask(1.0, 0.5, (0.3, 0.3))(item, Dealer(3))
    for label, (left, top, right, bottom) in enumerate(boxes.tolist()):
        visible = (result.pixels[top:bottom, left:right, 0] == 0).mean()
        assert (label in result.classes) == (visible >= 0.25)
    assert 0 < len(result.classes) < len(boxes)


def test_a_crop_keeps_a_box_and_makes_the_picture_as_large_as_before() -> None:
    areas = []
    for seed in range(60):
        item = run(RandomCrop(1.0), seed)
        assert len(item.boxes)
        assert max(item.pixels.shape) == max(SIZE)
        areas.append((item.boxes[:, 2] - item.boxes[:, 0]).max())
    assert max(areas) > 1.5 * min(areas)


def test_a_crop_in_which_no_box_can_be_kept_is_not_made() -> None:
    pixels = np.zeros((*SIZE, 3), np.uint8)
    item = Item(pixels, np.array([[0, 0, 1, 1]], np.float32), np.zeros(1, np.int64))
    assert RandomCrop(1.0, scale=(0.1, 0.2))(item, Dealer(0)) is item
