"""Rotation, scale, shear and translation at once, out of a mosaic's canvas too.

The map is about the centre of the item and takes it to the centre of source.size: a picture of the
size of training is changed in place, and of a mosaic's canvas, twice that size, a window of the
size of training is taken, so that a mosaic costs no second sampling.

Without rotation and shear the window's edges are rounded to whole pixels of the item: the picture
is scaled by up to half a pixel a side more or less than was drawn, boxes exactly as the picture.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from finetune.augment.boxes import Enclose, Matrix, Rule, mapped
from finetune.augment.contract import Item, Source, checked
from finetune.augment.warp import cut, resized, warped


class RandomAffine:
    """Turns, scales, shears and moves; the output has source.size, grey where nothing lies.

    `degrees` and `shear` bound angles (degrees, both ways; shear for each axis), `scale` the factor
    (uniform), `translate` the move as a share of the sides (both ways). `enclose` says what the
    new boxes enclose: the corners of the old ones, or the ellipses in them (boxes.py).
    """

    def __init__(
        self,
        degrees: float = 10.0,
        scale: tuple[float, float] = (0.5, 1.5),
        translate: float = 0.1,
        shear: float = 2.0,
        *,
        enclose: Enclose = "corners",
        rule: Rule | None = None,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError("scale must be two positive numbers, the smaller first.")
        self.degrees = checked("degrees", degrees, 0, 180)
        self.scale = scale
        self.translate = checked("translate", translate)
        self.shear = checked("shear", shear, 0, 89.9)
        self.enclose: Enclose = enclose
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return an item of source.size."""
        generator = source.generator
        height, width = source.size
        linear = _linear(
            generator.uniform(-self.degrees, self.degrees),
            generator.uniform(*self.scale),
            generator.uniform(-self.shear, self.shear),
            generator.uniform(-self.shear, self.shear),
        )
        shift = generator.uniform(-self.translate, self.translate, 2) * (width, height)
        centre = np.array(item.pixels.shape[1::-1]) / 2
        target = np.array([width, height]) / 2 + shift
        matrix = np.column_stack([linear, target - linear @ centre])
        return transformed(item, matrix, source.size, self.rule, self.enclose)


def _linear(degrees: float, scale: float, shear_x: float, shear_y: float) -> Matrix:
    """Return the 2 x 2 matrix: shear after rotation and scale."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = scale * np.array([[cos, -sin], [sin, cos]])
    along, down = math.tan(math.radians(shear_x)), math.tan(math.radians(shear_y))
    linear: Matrix = np.array([[1, along], [down, 1]]) @ turn
    return linear


def transformed(
    item: Item,
    matrix: Matrix,
    size: tuple[int, int],
    rule: Rule,
    enclose: Enclose = "corners",
) -> Item:
    """Map an item by a 2 x 3 matrix into a picture of size (height, width)."""
    height, width = size
    if matrix[0, 1] == 0 and matrix[1, 0] == 0 and matrix[0, 0] > 0 and matrix[1, 1] > 0:
        wide = max(1, round(width / matrix[0, 0]))
        tall = max(1, round(height / matrix[1, 1]))
        left = round(-matrix[0, 2] / matrix[0, 0])
        top = round(-matrix[1, 2] / matrix[1, 1])
        pixels = resized(cut(item.pixels, left, top, wide, tall), size)
        across, down = width / wide, height / tall
        matrix = np.array([[across, 0, -left * across], [0, down, -top * down]])
    else:
        pixels = warped(item.pixels, matrix, size)
    boxes, kept = rule.clip(
        mapped(item.boxes, matrix, enclose), (0, 0, width, height), item.classes
    )
    return replace(item, pixels=pixels, boxes=boxes[kept], classes=item.classes[kept])
