"""Distill: the backbone gives, cell by cell, the features that a large frozen teacher gives.

A teacher that has seen hundreds of millions of pictures (DINOv2, arXiv 2304.07193) knows more than
a few thousand pictures can teach, and a detector's backbone is small. Feature distillation
(FitNets, Romero et al. 2014, arXiv 1412.6550, equation 3) asks each level, through a projection
that is thrown away, for the teacher's last map; student and teacher see the very same view
("consistent teaching", Beyer et al. 2021, arXiv 2106.05237, section 3.2). With `task.neck` the
levels are those of a neck that learns too.

The teacher is a timm model (`task.teacher`) and a file of its weights (`task.weights`), which is
opened when the task is built: nothing is ever downloaded. Its weights are in every checkpoint.

Differs from FitNets:
- The loss is one minus the cosine between a cell's projection and the teacher's, not the squared
  distance: a teacher's features differ in scale from cell to cell.
- All three levels are compared with one map of the teacher, resized (bilinear) to each.
- The teacher sees the view at a scale at which its cells are 16 px of the view (32 where its own
  stride is above 16), so that both see alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.backbones.from_timm import TimmTeacher
from groundwork.colour import Colour
from groundwork.config import starting_from
from groundwork.errors import UsageError
from pretext_tasks.contract import StepOutput, Views
from pretext_tasks.crops import AreaRange, check_side
from pretext_tasks.one_view import OneView, OneViewKeys
from pretext_tasks.through_neck import Letter, ThroughNeck

# Mild: a teacher's features of a strange picture are strange.
MILD = Colour(
    probability=0.8, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, grayscale=0.0,
    blur=0.0, solarise=0.0,
)  # fmt: skip


class DistillConfig(OneViewKeys):
    """Ours, but for the crop."""

    teacher: str = "timm/vit_small_patch14_dinov2.lvd142m"
    weights: str | None = None  # a timm checkpoint of the teacher; must be named
    neck: Letter | None = None  # a YOLOv12 neck of this width learns too
    hidden_width: int = Field(default=512, ge=8)  # of a level's projection
    crop_scale: AreaRange = (0.25, 1.0)  # Beyer et al., section 3: of the area
    colour: Annotated[Colour, starting_from(MILD)] = MILD


class Distill(ThroughNeck):
    """Backbone (and neck), a projection of each level, and the teacher."""

    Config = DistillConfig

    def __init__(self, backbone: Backbone, config: DistillConfig) -> None:
        super().__init__(backbone, config.neck)
        if backbone.in_channels != 3:
            raise UsageError(
                f"The pictures have {backbone.in_channels} channels and task.teacher sees 3: name "
                "three data.bands, or take another task."
            )
        self.teacher = TimmTeacher(config.teacher)
        if config.weights is None:
            raise UsageError(_NO_WEIGHTS)
        self.teacher.load(Path(config.weights))
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(level.channels, config.hidden_width, 1, bias=False),
                nn.BatchNorm2d(config.hidden_width),
                nn.SiLU(),
                nn.Conv2d(config.hidden_width, self.teacher.channels, 1),
            )
            for level in self.levels
        )

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of the view. Raises UsageError where no teacher's file is named."""
        check_side(image_size, "distillation needs")
        if config.weights is None:
            raise UsageError(_NO_WEIGHTS)
        return OneView(config, image_size)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return one minus the cosine, over cells and levels. Metrics: each level's cosine."""
        wanted = self._taught(batch)
        features = self.through(self.backbone(self._seen(batch, self.backbone)))
        cosines = {}
        for name, level, projection in zip(
            ("stride_8", "stride_16", "stride_32"), features, self.projections, strict=True
        ):
            target = functional.interpolate(
                wanted, size=level.shape[2:], mode="bilinear", antialias=True
            )
            found = projection(level).float()
            cosines[name] = functional.cosine_similarity(found, target, dim=1).mean()
        loss = 1 - torch.stack(list(cosines.values())).mean()
        return StepOutput(loss, {f"cosine_{k}": v.detach() for k, v in cosines.items()})

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the view as it was cut and as the student sees it."""
        backbone = self.backbone
        seen = colour.denormalise(self._seen(batch, backbone), backbone.mean, backbone.std)
        return {"view": batch["view"].cpu().permute(0, 3, 1, 2), "view_seen": seen}

    def _seen(self, batch: dict[str, Tensor], by: Backbone | TimmTeacher) -> Tensor:
        return colour.apply(batch["view"], batch["colour"], by.mean, by.std)

    @torch.no_grad()
    def _taught(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the teacher's map, float32, at a sixteenth or a thirty-second of the view."""
        teacher = self.teacher
        image = self._seen(batch, teacher)
        side = image.shape[2] // (16 if teacher.stride <= 16 else 32) * teacher.stride
        if side != image.shape[2]:
            image = functional.interpolate(image, size=side, mode="bilinear", antialias=True)
        found: Tensor = teacher(image)
        return found.float()


_NO_WEIGHTS = (
    "task.weights is not set (of several tasks: task.distill.weights): name a file with the "
    "teacher's weights (a timm checkpoint of task.teacher, .safetensors or .pt). Nothing is "
    "downloaded."
)
