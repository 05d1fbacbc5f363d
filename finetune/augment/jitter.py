"""Colour: numbers drawn here, applied to the finished batch on the device (groundwork/colour.py).

Neither class touches pixels. A picture mixed from several gets one distortion for the whole, and
what a transform fills with grey (frames, masks) is distorted with the picture, wherever in the
chain the colour is drawn: it is always applied last. Two of them in one chain are applied one after
the other, in one matrix.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from finetune.augment.contract import CHAIN, Item, Source
from groundwork.colour import Colour, draw


class ColorJitter:
    """Changes hue, saturation, brightness and contrast, in an order drawn for each picture.

    `hue` is in turns, uniform in -hue .. hue; the others are factors, uniform in 1 - strength ..
    1 + strength. Contrast turns about the mean grey of the whole frame.
    """

    def __init__(
        self,
        hue: float = 0.1,
        saturation: float = 0.4,
        brightness: float = 0.3,
        contrast: float = 0.0,
    ) -> None:
        self._colour = Colour(
            probability=1.0,
            hue=float(hue),
            saturation=float(saturation),
            brightness=float(brightness),
            contrast=float(contrast),
            grayscale=0.0,
            blur=0.0,
            solarise=0.0,
        )

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item with other colour parameters; its pixels are the same."""
        return replace(item, colour=_after(draw(self._colour, source.generator), item.colour))


class HSV(ColorJitter):
    """Gains in hue, saturation and value, at the strengths usual in the YOLO family.

    Differs from those: in the same linear form as ColorJitter, not in the HSV space. Hue turns
    about the grey axis by the same angle; saturation moves a pixel away from or towards its own
    luma; value multiplies it.
    """

    def __init__(self, hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> None:
        super().__init__(hue, saturation, value, 0.0)


def _after(
    second: npt.NDArray[np.float32], first: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Join two distortions: A2 (A1 x + B1 m) + B2 (A1 + B1) m. The second has neither blur nor
    solarisation; the first's are kept, and come last as always.
    """
    before, behind = (chain[:CHAIN].reshape(3, 6) for chain in (first, second))
    joined = behind[:, :3] @ before
    joined[:, 3:] += behind[:, 3:] @ (before[:, :3] + before[:, 3:])
    parameters = first.copy()
    parameters[:CHAIN] = joined.ravel()
    return parameters
