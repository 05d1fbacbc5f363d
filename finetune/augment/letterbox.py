"""A picture in a frame of a given size: scaled with its aspect kept, centred, grey around it.

Training ends with it; evaluation frames pictures in the same scale (finetune/finder.py), so that
both see objects in the same shape.
The grey is 114 of 255, as detectors of the YOLO family pad with: about the mean of natural
pictures, so that the frame is nearly zero once it is normalised.

The picture is placed at whole pixels, and its sides are rounded to whole pixels, which moves the
far edge of its shorter side by up to half a pixel against `scale`; boxes follow `scale` alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.augment.boxes import Boxes, Rule, moved, scaled
from finetune.augment.warp import GREY, Pixels, resized
from groundwork.data.decode import Picture

if TYPE_CHECKING:
    from finetune.augment.contract import Item, Source


class Geometry(NamedTuple):
    """Where a picture lies in its frame: framed = picture * scale + (left, top), in pixels."""

    scale: float
    left: int
    top: int

    def apply(self, boxes: Boxes) -> Boxes:
        """Bring boxes of the picture into the frame."""
        return moved(scaled(boxes, self.scale, self.scale), self.left, self.top)

    def shown(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) in the frame of a picture of this width and height."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


def letterbox_geometry(width: int, height: int, size: tuple[int, int]) -> Geometry:
    """Return scale, left and top of a width x height picture in a frame of size (height, width)."""
    scale = min(size[0] / height, size[1] / width)
    shown = Geometry(scale, 0, 0).shown(width, height)
    return Geometry(scale, (size[1] - shown[1]) // 2, (size[0] - shown[0]) // 2)


def letterboxed(picture: Picture, size: tuple[int, int]) -> tuple[Pixels, Geometry]:
    """Show a whole picture in a grey frame of size (height, width): uint8 H W C, and where it is.

    Raises DataError for pixels that cannot be decoded.
    """
    geometry = letterbox_geometry(picture.width, picture.height, size)
    [inner] = picture.cut([picture.whole], geometry.shown(picture.width, picture.height))
    frame = np.full((*size, inner.shape[2]), GREY, np.uint8)
    bottom, right = geometry.top + inner.shape[0], geometry.left + inner.shape[1]
    frame[geometry.top : bottom, geometry.left : right] = inner
    return frame, geometry


def framed(
    pixels: npt.NDArray[np.uint8], geometry: Geometry, size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Put a picture (uint8 H W C) into its frame of size (height, width); contiguous."""
    height, width = geometry.shown(pixels.shape[1], pixels.shape[0])
    inner = resized(pixels, (height, width))
    if (height, width) == size:
        return np.ascontiguousarray(inner)
    frame = np.full((*size, inner.shape[2]), GREY, np.uint8)
    frame[geometry.top : geometry.top + height, geometry.left : geometry.left + width] = inner
    return frame


class Letterbox:
    """Brings an item to source.size; the boxes that `rule` names survive."""

    def __init__(self, rule: Rule | None = None) -> None:
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item in its frame."""
        height, width = item.pixels.shape[:2]
        geometry = letterbox_geometry(width, height, source.size)
        area = geometry.apply(np.array([[0, 0, width, height]], np.float32))[0]
        boxes, kept = self.rule.clip(
            geometry.apply(item.boxes), (area[0], area[1], area[2], area[3]), item.classes
        )
        return replace(
            item,
            pixels=framed(item.pixels, geometry, source.size),
            boxes=boxes[kept],
            classes=item.classes[kept],
        )
