"""Dense: the same point of a picture, seen in two views, has the same features, at every level.

A detector reads features cell by cell, and pooled losses say nothing of cells. Two overlapping
crops are cut, points are drawn in what both show, and the features of a point in one view are to
predict those in the other, at strides 8, 16 and 32, through the neck where one is trained. VICReg's
regularisers (Bardes, Ponce and LeCun 2022, arXiv 2105.04906, equations 1 to 6, scaled as lightly
and the authors' code do) keep them from collapsing: no target network, no negatives, no large
batch, since a batch has as many vectors as points. A pooled term of the coarsest level is beside
it. VICRegL (Bardes et al. 2022, arXiv 2210.01571) is the closest relative: its location-based
matches (section 3.2) are our points.

Differs from VICRegL:
- Points are drawn uniformly in the common area and read by bilinear interpolation, instead of
  pairing each cell with the nearest of the other view, so that matches are exact; there are no
  matches by feature (its second kind).
- `whole` weighs the pooled term, and is small: a detector reads cells. The paper's alpha of 0.75 is
  for its global term.
- Three levels of a pyramid instead of one map; each has its own projector. The loss is the mean.
- Projectors have two linear layers instead of three, with BatchNorm at every level. Their widths
  are settings; the paper's are 8192 (global) and 512 (local).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour, Probability
from groundwork.config import Section, starting_from
from groundwork.data.decode import Picture
from pretext_tasks.byol import VIEW_1, VIEW_2
from pretext_tasks.contract import StepOutput, Views
from pretext_tasks.crops import AreaRange, RatioRange, check_side, draw_crop, draw_turn
from pretext_tasks.through_neck import Letter, ThroughNeck
from pretext_tasks.two_views import (
    Width,
    colour_both,
    draw_window,
    seen_views,
    spread,
)

Box = tuple[float, float, float, float]

_TRIES = 10  # of crops that are to overlap enough, before the second is the first


class DenseConfig(Section):
    """Values with their sources; see the module for those that are ours."""

    neck: Letter | None = None  # a YOLOv12 neck of this width learns too
    points: int = Field(default=16, ge=1)  # of a picture; ours
    overlap: Probability = 0.2  # least share of the smaller crop that both show; ours
    whole: Probability = 0.25  # of the pooled term; the rest is that of the points
    hidden_width: Width = 512
    projection_width: Width = 256
    invariance: float = Field(default=25.0, ge=0)  # VICReg, section 4.2: lambda
    variance: float = Field(default=25.0, ge=0)  # mu
    covariance: float = Field(default=1.0, ge=0)  # nu
    window_scale: AreaRange = (1.0, 1.0)  # ours; see pretext_tasks/two_views.py
    crop_scale: AreaRange = (0.2, 1.0)  # part of the picture's area; ours
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # VICReg, appendix C: width to height
    flip: Probability = 0.5  # VICReg, appendix C
    rotate: Probability = 0.0  # ours; 0.75 makes the four directions equally likely
    colour_1: Annotated[Colour, starting_from(VIEW_1)] = VIEW_1  # BYOL's, as VICReg, appendix C
    colour_2: Annotated[Colour, starting_from(VIEW_2)] = VIEW_2


@dataclass(frozen=True)
class DenseViews:
    """Cuts two overlapping views and draws points that both show."""

    config: DenseConfig
    image_size: int

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Return view_1, view_2 (uint8 H W 3), colour_1, colour_2, and points_1, points_2.

        Points are K 2 float32: x and y in a view, from -1 (its left or upper edge) to 1.
        """
        config = self.config
        left, top, right, bottom = draw_window(
            picture.width, picture.height, config.window_scale, config.crop_ratio, generator
        )

        def crop() -> Box:
            box = draw_crop(
                right - left, bottom - top, config.crop_scale, config.crop_ratio, generator
            )
            return box[0] + left, box[1] + top, box[2] + left, box[3] + top

        first = second = crop()
        for _ in range(_TRIES):
            other = crop()
            shared = shared_area(first, other)
            if shared > 0 and shared >= config.overlap * min(_area(first), _area(other)):
                second = other
                break
        common = _common(first, second)
        low, high = np.array(common[:2]), np.array(common[2:])
        places = low + (high - low) * generator.random((config.points, 2))
        entries: dict[str, npt.NDArray[Any]] = {}
        cuts = picture.cut([first, second], self.image_size)  # decodes once for both
        colours = (config.colour_1, config.colour_2)
        for number, (view, box, rule) in enumerate(
            zip(cuts, (first, second), colours, strict=True), start=1
        ):
            points = (places - box[:2]) / (np.array(box[2:]) - box[:2])  # 0 to 1 in the view
            turn = draw_turn(config.flip, config.rotate, generator)
            entries[f"view_{number}"] = np.ascontiguousarray(turn.of_view(view))
            entries[f"colour_{number}"] = colour.draw(rule, generator)
            entries[f"points_{number}"] = (2 * turn.of_points(points) - 1).astype(np.float32)
        return entries


def shared_area(first: Box, second: Box) -> float:
    """Return the area that two boxes have in common."""
    left, top, right, bottom = _common(first, second)
    return max(0.0, right - left) * max(0.0, bottom - top)


def _common(first: Box, second: Box) -> Box:
    return (
        max(first[0], second[0]), max(first[1], second[1]),
        min(first[2], second[2]), min(first[3], second[3]),
    )  # fmt: skip


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


class Dense(ThroughNeck):
    """Backbone (and neck), a projector for each level and one for the pooled map."""

    Config = DenseConfig

    def __init__(self, backbone: Backbone, config: DenseConfig) -> None:
        super().__init__(backbone, config.neck)
        self.config = config
        channels = [level.channels for level in self.levels]
        hidden, width = config.hidden_width, config.projection_width
        self.projectors = nn.ModuleList(
            VICRegProjectionHead(c, hidden, width, num_layers=2) for c in channels
        )
        self.whole = VICRegProjectionHead(channels[-1], hidden, width, num_layers=2)
        # Gathers where a process group is initialised, and only there.
        self.vicreg = VICRegLoss(
            config.invariance, config.variance, config.covariance, gather_distributed=True
        )

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of two views and their points."""
        check_side(image_size, "two views need")
        return DenseViews(config, image_size)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return VICReg's loss of points at every level, and of whole views.

        Metrics: points_spread and whole_spread, 1 for projections that point everywhere and 0 for
        projections that all agree; points_found, how often a point's nearest of 256 is its partner.
        """
        features = self.through(self.backbone(colour_both(batch, self.backbone)))
        points = torch.cat((batch["points_1"], batch["points_2"]))
        losses = []
        found = spread_of_points = features[0].new_zeros(())
        for level, projector in zip(features, self.projectors, strict=True):
            first, second = projector(features_at(level, points)).float().chunk(2)
            losses.append(self._compared(first, second))
            found = found + partner_found(first.detach(), second.detach()) / len(features)
            spread_of_points = spread_of_points + spread(first) / len(features)
        one, other = self.whole(features[-1].mean((2, 3))).float().chunk(2)
        share = self.config.whole
        loss = (1 - share) * torch.stack(losses).mean() + share * self._compared(one, other)
        metrics = {
            "points_found": found,
            "points_spread": spread_of_points,
            "whole_spread": spread(one),
        }
        return StepOutput(loss, metrics)

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return both views as cut and as the network sees them, points marked in the latter."""
        shown = seen_views(batch, self.backbone)
        for number in (1, 2):
            marked(shown[f"view_{number}_seen"], batch[f"points_{number}"].cpu())
        return shown

    def _compared(self, first: Tensor, second: Tensor) -> Tensor:
        # Variances and covariances want float32, whatever the loop's autocast is.
        with torch.autocast(first.device.type, enabled=False):
            loss: Tensor = self.vicreg(first, second)
        return loss


def features_at(level: Tensor, points: Tensor) -> Tensor:
    """Read N C H W at points N K 2 (x, y from -1 to 1), bilinear: N K rows of C."""
    read = functional.grid_sample(
        level.float(), points.unsqueeze(2), padding_mode="border", align_corners=False
    )  # N C K 1
    return read.squeeze(3).transpose(1, 2).reshape(-1, level.shape[1])


def partner_found(first: Tensor, second: Tensor, among: int = 256) -> Tensor:
    """Return how often a row's nearest by cosine, of the first `among` rows, is its partner."""
    one, other = (functional.normalize(x[:among], dim=1) for x in (first, second))
    nearest = (one @ other.T).argmax(1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()


def marked(pictures: Tensor, points: Tensor) -> None:
    """Draw points (N K 2, -1 to 1) into uint8 N 3 H W, in place, each in a colour of its own."""
    n, _, height, width = pictures.shape
    count = points.shape[1]
    hues = torch.arange(count) / count
    for row in range(n):
        for index in range(count):
            x = int((points[row, index, 0] + 1) / 2 * width)
            y = int((points[row, index, 1] + 1) / 2 * height)
            hue = 6 * float(hues[index])
            colours = [abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)]
            paint = torch.tensor([max(0.0, min(1.0, c)) * 255 for c in colours]).to(torch.uint8)
            top, left = max(0, y - 1), max(0, x - 1)
            pictures[row, :, top : y + 2, left : x + 2] = paint.view(3, 1, 1)
