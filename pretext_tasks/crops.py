"""Random resized crops and flips: the geometry that the views of most tasks share.

A crop covers a random share of the picture's area with a random aspect ratio (Szegedy et al.,
"Going Deeper with Convolutions", arXiv 1409.4842, section 6; the values 0.08..1 and 3/4..4/3 are
the ones SimCLR uses, arXiv 2002.05709, appendix A).

It is the draw of torchvision's RandomResizedCrop: ten tries, then the largest centred crop whose
ratio is allowed. Edges are whole pixels, which are cut faster than fractions of one.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_TRIES = 10


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


def draw_flip(probability: float, generator: np.random.Generator) -> bool:
    """Draw whether a view is flipped left to right."""
    return bool(generator.random() < probability)


def flip(view: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Flip a view (H W 3) left to right; contiguous."""
    return np.ascontiguousarray(view[:, ::-1])
