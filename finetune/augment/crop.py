"""A crop that keeps boxes: objects larger, and cut at other places.

Source: SSD (Liu et al., arXiv 1512.02325, section 2.2): of each picture a patch of 0.1 to 1 of its
size, with an aspect of 1/2 to 2, so that the overlap with an object is at least 0.1, 0.3, 0.5, 0.7
or 0.9, or any.

Differs from the paper: the overlap is the share of the object's own area that lies in the patch,
not the Jaccard index, which no small object reaches with any patch; boxes survive by the rule of
boxes.py, not by where their centre lies. The whole picture, one of the paper's choices, is what is
left when `prob` is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.augment.boxes import Rule, area, moved, overlap, scaled
from finetune.augment.contract import Item, Source, checked
from finetune.augment.warp import resized

_TRIES = 40  # then the picture stays whole


class RandomCrop:
    """Cuts a patch of which some box keeps a drawn part, with the probability `prob`.

    `overlaps` are the parts, one of which is drawn; `scale` bounds the patch's share of the area,
    `aspect` its width over height, as factors of the picture's. The patch is resized so that its
    longer side is max(source.size), as the chain's input is. Of a picture without boxes, or of
    crowds alone, any patch will do.
    """

    def __init__(
        self,
        prob: float = 0.5,
        overlaps: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        scale: tuple[float, float] = (0.1, 1.0),
        aspect: tuple[float, float] = (0.5, 2.0),
        *,
        rule: Rule | None = None,
    ) -> None:
        self.prob = checked("prob", prob)
        self.overlaps = tuple(overlaps)
        self.scale = scale
        self.aspect = aspect
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the patch, or the item as it is."""
        generator = source.generator
        if generator.random() >= self.prob:
            return item
        part = self.overlaps[int(generator.integers(len(self.overlaps)))]
        for _ in range(_TRIES):
            window = self._draw(item, generator)
            if window is None:
                continue
            left, top, right, bottom = window
            wide, tall = right - left, bottom - top
            factor = max(source.size) / max(wide, tall)
            size = max(1, round(tall * factor)), max(1, round(wide * factor))
            boxes = scaled(moved(item.boxes, -left, -top), size[1] / wide, size[0] / tall)
            boxes, kept = self.rule.clip(boxes, (0, 0, size[1], size[0]), item.classes)
            inside = overlap(item.boxes, window) >= part * area(item.boxes)
            objects = item.classes >= 0
            if not objects.any() or (inside & kept & objects).any():
                pixels = resized(item.pixels[top:bottom, left:right], size)
                return replace(item, pixels=pixels, boxes=boxes[kept], classes=item.classes[kept])
        return item

    def _draw(self, item: Item, generator: np.random.Generator) -> tuple[int, int, int, int] | None:
        """Draw a window of whole pixels; None where it does not fit."""
        height, width = item.pixels.shape[:2]
        share = generator.uniform(*self.scale)
        aspect = math.exp(generator.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
        wide, tall = (
            round(width * math.sqrt(share * aspect)),
            round(height * math.sqrt(share / aspect)),
        )
        if not (0 < wide <= width and 0 < tall <= height):
            return None
        left = int(generator.integers(width - wide + 1))
        top = int(generator.integers(height - tall + 1))
        return left, top, left + wide, top + tall
