"""Random resized crops and flips: the geometry that the views of most tasks share.

A crop covers a random share of the picture's area with a random aspect ratio (Szegedy et al.,
"Going Deeper with Convolutions", arXiv 1409.4842, section 6; the values 0.08..1 and 3/4..4/3 are
the ones SimCLR uses, arXiv 2002.05709, appendix A).

It is the draw of torchvision's RandomResizedCrop: ten tries, then the largest centred crop whose
ratio is allowed. Edges are whole pixels, which are cut faster than fractions of one.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from groundwork.errors import UsageError

_TRIES = 10


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("two numbers are wanted, the smaller first")
    return values


# Shares of a picture's area, and width over height: from the first to the second.
AreaRange = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
    AfterValidator(_ordered),
]
RatioRange = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)
]


def draw_crop(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[float, float, float, float]:
    """Draw a box (left, top, right, bottom) of whole pixels inside a width x height picture.

    `scale` bounds the share of the picture's area, drawn uniformly; `ratio` bounds width over
    height, drawn uniformly in its logarithm; both are met to within the rounding to pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(low, high))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            left = int(generator.integers(0, width - wide + 1))
            top = int(generator.integers(0, height - tall + 1))
            return _box(left, top, wide, tall)
    wide = max(1, min(width, round(height * ratio[1])))
    tall = max(1, min(height, round(width / ratio[0])))
    return _box((width - wide) // 2, (height - tall) // 2, wide, tall)


def _box(left: int, top: int, width: int, height: int) -> tuple[float, float, float, float]:
    return float(left), float(top), float(left + width), float(top + height)


class Turn(NamedTuple):
    """A view is mirrored left to right, and then turned counter-clockwise by quarter turns."""

    mirrored: bool
    quarters: int

    def of_view(self, view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return a view (H W 3), turned; it may share its pixels."""
        return np.rot90(view[:, ::-1] if self.mirrored else view, self.quarters)

    def of_points(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return points (K 2: x and y, 0 to 1 in the view), turned as the view is."""
        if self.mirrored:
            points = points * [-1, 1] + [1, 0]
        for _ in range(self.quarters):
            points = np.stack((points[:, 1], 1 - points[:, 0]), 1)
        return points


def draw_turn(flip: float, rotate: float, generator: np.random.Generator) -> Turn:
    """Draw whether a view is mirrored, and whether it is turned, by 90, 180 or 270 degrees."""
    mirrored = bool(generator.random() < flip)
    turned = generator.random() < rotate
    return Turn(mirrored, int(generator.integers(1, 4)) if turned else 0)


def in_view(
    boxes: npt.NDArray[np.float32],
    width: int,
    height: int,
    view: tuple[float, float, float, float],
    turn: Turn,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return where boxes of a width x height picture lie in a turned view of it.

    `boxes` (K 4) are shares of the picture's sides, and become shares of the view's, clipped to it;
    beside them K shares of their areas that the view shows.
    """
    sides = np.array([width, height], np.float32)
    corner, size = np.array(view[:2], np.float32), np.array(view[2:], np.float32) - view[:2]
    points = (boxes.reshape(-1, 2, 2) * sides - corner) / size  # in shares of the view
    seen = points.clip(0, 1)
    whole = (points[:, 1] - points[:, 0]).prod(1)
    shown = (seen[:, 1] - seen[:, 0]).prod(1) / np.maximum(whole, np.finfo(np.float32).tiny)
    turned = turn.of_points(seen.reshape(-1, 2)).reshape(-1, 2, 2)
    ends = np.concatenate((turned.min(1), turned.max(1)), 1)
    return ends.astype(np.float32), shown.astype(np.float32)


def check_side(image_size: int, who: str) -> None:
    """Raise UsageError where no backbone takes this side; `who` is "<task> needs", for a person."""
    if image_size < 32 or image_size % 32:
        raise UsageError(f"image_size={image_size}: {who} a side that is a multiple of 32.")
