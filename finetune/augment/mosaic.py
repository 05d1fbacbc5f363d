"""Mosaic: four or nine pictures laid around random lines, on a canvas of twice the size.

Source: YOLOv4 (Bochkovskiy et al., arXiv 2004.10934, section 3.3): a detector sees objects outside
their usual surroundings, and each batch holds the statistics of four times its pictures.

The canvas is meant for RandomAffine, which takes a window of source.size from its middle: so one
sampling does for both, and the canvas ends in view only where it is shrunk by about a half. Without
RandomAffine the closing letterbox shrinks the canvas: every picture is then shown at half the size
(4) or a third (9).

Differs from the paper: pictures keep their aspect and the size at which they would be seen alone
(of nine, two thirds of it); what they leave free is grey.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from finetune.augment.boxes import Boxes, Mask, Rule, moved, scaled
from finetune.augment.contract import Item, Source, checked
from finetune.augment.warp import GREY, Pixels, resized


class Mosaic:
    """Lays `tiles` pictures, the item among them, on one canvas with the probability `prob`.

    Of four, the inner corners meet in a point about the middle, drawn as far from it as half a
    picture reaches; of nine, the item lies in the middle, and the lines about it are moved by up to
    an eighth of a picture. (Half a picture is half the frame for square ones. Flat pictures have
    their point drawn from less, or grey would fill more of what is seen than they do.) A box
    survives by `rule`, against its cell. The item's colour is that of the whole.
    """

    def __init__(
        self, prob: float = 0.5, tiles: Literal[4, 9] = 4, *, rule: Rule | None = None
    ) -> None:
        if tiles not in (4, 9):
            raise ValueError("tiles is 4 or 9.")
        self.prob = checked("prob", prob)
        self.tiles = tiles
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the canvas, 2 * source.size, or the item as it is."""
        if source.generator.random() >= self.prob:
            return item
        tiles = [item, *(source.other() for _ in range(self.tiles - 1))]
        if self.tiles == 9:
            tiles = [scaled_item(tile, 2 / 3) for tile in tiles]
            tiles[0], tiles[4] = tiles[4], tiles[0]
        shapes = np.array([tile.pixels.shape for tile in tiles])
        rows, columns = (
            _lines(2 * source.size[axis], shapes[:, axis].mean(), self.tiles, source.generator)
            for axis in (0, 1)
        )
        canvas = np.full((rows[-1], columns[-1], item.pixels.shape[2]), GREY, np.uint8)
        boxes, classes = [], []
        for cell, tile in enumerate(tiles):
            row, column = divmod(cell, len(columns) - 1)
            placed, kept = self._place(tile, canvas, (rows, row), (columns, column))
            boxes.append(placed[kept])
            classes.append(tile.classes[kept])
        joined, names = np.concatenate(boxes), np.concatenate(classes)
        return replace(item, pixels=canvas, boxes=joined, classes=names)

    def _place(
        self,
        tile: Item,
        canvas: Pixels,
        rows: tuple[list[int], int],
        columns: tuple[list[int], int],
    ) -> tuple[Boxes, Mask]:
        """Lay one picture into its cell; return its boxes there, and which of them survive."""
        height, width = tile.pixels.shape[:2]
        top, upper, lower = _stretch(*rows, height)
        left, near, far = _stretch(*columns, width)
        canvas[upper:lower, near:far] = tile.pixels[
            upper - top : lower - top, near - left : far - left
        ]
        return self.rule.clip(moved(tile.boxes, left, top), (near, upper, far, lower), tile.classes)


def _lines(length: int, mean: float, tiles: int, generator: np.random.Generator) -> list[int]:
    """Draw where one axis of the canvas is divided, its ends included.

    `mean` is the mean length of the pictures along it.
    """
    middle = length / 2
    if tiles == 4:
        inner = [middle + mean / 2 * generator.uniform(-1, 1)]
    else:
        inner = [middle + mean * (side + generator.uniform(-1, 1) / 8) for side in (-0.5, 0.5)]
    return [0, *(min(max(round(line), 0), length) for line in inner), length]


def _stretch(lines: list[int], cell: int, length: int) -> tuple[int, int, int]:
    """Return where a picture begins, and the first and the last of it that its cell shows.

    It lies against the inner line, or centred between two.
    """
    low, high = lines[cell], lines[cell + 1]
    if cell == 0:
        start = high - length
    elif cell == len(lines) - 2:
        start = low
    else:
        start = (low + high - length) // 2
    return start, max(start, low), min(start + length, high)


def scaled_item(tile: Item, factor: float) -> Item:
    """Scale a picture and its boxes."""
    height, width = tile.pixels.shape[:2]
    size = max(1, round(height * factor)), max(1, round(width * factor))
    boxes = scaled(tile.boxes, size[1] / width, size[0] / height)
    return replace(tile, pixels=resized(tile.pixels, size), boxes=boxes)
