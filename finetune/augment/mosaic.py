"""Mosaic: four or nine pictures laid around random lines, on a canvas of twice the size.

Source: YOLOv4 (Bochkovskiy et al., arXiv 2004.10934, section 3.3): a detector sees objects outside
their usual surroundings, and each batch holds the statistics of four times its pictures.

The canvas is meant for RandomAffine, which takes a window of source.size out of it in one sampling
and so never shows an edge of the canvas before it shrinks by half. Without RandomAffine the closing
letterbox shrinks the canvas: every picture is then shown at half the size (4) or a third (9).

Differs from the paper: pictures keep their aspect and the size at which they would be seen alone
(of nine, two thirds of it); what they leave free is grey.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from finetune.augment.boxes import Rule, moved, scaled
from finetune.augment.contract import Item, Source
from finetune.augment.warp import GREY, resized


class Mosaic:
    """Lays `tiles` pictures, the item first, on one canvas with the probability `prob`.

    Of four, the inner corners meet in a point drawn from the middle half of the canvas. Of nine,
    the item lies in the middle; the lines between columns and rows lie at thirds of the canvas,
    moved by up to a twelfth. A box survives by `rule`, against its tile. The item's colour is that
    of the whole.
    """

    def __init__(
        self, prob: float = 0.5, tiles: Literal[4, 9] = 4, *, rule: Rule | None = None
    ) -> None:
        if tiles not in (4, 9):
            raise ValueError("tiles is 4 or 9.")
        self.prob = prob
        self.tiles = tiles
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the canvas, 2 * source.size, or the item as it is."""
        if source.generator.random() >= self.prob:
            return item
        height, width = 2 * source.size[0], 2 * source.size[1]
        columns = _lines(width, self.tiles, source.generator)
        rows = _lines(height, self.tiles, source.generator)
        canvas = np.full((height, width, 3), GREY, np.uint8)
        boxes, classes = [], []
        side = len(rows) - 1
        # Every other cell's picture is drawn in the order of the cells.
        first = 0 if self.tiles == 4 else 4
        for cell in range(self.tiles):
            tile = item if cell == first else source.other()
            if self.tiles == 9:
                tile = _smaller(tile, 2 / 3)
            row, column = divmod(cell, side)
            tall, wide = tile.pixels.shape[:2]
            top, left = _start(rows, row, tall), _start(columns, column, wide)
            upper, lower = max(top, rows[row]), min(top + tall, rows[row + 1])
            near, far = max(left, columns[column]), min(left + wide, columns[column + 1])
            canvas[upper:lower, near:far] = tile.pixels[
                upper - top : lower - top, near - left : far - left
            ]
            placed, kept = self.rule.clip(moved(tile.boxes, left, top), (near, upper, far, lower))
            boxes.append(placed[kept])
            classes.append(tile.classes[kept])
        return replace(
            item, pixels=canvas, boxes=np.concatenate(boxes), classes=np.concatenate(classes)
        )


def _lines(length: int, tiles: int, generator: np.random.Generator) -> list[int]:
    """Draw where one axis of the canvas is divided, its ends included."""
    if tiles == 4:
        return [0, int(generator.integers(length // 4, length - length // 4 + 1)), length]
    reach = length // 12
    moves = generator.integers(-reach, reach + 1, 2)
    return [0, length // 3 + int(moves[0]), 2 * length // 3 + int(moves[1]), length]


def _start(lines: list[int], cell: int, length: int) -> int:
    """Return where a picture begins: against the inner line, or centred between two of them."""
    if cell == 0:
        return lines[1] - length
    if cell == len(lines) - 2:
        return lines[cell]
    return (lines[cell] + lines[cell + 1] - length) // 2


def _smaller(tile: Item, factor: float) -> Item:
    height, width = tile.pixels.shape[:2]
    size = max(1, round(height * factor)), max(1, round(width * factor))
    boxes = scaled(tile.boxes, size[1] / width, size[0] / height)
    return replace(tile, pixels=resized(tile.pixels, size), boxes=boxes)
