"""Several views of one picture: large ones, and small ones of small parts of it.

Multi-crop (Caron et al. 2020, arXiv 2006.09882, section 3.3): a small view costs a fraction of a
large one and asks what a part says of the whole. In the worker: crops of both kinds from one
decoding for each kind, flipped and turned, and the numbers of their colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.data.decode import Picture
from groundwork.errors import UsageError
from pretext_tasks.crops import check_side, draw_crop, draw_turn
from pretext_tasks.two_views import draw_window


@dataclass(frozen=True)
class Crops:
    """So many crops of one kind: their side in pixels, and the share of the area that each has."""

    count: int
    side: int
    scale: tuple[float, float]


@dataclass(frozen=True)
class MultiCrop:
    """Cuts the crops of every kind; `rotate` is the probability of a quarter turn or more."""

    kinds: dict[str, Crops]
    window_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    rotate: float
    colour: Colour

    def __post_init__(self) -> None:
        for name, crops in self.kinds.items():
            check_side(crops.side, f"{name} views need")

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Return for each kind its views (uint8 V H W C) and <kind>_colour (float32 V K)."""
        left, top, right, bottom = draw_window(
            picture.width, picture.height, self.window_scale, self.crop_ratio, generator
        )
        entries: dict[str, npt.NDArray[Any]] = {}
        for name, crops in self.kinds.items():
            boxes, turns = [], []
            for _ in range(crops.count):
                box = draw_crop(right - left, bottom - top, crops.scale, self.crop_ratio, generator)
                boxes.append((box[0] + left, box[1] + top, box[2] + left, box[3] + top))
                turns.append(draw_turn(self.flip, self.rotate, generator))
            cuts = picture.cut(boxes, crops.side)
            entries[name] = np.stack([t.of_view(v) for v, t in zip(cuts, turns, strict=True)])
            drawn = [colour.draw(self.colour, generator) for _ in boxes]
            entries[f"{name}_colour"] = np.stack(drawn)
        return entries


def coloured(batch: dict[str, Tensor], kind: str, backbone: Backbone) -> Tensor:
    """Colour and normalise the views of a kind: float32 V*N C H W, the first view of all first.

    Raises UsageError for a single picture, which has no other to differ from.
    """
    views = batch[kind].transpose(0, 1)
    if views.shape[1] < 2:
        raise UsageError("This task compares pictures: give each process at least two in a batch.")
    return colour.apply(
        views.flatten(0, 1),
        batch[f"{kind}_colour"].transpose(0, 1).flatten(0, 1),
        backbone.mean,
        backbone.std,
    )


def seen(batch: dict[str, Tensor], kind: str, backbone: Backbone) -> dict[str, Tensor]:
    """Return the views of a kind as the network sees them: <kind>_1 and on, uint8 N 3 H W."""
    count = batch[kind].shape[1]
    views = colour.denormalise(coloured(batch, kind, backbone), backbone.mean, backbone.std)
    return {f"{kind}_{n}": view for n, view in enumerate(views.chunk(count), start=1)}
