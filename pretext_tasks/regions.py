"""Regions: detect whatever stands out from its surroundings.

A detector has three parts, and a pretext task on features trains one or two of them. Here all three
learn: backbone, neck, and the head's branches for boxes and classes, by the second stage's own
assignment and loss, on boxes that nobody drew: regions of the picture that keep their outline while
a threshold moves (pretext_tasks/stable_regions.py). Such boxes are often wrong; but they have in
common what a detector must know of any object: where it ends, how large it is, and that there is
one box for it. Source: DETReg (Bar et al. 2021, arXiv 2106.04550), which pretrains a whole detector
on region proposals without classes; SoCo (Wei et al. 2021, arXiv 2106.02637) is evidence that
training neck and box features with backbone helps few labels.

Differs from DETReg:
- A convolutional detector with dense predictions instead of DETR, and stable regions instead of
  selective search.
- DETReg has one class and a term that pulls a box's embedding to that of a pretrained network, so
  that features still tell objects apart. Here regions are of `kinds` by size and contrast, and the
  class branch tells which: with one class for all, features forgot what tells a rare class from a
  frequent one (LOG.md). With `kinds=false` it is one class.

The regions of a picture are found once and remembered (groundwork/data/memory.py); a view has those
of which it shows half. The network sees the view in other colours, and kinds are of what it sees,
but for blur and solarisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from finetune.assign import Targets
from finetune.head import DetectionHead
from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour, Probability
from groundwork.config import Section, starting_from
from groundwork.data.decode import Picture
from groundwork.data.memory import Memory
from groundwork.data.resize import Box
from pretext_tasks.contract import StepOutput, Views
from pretext_tasks.crops import (
    AreaRange,
    RatioRange,
    Turn,
    check_side,
    draw_crop,
    draw_turn,
    in_view,
)
from pretext_tasks.stable_regions import (
    KINDS,
    Boxes,
    RegionKeys,
    kinds_of,
    signature,
    size_for,
    stable_regions,
)
from pretext_tasks.through_neck import Letter
from pretext_tasks.whole_detector import COLOUR, WholeDetector

_VISIBLE = 0.5  # of a region's area that a view must show
_LEAST = 0.02  # of a view's side: a region's there, 5 px of 256
_STEPS = 65535  # of a picture's side, to which its regions are rounded and remembered


class RegionsConfig(Section):
    """Values that are ours, but for the loss's weights, which are the second stage's defaults."""

    # The neck's and head's width; auto: the backbone's own, as fine-tuning has it.
    neck: Letter | Literal["auto"] = "auto"
    kinds: bool = True  # as classes; false: one class, any region
    regions: RegionKeys = RegionKeys()
    crop_scale: AreaRange = (0.25, 1.0)  # part of the picture's area
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # width to height
    flip: Probability = 0.5
    rotate: Probability = 0.0  # 0.75 makes the four directions equally likely
    colour: Annotated[Colour, starting_from(COLOUR)] = COLOUR
    boxes: Literal["score", "equal"] = "score"  # as the second stage's loss.boxes


@dataclass(frozen=True)
class RegionsViews:
    """Cuts one view and takes the picture's regions along."""

    config: RegionsConfig
    image_size: int
    memory: Memory | None = field(default=None, repr=False, compare=False)

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return image (uint8 H W C), colour, boxes (float32 K 4 in its pixels), kinds K and count.

        The first `count` of the boxes are regions; the rest are zeros.
        """
        config = self.config
        box = draw_crop(
            picture.width, picture.height, config.crop_scale, config.crop_ratio, generator
        )
        (image,) = picture.cut([box], self.image_size)
        turn = draw_turn(config.flip, config.rotate, generator)
        image = np.ascontiguousarray(turn.of_view(image))
        drawn = colour.draw(config.colour, generator)
        found = _in_view(self.regions(picture), picture, box, turn, self.image_size)
        boxes = np.zeros((config.regions.most, 4), np.float32)
        boxes[: len(found)] = found
        kinds = np.zeros(config.regions.most, np.int64)
        if config.kinds:
            kinds[: len(found)] = kinds_of(image, found, colour.matrix_of(drawn))
        return {
            "image": image,
            "colour": drawn,
            "boxes": boxes,
            "kinds": kinds,
            "count": np.array(len(found)),
        }

    def with_memory(self, memory: Memory) -> RegionsViews:
        """Return these views, with a memory for regions."""
        return replace(self, memory=memory)

    def regions(self, picture: Picture) -> Boxes:
        """Return the boxes of a picture's regions, K 4, as shares of its sides."""
        if self.memory is None:
            found = self._found(picture)
        else:
            key = picture.digest(also=signature(self.config.regions))
            found = self.memory.remembered(key, lambda: self._found(picture))
        steps = np.frombuffer(found, "<u2").reshape(-1, 4)
        return steps.astype(np.float32) / np.float32(_STEPS)

    def _found(self, picture: Picture) -> bytes:
        """Look for the regions: four numbers each, of two bytes, in steps of the sides."""
        width, height = size_for(picture.width, picture.height, self.config.regions)
        (pixels,) = picture.cut([picture.whole], (height, width))
        sides = np.array([width, height, width, height], np.float32)
        shares = stable_regions(pixels, self.config.regions) / sides
        return (shares.clip(0, 1) * _STEPS).round().astype("<u2").tobytes()


def _in_view(regions: Boxes, picture: Picture, box: Box, turn: Turn, side: int) -> Boxes:
    """Return those regions that a view shows, K 4 in its pixels."""
    seen, shown = in_view(regions, picture.width, picture.height, box, turn)
    kept = (shown >= _VISIBLE) & ((seen[:, 2:] - seen[:, :2]).min(1) >= _LEAST)
    return np.asarray(seen[kept] * np.float32(side))


class Regions(WholeDetector):
    """Backbone, neck and head."""

    Config = RegionsConfig

    def __init__(self, backbone: Backbone, config: RegionsConfig) -> None:
        super().__init__(backbone, config.neck, KINDS if config.kinds else 1, config.boxes)
        self.config = config

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of a view and its regions."""
        check_side(image_size, "regions needs")
        return RegionsViews(config, image_size)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the detection loss.

        Metrics: its parts; regions of a view in the mean; the middle one's side in pixels (the root
        of its area).
        """
        row, place = _there(batch).nonzero(as_tuple=True)
        targets = Targets(row, batch["boxes"][row, place], batch["kinds"][row, place])
        output = self.detection_loss(self.coloured(batch["image"], batch["colour"]), targets)
        found = batch["count"].float().mean()
        sides = (targets.boxes[:, 2:] - targets.boxes[:, :2]).prod(1).sqrt()
        side = sides.median() if len(sides) else sides.sum()
        return StepOutput(output.loss, {**output.metrics, "regions": found, "side": side})

    def product(self) -> dict[str, nn.Module]:
        """Return backbone, neck, and the head's branch for boxes."""
        return {**super().product(), "head": _BoxBranch(self.head)}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the network sees, with the regions, and with what it finds, drawn."""
        wanted = [b[there] for b, there in zip(batch["boxes"], _there(batch), strict=True)]
        regions, found = self.with_boxes(self.coloured(batch["image"], batch["colour"]), wanted)
        return {"regions": regions, "found": found}


class _BoxBranch(nn.Module):
    """What of a head knows where objects end; which are of one class, the labels will say."""

    def __init__(self, head: DetectionHead) -> None:
        super().__init__()
        self.boxes, self.bins = head.boxes, head.bins


def _there(batch: dict[str, Tensor]) -> Tensor:
    """Return which rows of the boxes are regions: N K bool."""
    places = torch.arange(batch["boxes"].shape[1], device=batch["boxes"].device)
    return places < batch["count"][:, None]
