"""One view of a picture, as tasks with a teacher compare it: student and teacher see the same.

The teacher may see it larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groundwork import colour
from groundwork.colour import Colour, Probability
from groundwork.config import Section
from groundwork.data.decode import Picture
from groundwork.data.resize import Box
from pretext_tasks.crops import AreaRange, RatioRange, Turn, draw_crop, draw_turn


class OneViewKeys(Section):
    """How the view is cut and coloured; tasks have defaults of their own."""

    crop_scale: AreaRange = (0.25, 1.0)  # part of the picture's area
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # width to height, log-uniform
    flip: Probability = 0.5
    rotate: Probability = 0.0  # 0.75 makes the four directions equally likely
    colour: Colour = Colour()


@dataclass(frozen=True)
class OneView:
    """Cuts one view and draws its colours."""

    keys: OneViewKeys
    image_size: int
    teacher_size: int | None = None  # the same cut, in this size as well

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Return view (uint8 H W C) and colour (float32); teacher_view where it has a size."""
        return self.at(picture, *self.place(picture, generator), generator)

    def place(self, picture: Picture, generator: np.random.Generator) -> tuple[Box, Turn]:
        """Draw where the view lies in the picture, and how it is turned."""
        keys = self.keys
        box = draw_crop(picture.width, picture.height, keys.crop_scale, keys.crop_ratio, generator)
        return box, draw_turn(keys.flip, keys.rotate, generator)

    def at(
        self, picture: Picture, box: Box, turn: Turn, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Cut the view that lies there, and draw its colours."""

        def of_side(side: int) -> npt.NDArray[np.uint8]:
            [view] = picture.cut([box], side)
            return np.ascontiguousarray(turn.of_view(view))

        views: dict[str, npt.NDArray[Any]] = {
            "view": of_side(self.image_size),
            "colour": colour.draw(self.keys.colour, generator),
        }
        if self.teacher_size is not None:
            views["teacher_view"] = of_side(self.teacher_size)
        return views
