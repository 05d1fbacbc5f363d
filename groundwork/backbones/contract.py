"""What a backbone is: a pyramid of feature maps at strides 8, 16 and 32.

No head, pooling, labels or normalisation is inside; the keys of its state_dict are public.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

STRIDES = (8, 16, 32)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Level(NamedTuple):
    """One level of the pyramid: pixels of the picture for each cell, and feature channels."""

    stride: int
    channels: int


def for_channels(rgb: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a mean or deviation of so many channels: RGB's own, and their average for others."""
    average = sum(rgb) / len(rgb)
    return (*rgb, *[average] * (channels - 3)) if channels >= 3 else (average,) * channels


class Pyramid(NamedTuple):
    """The feature maps of one batch, each N, C, H / stride, W / stride."""

    c3: Tensor
    c4: Tensor
    c5: Tensor


class Backbone(nn.Module, ABC):
    """Turns N, C, H, W (sides multiples of 32, normalised with `mean` and `std`) into a Pyramid.

    C is 3, RGB, unless it was built for another number of channels; `mean` and `std` have as many.

    `name` is what `build_backbone` was called with, so that a file can say how to build it again.
    """

    name: str
    levels: tuple[Level, Level, Level]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_channels(self) -> int:
        """How many channels a picture has."""
        return len(self.mean)

    @abstractmethod
    def forward(self, image: Tensor) -> Pyramid:
        """Return C3, C4 and C5 of the normalised pictures."""

    def depths(self) -> dict[str, int]:
        """Say how deep each parameter lies, by name, 0 nearest to the picture: one depth for all.

        A backbone with layers says more; rates that fall layer by layer follow it.
        """
        return dict.fromkeys((name for name, _ in self.named_parameters()), 0)
