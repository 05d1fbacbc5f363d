"""A chain of transforms called on pictures at hand, outside of training.

    pictures = Pictures([Item(pixels, boxes, classes), ...], size=(640, 640), seed=0)
    item = pictures.seen(chain, 0)

What: `Pictures` is a Source over a list of items. Why: to look at what a chain of one's own does,
or to use it in a loop of one's own, without a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from finetune.augment.contract import Compose, Item, unchanged_colour
from finetune.augment.mosaic import scaled_item
from groundwork import colour


class Pictures:
    """A Source whose other pictures are drawn from a list; `size` is height and width of results.

    The same seed and the same calls give the same pictures.
    """

    def __init__(self, items: Sequence[Item], size: tuple[int, int], seed: int = 0) -> None:
        if not items:
            raise ValueError("Pictures needs one item at least.")
        self._items = [scaled_item(one, max(size) / max(one.pixels.shape[:2])) for one in items]
        self.size = size
        self.generator = np.random.default_rng(seed)

    def other(self) -> Item:
        """Return one of the items."""
        return self._items[int(self.generator.integers(len(self._items)))]

    def seen(self, chain: Compose, number: int) -> Item:
        """Return an item as training would see it: pixels of `size`, coloured, and their boxes."""
        item = chain(self._items[number], self)
        channels = item.pixels.shape[2]
        values = colour.apply(
            torch.from_numpy(item.pixels)[None], torch.from_numpy(item.colour)[None],
            [0.0] * channels, [1.0] * channels,
        )  # fmt: skip
        pixels = (values[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
        return replace(item, pixels=pixels.numpy(), colour=unchanged_colour())
