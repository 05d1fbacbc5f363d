"""Pixels resized, cut, mirrored, turned and warped.

Where a map only scales and moves, its window is cut at whole pixels and resized by torch, whose
antialiased kernel for bytes is the fastest at hand. Where it turns or shears, torch samples it,
bilinear, in three fifths of Pillow's time. Such samples are not antialiased: below 3/4 of its size
a picture is first resized to the scale at which it will be seen.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from finetune.augment.boxes import Matrix

GREY = 114

_ANTIALIASED_UNDER = 0.75

Pixels = npt.NDArray[np.uint8]  # H W C, most often 3


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
    window = np.full((height, width, pixels.shape[2]), GREY, np.uint8)
    first, last = max(left, 0), min(right, full_width)
    upper, lower = max(top, 0), min(bottom, full_height)
    if first < last and upper < lower:
        window[upper - top : lower - top, first - left : last - left] = pixels[
            upper:lower, first:last
        ]
    return window


def mirrored(pixels: Pixels, axis: int) -> Pixels:
    """Reverse rows (0) or columns (1); torch's kernel takes a tenth of the time of numpy's."""
    result: Pixels = torch.from_numpy(pixels).flip(axis).numpy()
    return result


def turned(pixels: Pixels, quarters: int) -> Pixels:
    """Turn by 1, 2 or 3 quarters, counter-clockwise; Pillow's takes a third of numpy's time."""
    if pixels.shape[2] != 3:
        return np.ascontiguousarray(np.rot90(pixels, quarters))
    how = {
        1: Image.Transpose.ROTATE_90,
        2: Image.Transpose.ROTATE_180,
        3: Image.Transpose.ROTATE_270,
    }[quarters]
    return np.array(Image.fromarray(pixels).transpose(how))


def warped(pixels: Pixels, matrix: Matrix, size: tuple[int, int]) -> Pixels:
    """Map a picture, by a 2 x 3 matrix from its points to the result's, to size (height, width)."""
    inverse = np.linalg.inv(matrix[:, :2])
    start = -inverse @ matrix[:, 2]
    # Only what is seen is converted.
    corners = np.array([[0, 0], [size[1], 0], [0, size[0]], [size[1], size[0]]]) @ inverse.T + start
    low = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 1, pixels.shape[1::-1])
    if (low >= high).any():
        return np.full((*size, pixels.shape[2]), GREY, np.uint8)
    part = pixels[low[1] : high[1], low[0] : high[0]]
    whole = np.array(part.shape[1::-1])
    factor = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if factor < _ANTIALIASED_UNDER:
        tall, wide = (max(1, round(side * factor)) for side in part.shape[:2])
        part = resized(part, (tall, wide))
    # torch's coordinates: -1 and 1 are the outer edges of the picture that is sampled.
    unit = (2 / whole)[:, None]
    grid = _grid(inverse * unit, (start - low) * unit[:, 0] - 1, size)
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    # Less the grey, so that beyond its edges, where the sampler reads 0, lies grey.
    values = planes.to(torch.float32, memory_format=torch.contiguous_format).sub_(GREY)
    sampled = functional.grid_sample(values, grid, mode="bilinear", align_corners=False)[0]
    rounded = sampled.add_(GREY + 0.5).to(torch.uint8)
    result: Pixels = rounded.permute(1, 2, 0).contiguous().numpy()
    return result


def _grid(linear: Matrix, start: Matrix, size: tuple[int, int]) -> Tensor:
    """Return where each pixel of the result is read, 1 H W 2, by a linear map of its centre."""
    across = np.arange(size[1], dtype=np.float32) + np.float32(0.5)
    down = np.arange(size[0], dtype=np.float32) + np.float32(0.5)
    slopes, first = linear.astype(np.float32), start.astype(np.float32)
    grid = np.empty((1, *size, 2), np.float32)
    for axis in (0, 1):
        grid[0, :, :, axis] = slopes[axis, 0] * across + first[axis]
        grid[0, :, :, axis] += (slopes[axis, 1] * down)[:, None]
    return torch.from_numpy(grid)
