"""Flips and quarter turns: pixels change their places and none its value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from finetune.augment.contract import Item, Source, checked
from finetune.augment.warp import mirrored, turned


class RandomHorizontalFlip:
    """Flips left to right with the probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = checked("p", p)

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item, flipped or as it is."""
        if source.generator.random() >= self.p:
            return item
        boxes = item.boxes.copy()
        boxes[:, [0, 2]] = item.pixels.shape[1] - item.boxes[:, [2, 0]]
        return replace(item, pixels=mirrored(item.pixels, axis=1), boxes=boxes)


class RandomVerticalFlip:
    """Flips top to bottom with the probability `p`: for pictures that have no up."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = checked("p", p)

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item, flipped or as it is."""
        if source.generator.random() >= self.p:
            return item
        boxes = item.boxes.copy()
        boxes[:, [1, 3]] = item.pixels.shape[0] - item.boxes[:, [3, 1]]
        return replace(item, pixels=mirrored(item.pixels, axis=0), boxes=boxes)


class RandomQuarterTurn:
    """Turns by 90, 180 or 270 degrees, each as likely, with the probability `p`.

    For pictures that have no up, such as aerial ones and cells. Sides may change places: a picture
    that is not square is then letterboxed anew.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = checked("p", p)

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item, turned or as it is."""
        if source.generator.random() >= self.p:
            return item
        quarters = int(source.generator.integers(1, 4))  # counter-clockwise
        height, width = item.pixels.shape[:2]
        left, top, right, bottom = item.boxes.T
        edges = {
            1: (top, width - right, bottom, width - left),
            2: (width - right, height - bottom, width - left, height - top),
            3: (height - bottom, left, height - top, right),
        }[quarters]
        boxes = np.stack(edges, axis=1).astype(np.float32)
        return replace(item, pixels=turned(item.pixels, quarters), boxes=boxes)
