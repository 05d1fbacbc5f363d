"""Pictures resized, cut and warped: each in one resampling, boxes with it.

Where a map only scales and moves, its window is cut at whole pixels and resized by torch, whose
antialiased kernel for bytes is the fastest at hand; where it turns or shears, Pillow samples it,
bilinear. Pillow's samples are not antialiased: shrinking by half and turning at once shows a
little aliasing, as in the detectors that use OpenCV for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from finetune.augment.boxes import Matrix

GREY = 114

Pixels = npt.NDArray[np.uint8]  # H W 3


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize to (height, width): bilinear, antialiased; the same pixels where nothing changes."""
    if pixels.shape[:2] == size:
        return pixels
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    result = functional.interpolate(batch, size=size, mode="bilinear", antialias=True)
    smaller: Pixels = result[0].permute(1, 2, 0).numpy()
    return smaller


def cut(pixels: Pixels, left: int, top: int, width: int, height: int) -> Pixels:
    """Cut a window out, grey where it leaves the picture; a view where it does not."""
    full_height, full_width = pixels.shape[:2]
    right, bottom = left + width, top + height
    if left >= 0 and top >= 0 and right <= full_width and bottom <= full_height:
        return pixels[top:bottom, left:right]
    window = np.full((height, width, 3), GREY, np.uint8)
    first, last = max(left, 0), min(right, full_width)
    upper, lower = max(top, 0), min(bottom, full_height)
    if first < last and upper < lower:
        window[upper - top : lower - top, first - left : last - left] = pixels[
            upper:lower, first:last
        ]
    return window


def warped(pixels: Pixels, matrix: Matrix, size: tuple[int, int]) -> Pixels:
    """Sample a picture of size (height, width) by a map from its points to those of the result."""
    inverse = np.linalg.inv(matrix[:, :2])
    start = -inverse @ matrix[:, 2]
    # Only what is seen is handed to Pillow, which stores four bytes a pixel.
    corners = np.array([[0, 0], [size[1], 0], [0, size[0]], [size[1], size[0]]]) @ inverse.T + start
    low = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 1, pixels.shape[1::-1])
    if (low >= high).any():
        return np.full((*size, 3), GREY, np.uint8)
    image = Image.fromarray(pixels[low[1] : high[1], low[0] : high[0]])
    start = start - low
    sampled = image.transform(
        (size[1], size[0]),
        Image.Transform.AFFINE,
        (*inverse[0], start[0], *inverse[1], start[1]),
        resample=Image.Resampling.BILINEAR,
        fillcolor=(GREY, GREY, GREY),
    )
    return np.array(sampled)
