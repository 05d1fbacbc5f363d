"""Colour: numbers only, and the numbers are those of groundwork.colour."""

from __future__ import annotations

import numpy as np
import torch

from finetune.augment import HSV, ColorJitter
from finetune.augment.contract import Item, unchanged_colour
from groundwork.colour import apply
from tests.finetune.augment.drawn import Dealer, picture

BLACK_WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def shown(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], colour: object) -> torch.Tensor:
    return apply(torch.from_numpy(pixels)[None], torch.as_tensor(colour)[None], *BLACK_WHITE)[0]


def soft() -> Item:
    """Colours so far from black and white that nothing is clamped."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(100, 150, (8, 8, 3), dtype=np.uint8)
    return Item(pixels, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


def test_the_pixels_are_the_same_and_the_parameters_are_not() -> None:
    item = picture(0)
    changed = ColorJitter(hue=0.1, saturation=0.4, brightness=0.3)(item, Dealer(0))
    assert changed.pixels is item.pixels
    assert not np.allclose(changed.colour, item.colour)


def test_unchanged_colour_changes_nothing() -> None:
    item = soft()
    expected = torch.from_numpy(item.pixels).permute(2, 0, 1) / 255
    assert torch.allclose(shown(item.pixels, unchanged_colour()), expected, atol=1e-6)


def test_brightness_alone_multiplies_by_what_its_strength_allows() -> None:
    factors = []
    for seed in range(200):
        colour = ColorJitter(0.0, 0.0, 0.3)(soft(), Dealer(seed)).colour
        chain = colour[:18].reshape(3, 6)
        assert np.allclose(chain, chain[0, 0] * np.eye(3, 6), atol=1e-6)
        factors.append(float(chain[0, 0]))
    assert 0.7 <= min(factors) < 0.72
    assert 1.28 < max(factors) <= 1.3


def test_two_in_one_chain_are_one_after_the_other() -> None:
    item = soft()
    for seed in range(10):
        first = ColorJitter(0.1, 0.4, 0.1, 0.4)
        second = ColorJitter(0.05, 0.3, 0.1, 0.3)
        source = Dealer(seed)
        once = first(item, source)
        both = second(once, source)
        again = Dealer(seed)
        first(item, again)
        alone = second(item, again)
        between = shown(item.pixels, once.colour)
        # What the second sees of the first's result: not rounded to bytes, as in one chain.
        mean = between.mean(dim=(1, 2))
        chain = torch.from_numpy(alone.colour[:18].reshape(3, 6))
        expected = torch.einsum("ij,jhw->ihw", chain[:, :3], between)
        expected += (chain[:, 3:] @ mean)[:, None, None]
        assert torch.allclose(shown(item.pixels, both.colour), expected, atol=1e-5)


def test_hsv_at_its_usual_strengths_moves_value_by_up_to_two_fifths() -> None:
    grey = Item(np.full((4, 4, 3), 100, np.uint8), *(picture(0).boxes, picture(0).classes))
    values = [
        float(shown(grey.pixels, HSV()(grey, Dealer(seed)).colour).mean()) for seed in range(200)
    ]
    # Hue and saturation leave grey as it is.
    assert 0.6 <= min(values) * 2.55 < 0.63
    assert 1.37 < max(values) * 2.55 <= 1.4001
