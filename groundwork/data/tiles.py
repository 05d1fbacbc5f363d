"""Where tiles lie on a large picture: evenly, each sharing a strip with the next."""

from __future__ import annotations

import math
from typing import NamedTuple


class Tile(NamedTuple):
    """An area of the picture, in whole pixels."""

    left: int
    top: int
    right: int
    bottom: int


def tiles_of(width: int, height: int, tile: int, overlap: float) -> list[Tile]:
    """Lay tiles over a picture, row by row: evenly, sharing at least `overlap` of their side.

    Each is tile x tile pixels, or as high (wide) as the picture where that is less.
    """
    return [
        Tile(left, top, min(left + tile, width), min(top + tile, height))
        for top in _starts(height, tile, overlap)
        for left in _starts(width, tile, overlap)
    ]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    if side <= tile:
        return [0]
    step = max(1, math.floor(tile * (1 - overlap)))
    steps = math.ceil((side - tile) / step)
    return [number * (side - tile) // steps for number in range(steps + 1)]
