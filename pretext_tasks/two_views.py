"""Two views of one picture, as contrastive and self-distilling tasks compare them.

In the worker: two random resized crops, flipped and turned, and the numbers of their colours. On
the device: both views coloured and normalised in one call. Crop and flip after SimCLR's appendix A
(arXiv 2002.05709), which BYOL takes over (arXiv 2006.07733, appendix B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.data.decode import Picture
from groundwork.errors import UsageError
from pretext_tasks.crops import check_side, draw_crop, draw_turn

Width = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TwoViews:
    """Cuts two views; `rotate` is the probability of a turn by 90, 180 or 270 degrees each."""

    image_size: int
    window_scale: tuple[float, float]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    rotate: float
    colours: tuple[Colour, Colour]

    def __post_init__(self) -> None:
        check_side(self.image_size, "two views need")

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return view_1 and view_2 (uint8 H W C), colour_1 and colour_2 (float32)."""
        left, top, right, bottom = draw_window(
            picture.width, picture.height, self.window_scale, self.crop_ratio, generator
        )
        boxes = []
        for _ in self.colours:
            box = draw_crop(right - left, bottom - top, self.crop_scale, self.crop_ratio, generator)
            boxes.append((box[0] + left, box[1] + top, box[2] + left, box[3] + top))
        entries: dict[str, np.ndarray[Any, Any]] = {}
        cuts = picture.cut(boxes, self.image_size)  # decodes once for both
        for number, (view, config) in enumerate(zip(cuts, self.colours, strict=True), start=1):
            turn = draw_turn(self.flip, self.rotate, generator)
            entries[f"view_{number}"] = np.ascontiguousarray(turn.of_view(view))
            entries[f"colour_{number}"] = colour.draw(config, generator)
        return entries


def draw_window(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw the part of a picture that both views are cut from; all of it at the scale (1, 1).

    In a picture of many small objects two crops share no object. A window about as large as an
    object makes the views two looks at one thing, and other windows the things to differ from.
    """
    if scale == (1.0, 1.0):
        return 0, 0, width, height
    left, top, right, bottom = draw_crop(width, height, scale, ratio, generator)
    return int(left), int(top), int(right), int(bottom)


def colour_both(batch: dict[str, Tensor], backbone: Backbone) -> Tensor:
    """Colour and normalise both views as `backbone` wants them: float32 2N C H W, view 1 first.

    The views are joined while they are bytes, so that halves of the result need no copy. Raises
    UsageError for a single picture, which has neither batch statistics nor another to differ from.
    """
    if len(batch["view_1"]) < 2:
        raise UsageError("This task compares pictures: give each process at least two in a batch.")
    return colour.apply(
        torch.cat([batch["view_1"], batch["view_2"]]),
        torch.cat([batch["colour_1"], batch["colour_2"]]),
        backbone.mean,
        backbone.std,
    )


def spread(embedding: Tensor) -> Tensor:
    """Spread of directions: 1 when the N vectors (N D) point everywhere, 0 when all agree.

    Standard deviation of each dimension over the batch after L2 normalisation, times sqrt(D)
    (SimSiam, arXiv 2011.10566, figure 2).
    """
    directions: Tensor = functional.normalize(embedding.detach().float(), dim=1)
    return directions.std(dim=0, correction=0).mean() * math.sqrt(embedding.shape[1])


def seen_views(batch: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Return both views as they were cut and as the network sees them: uint8 N 3 H W."""
    coloured = colour_both(batch, backbone)
    seen = colour.denormalise(coloured, backbone.mean, backbone.std).chunk(2)
    return {
        "view_1": colour.shown(batch["view_1"]),
        "view_1_seen": seen[0],
        "view_2": colour.shown(batch["view_2"]),
        "view_2_seen": seen[1],
    }
