"""Pictures of flat objects, whose boxes are known, and a source that deals them out.

What an object covers after a transform is told by doing the transform twice, with the object and
without it: its pixels are those that differ. That holds for blends, masks and grids as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from finetune.augment.contract import Item, Transform

SIZE = (96, 96)
FIRST = 0  # the number of the picture that a chain begins with
OBJECTS = 4  # in each picture; class = 10 * number + object


def picture(number: int, hidden: int | None = None, size: tuple[int, int] = SIZE) -> Item:
    """Draw picture `number`, less the object of class `hidden`, whose box stays."""
    generator = np.random.default_rng(number)
    side = max(size)
    height, width = (side, int(side * generator.uniform(0.55, 1)))
    if generator.random() < 0.5:
        height, width = width, height
    pixels = np.full((height, width, 3), 70, np.uint8)
    boxes = []
    for place in range(OBJECTS):  # each in a quarter of the picture: none hides another
        left = int(generator.integers(0, width // 4)) + (place % 2) * (width // 2)
        top = int(generator.integers(0, height // 4)) + (place // 2) * (height // 2)
        wide, tall = (int(n) for n in generator.integers(6, min(width, height) // 4, 2))
        boxes.append((left, top, left + wide, top + tall))
        if 10 * number + place != hidden:
            pixels[top : top + tall, left : left + wide] = 250, 200, 230
    classes = 10 * number + np.arange(OBJECTS)
    return Item(pixels, np.array(boxes, np.float32), classes)


def empty(size: tuple[int, int] = SIZE) -> Item:
    """Return a picture without anything in it."""
    pixels = np.full((size[0], size[1] // 2, 3), 70, np.uint8)
    return Item(pixels, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


@dataclass
class Dealer:
    """A source whose other pictures are drawn from numbers 1 to 99."""

    seed: int
    size: tuple[int, int] = SIZE
    hidden: int | None = None
    generator: np.random.Generator = field(init=False)
    dealt: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.generator = np.random.Generator(np.random.Philox(self.seed))

    def other(self) -> Item:
        self.dealt += 1
        return picture(int(self.generator.integers(1, 100)), self.hidden, self.size)


def run(
    transform: Transform, seed: int, hidden: int | None = None, size: tuple[int, int] = SIZE
) -> Item:
    """Put the first picture through a transform."""
    return transform(picture(FIRST, hidden, size), Dealer(seed, size, hidden))


def covered(
    transform: Transform, seed: int, name: int, size: tuple[int, int] = SIZE
) -> npt.NDArray[np.bool_]:
    """Return the pixels, H W, that the object of class `name` covers after a transform."""
    seen, unseen = run(transform, seed, size=size), run(transform, seed, name, size)
    difference = np.abs(seen.pixels.astype(int) - unseen.pixels).max(axis=2)
    # A pixel at the edge of which a third is covered; a pixel of a blend, where w is over a third.
    mask: npt.NDArray[np.bool_] = difference > max(10, 0.35 * int(difference.max()))
    return mask


def extent(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64] | None:
    """Return left, top, right and bottom of what is True; None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
