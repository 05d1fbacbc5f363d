"""A chain called outside of training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from finetune.augment import (
    ColorJitter,
    Compose,
    CutMix,
    GridMask,
    Item,
    MixUp,
    Mosaic,
    Pictures,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
)


def red(side: int) -> Item:
    """A black picture, twice as wide as high, with a red square in its middle."""
    pixels = np.zeros((side, 2 * side, 3), np.uint8)
    low, high = side // 4, side // 2
    pixels[low:high, low:high, 0] = 255
    box = np.array([[low, low, high, high]], np.float32)
    return Item(pixels, box, np.array([3]))


def test_a_chain_of_nothing_brings_a_picture_to_its_size() -> None:
    item = Pictures([red(32)], size=(128, 128)).seen(Compose([]), 0)
    assert item.pixels.shape == (128, 128, 3)
    # Twice as large, 32 pixels of grey above.
    assert item.boxes.tolist() == [[16, 48, 32, 64]] and item.classes.tolist() == [3]
    assert item.pixels[56, 24].tolist() == [255, 0, 0] and item.pixels[0, 0].tolist() == [114] * 3


def test_the_seed_decides() -> None:
    chain = Compose([Mosaic(prob=1.0), RandomAffine()])
    one, same, other = (
        Pictures([red(32), red(64)], size=(64, 64), seed=seed).seen(chain, 0) for seed in (0, 0, 1)
    )
    assert np.array_equal(one.pixels, same.pixels) and np.array_equal(one.boxes, same.boxes)
    assert not np.array_equal(one.pixels, other.pixels)


def test_colours_are_in_the_pixels() -> None:
    chain = Compose([ColorJitter(hue=0.5, saturation=0.0, brightness=0.0)])
    item = Pictures([red(32)], size=(128, 128), seed=0).seen(chain, 0)
    red_now, green, blue = item.pixels[56, 24].astype(int).tolist()
    assert max(green, blue) > 100 and red_now < 200
    assert item.pixels[0, 0].tolist() == pytest.approx([114] * 3, abs=2)  # grey has no hue


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Mosaic(prob=5), "prob=5 is not between 0 and 1"),
        (lambda: MixUp(prob=-1), "prob=-1"),
        (lambda: MixUp(alpha=0), "alpha=0"),
        (lambda: CutMix(alpha=-2), "alpha=-2"),
        (lambda: GridMask(ratio=2), "ratio=2"),
        (lambda: RandomAffine(shear=90), "shear=90"),
        (lambda: RandomAffine(translate=3), "translate=3"),
        (lambda: RandomCrop(prob=1.01), "prob=1.01"),
        (lambda: RandomHorizontalFlip(p=2), "p=2"),
        (lambda: Pictures([], (64, 64)), "one item at least"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
