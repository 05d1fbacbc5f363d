"""What tasks have in common that train a whole detector: backbone, neck and head, on given boxes.

The head, the assignment and the loss are the second stage's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from finetune.assign import Targets
from finetune.detector import Limits, own_width, suppress
from finetune.head import DetectionHead
from finetune.losses import DetectionLoss
from finetune.recipe import LossKeys
from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.modes import evaluating
from pretext_tasks.contract import StepOutput
from pretext_tasks.through_neck import Letter, ThroughNeck

# Brightness, contrast, saturation and hue are BYOL's; there is less grayscale, no solarisation, and
# a blur that leaves small things to be seen.
COLOUR = Colour(grayscale=0.1, blur=0.3, blur_sigma=(0.1, 1.0))

Boxes = Literal["score", "equal", "class"]  # the second stage's loss.boxes

_SHOWN = 30  # boxes that are drawn, at most, of those found with a score of at least
_SCORE = 0.1


class WholeDetector(ThroughNeck):
    """Backbone, neck (`neck`: its width; auto: the backbone's own) and a head of `classes`."""

    rank_matters = False

    def __init__(
        self, backbone: Backbone, neck: Letter | Literal["auto"], classes: int, boxes: Boxes
    ) -> None:
        super().__init__(backbone, own_width(backbone.name) if neck == "auto" else neck)
        self.head = DetectionHead([level.channels for level in self.levels], classes)
        self._loss = DetectionLoss(LossKeys(boxes=boxes))

    def detection_loss(
        self, image: Tensor, targets: Targets, ignored: Targets | None = None
    ) -> StepOutput:
        """Return the loss of normalised pictures N C H W. Metrics: its parts."""
        raw = self.head(self.through(self.backbone(image)))
        with torch.autocast(image.device.type, enabled=False):
            size = (image.shape[2], image.shape[3])
            loss = self._loss(self, raw, size, targets, ignored=ignored)
        return StepOutput(loss.total, loss.parts)

    def coloured(self, pictures: Tensor, drawn: Tensor) -> Tensor:
        """Return pictures (uint8 N H W C) as the backbone wants them, in the colours drawn."""
        return colour.apply(pictures, drawn, self.backbone.mean, self.backbone.std)

    @torch.no_grad()
    def with_boxes(self, image: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Draw boxes (for each picture K 4) into what the network sees, and what it finds."""
        seen = colour.denormalise(image, self.backbone.mean, self.backbone.std)
        height, width = image.shape[2], image.shape[3]
        with evaluating(self):
            raw = self.head(self.through(self.backbone(image)))
        with torch.autocast(image.device.type, enabled=False):
            decoded = zip(*self.head.read(raw, height, width), strict=True)
        told, found = [], []
        for row, (boxes, scores) in enumerate(decoded):
            told.append(_drawn(seen[row], wanted[row]))
            best = suppress(boxes, scores, Limits(_SCORE, 0.5, _SHOWN))
            limits = boxes.new_tensor([width, height, width, height])
            found.append(_drawn(seen[row], best.boxes.clamp(min=0).minimum(limits)))
        return torch.stack(told), torch.stack(found)


def _drawn(picture: Tensor, boxes: Tensor) -> Tensor:
    """Draw boxes into a copy of a picture, uint8 3 H W on the CPU."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes.tolist():
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=(0, 255, 0))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
