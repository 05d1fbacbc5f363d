"""What a transform takes and gives: pictures and boxes together.

What: an `Item` is a picture with its boxes, a `Source` is what a transform may ask for, a
`Transform` turns one item into another, and `Compose` is a chain of them whose output has exactly
the size that training sees.

Why so: all randomness comes from the sample's own generator, so that a sample is a function of its
place in the stream and a run that was stopped goes on with the same pictures. Nothing here uses a
global generator, numpy's or torch's.

A transform never writes into the item that it was given: a source may hand out the same picture
twice without decoding it twice.

Colour is numbers until the end: transforms of colour only change `Item.colour`, and the device
applies it to the finished picture (groundwork/colour.py). So a picture mixed from several has one
distortion, whatever fills gaps is distorted with it, and the place of colour in a chain is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from finetune.augment.boxes import Rule
from finetune.augment.letterbox import Letterbox
from groundwork.colour import PARAMETERS

CHAIN = 18  # the first of PARAMETERS: A beside B, 3 x 6, in x' = A x + B m, m the mean colour


def unchanged_colour() -> npt.NDArray[np.float32]:
    """Return the parameters for groundwork.colour.apply that leave a picture as it is."""
    parameters = np.zeros(PARAMETERS, np.float32)
    parameters[:CHAIN] = np.eye(3, 6, dtype=np.float32).ravel()
    return parameters


@dataclass(slots=True)
class Item:
    """A picture and what is labeled in it; rows of boxes and classes belong together.

    `pixels` is uint8 H W C; `boxes` float32 N 4, left, top, right, bottom in pixels of `pixels`;
    `classes` int64 N, of a crowd of class c it is ~c; `colour` float32 PARAMETERS, for the device
    to apply.
    """

    pixels: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    colour: npt.NDArray[np.float32] = field(default_factory=unchanged_colour)


class Source(Protocol):
    """What a transform may ask for."""

    @property
    def generator(self) -> np.random.Generator:
        """The sample's own: all randomness comes from here."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what training will see."""

    def other(self) -> Item:
        """Return another labeled picture, drawn by the generator from near by in the stream.

        It is upright and its longer side is about max(size), decoded no larger than needed.
        """


class Transform(Protocol):
    """Turns one item into another; may change its size."""

    def __call__(self, item: Item, source: Source) -> Item:
        """Return a new item, or `item` itself where nothing changed."""


def checked(name: str, value: float, low: float = 0.0, high: float = 1.0) -> float:
    """Return a setting that lies from `low` to `high`. Raises ValueError for another."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is not between {low:g} and {high:g}.")
    return value


class Compose:
    """A chain of transforms, ended by a letterbox of exactly `source.size`.

    The chain's input is a sample's picture whose longer side is about max(size). Its output is
    contiguous; every box in it lies inside the picture and survived by `rule` (boxes.py).
    """

    def __init__(self, transforms: Sequence[Transform], *, rule: Rule | None = None) -> None:
        self.transforms = list(transforms)
        self._letterbox = Letterbox(rule=rule)

    def __call__(self, item: Item, source: Source) -> Item:
        """Transform one sample."""
        for transform in self.transforms:
            item = transform(item, source)
        return self._letterbox(item, source)
