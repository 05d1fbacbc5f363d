"""One view of a picture, as tasks with a teacher compare it: student and teacher see the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groundwork import colour
from groundwork.colour import Colour
from groundwork.data.decode import Picture
from pretext_tasks.crops import draw_crop, draw_turn


@dataclass(frozen=True)
class OneView:
    """Cuts one view; `rotate` is the probability of a turn by 90, 180 or 270 degrees each."""

    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    rotate: float
    colour: Colour

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Return view (uint8 H W C) and colour (float32)."""
        box = draw_crop(picture.width, picture.height, self.crop_scale, self.crop_ratio, generator)
        [view] = picture.cut([box], self.image_size)
        turn = draw_turn(self.flip, self.rotate, generator)
        return {
            "view": np.ascontiguousarray(turn.of_view(view)),
            "colour": colour.draw(self.colour, generator),
        }
