"""Two pictures in one: MixUp blends them, CutMix pastes a part of one into the other.

Neither picture is resized: an object keeps the size at which it would be seen alone. All boxes that
survive count in full; what the blend's weight or the pasted share would say of a whole picture's
class says little of the objects in it.

A picture mixed from two has the first one's colour parameters, so that it is distorted as one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from finetune.augment.boxes import Boxes, Rule, area, moved, overlap, uncovered
from finetune.augment.contract import Item, Source, checked
from finetune.augment.warp import GREY, Pixels


class MixUp:
    """Blends the item with another picture, with the probability `prob`.

    Sources: Zhang et al., arXiv 1710.09412; for detection, with the geometry of both pictures kept,
    Zhang et al., "Bag of Freebies", arXiv 1902.04103, section 3.1. The item's weight is drawn from
    Beta(alpha, alpha); 32, which the YOLO family uses, keeps it near a half.

    The result is as high as the higher of the two, as wide as the wider; both lie centred in it, so
    that in a mosaic's canvas the other picture lies where RandomAffine looks.

    Differs from Bag of Freebies: alpha (1.5 there); pictures are centred, not aligned at a corner;
    where one of them alone lies it is not darkened; losses are not weighted.
    """

    def __init__(self, prob: float = 0.2, alpha: float = 32.0) -> None:
        self.prob = checked("prob", prob)
        self.alpha = checked("alpha", alpha, 1e-3, 1e6)

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the blend, or the item as it is."""
        if source.generator.random() >= self.prob:
            return item
        other = source.other()
        weight = float(source.generator.beta(self.alpha, self.alpha))
        height = max(item.pixels.shape[0], other.pixels.shape[0])
        width = max(item.pixels.shape[1], other.pixels.shape[1])
        frame = np.full((height, width, item.pixels.shape[2]), GREY, np.uint8)
        _centred(frame, other.pixels)[:] = other.pixels
        _centred(frame, item.pixels)[:] = item.pixels
        both = _centred(frame, other.pixels)
        both[:] = _blend(both, other.pixels, weight)
        boxes = [_moved_to_centre(one, width, height) for one in (item, other)]
        return replace(
            item,
            pixels=frame,
            boxes=np.concatenate(boxes),
            classes=np.concatenate([item.classes, other.classes]),
        )


class CutMix:
    """Pastes a rectangle of another picture into the item, with the probability `prob`.

    Source: Yun et al., arXiv 1905.04899, section 3: the rectangle's share of the picture is 1 - x,
    x drawn from Beta(alpha, alpha), its place uniform. The other picture's boxes survive by `rule`
    against the rectangle; the item's by what the rectangle leaves to be seen of them, and end at it
    where it covers a whole side of theirs.

    Differs from the paper: the rectangle is taken from one place and put to another, both drawn,
    and lies inside both pictures; labels are boxes, not shares of classes.
    """

    def __init__(self, prob: float = 0.5, alpha: float = 1.0, *, rule: Rule | None = None) -> None:
        self.prob = checked("prob", prob)
        self.alpha = checked("alpha", alpha, 1e-3, 1e6)
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item with the other's part in it, or as it is."""
        generator = source.generator
        if generator.random() >= self.prob:
            return item
        other = source.other()
        share = math.sqrt(1 - generator.beta(self.alpha, self.alpha))
        height = round(share * min(item.pixels.shape[0], other.pixels.shape[0]))
        width = round(share * min(item.pixels.shape[1], other.pixels.shape[1]))
        if height < 1 or width < 1:
            return item
        top, upper = (
            int(generator.integers(one.pixels.shape[0] - height + 1)) for one in (item, other)
        )
        left, near = (
            int(generator.integers(one.pixels.shape[1] - width + 1)) for one in (item, other)
        )
        pixels = item.pixels.copy()
        pixels[top : top + height, left : left + width] = other.pixels[
            upper : upper + height, near : near + width
        ]
        cover = (left, top, left + width, top + height)
        whole = area(item.boxes)
        behind = uncovered(item.boxes, cover)
        seen = self.rule.keeps(behind, whole, whole - overlap(item.boxes, cover), item.classes)
        pasted, kept = self.rule.clip(
            moved(other.boxes, left - near, top - upper), cover, other.classes
        )
        return replace(
            item,
            pixels=pixels,
            boxes=np.concatenate([behind[seen], pasted[kept]]),
            classes=np.concatenate([item.classes[seen], other.classes[kept]]),
        )


def _centred(frame: Pixels, pixels: Pixels) -> Pixels:
    """Return the part of a frame that a picture covers when it lies centred; a view."""
    top, left = ((frame.shape[axis] - pixels.shape[axis]) // 2 for axis in (0, 1))
    return frame[top : top + pixels.shape[0], left : left + pixels.shape[1]]


def _moved_to_centre(item: Item, width: int, height: int) -> Boxes:
    tall, wide = item.pixels.shape[:2]
    return moved(item.boxes, (width - wide) // 2, (height - tall) // 2)


def _blend(first: Pixels, second: Pixels, weight: float) -> Pixels:
    """Return weight * first + (1 - weight) * second, rounded, in whole numbers of 1/256."""
    share = np.uint16(round(weight * 256))
    mixed = first * share + second * (np.uint16(256) - share) + np.uint16(128)
    return (mixed >> np.uint16(8)).astype(np.uint8)
