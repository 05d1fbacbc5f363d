"""BYOL: predict what a slowly moving copy of the network says about another view of the picture.

Grill et al. 2020, "Bootstrap Your Own Latent", arXiv 2006.07733. The online network (backbone,
projector, predictor) sees one view and predicts the target network's projection (backbone,
projector) of the other; the loss is 2 - 2 cos, summed over both directions (equation 2 and its
mirror, so 0 to 8). No gradient reaches the target: after every step its parameters move towards the
online ones, tau * target + (1 - tau) * online, with tau rising from its base to 1 by a cosine
(section 3.3). The target starts as a copy of the online network, heads included.

The predictor has to keep up: features stay spread while it is near the best predictor of the
target's projections, and collapse onto few directions where it lags (the paper's section 5 argues
from an optimal predictor; Tian et al., arXiv 2102.06810, show the dynamics). In the long runs of
the paper it keeps up at the common rate; in short ones `predictor_lr` of 10 makes it (LOG.md).

BatchNorm: each view goes through each network by itself, so that statistics are those of one view,
as in the paper. The target normalises by the statistics of its batch, as the online network does;
its running statistics are moving averages of what the target itself saw. They are kept in the
state_dict, never copied from the online network, and no loss depends on them.

Differs from the paper:
- The representation is C5 averaged over its cells; the paper's ResNet ends in the same pooling.
- A backbone of a detector, not ResNet-50; widths of the heads are settings with the paper's values.
- Colours are clamped once, and hue turns about RGB's grey axis: groundwork/colour.py.
- `window_scale` may cut both views from a random part of the picture; off by default.
- `rotate` may turn views by quarter turns (pictures without an up); 0, as in the paper, by default.
- BatchNorm statistics are per process unless the loop converts to SyncBatchNorm.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour, Probability
from groundwork.config import Section, starting_from
from pretext_tasks.contract import PretextTask, StepOutput, Views
from pretext_tasks.crops import AreaRange, RatioRange
from pretext_tasks.slow_copy import follow
from pretext_tasks.two_views import (
    TwoViews,
    Width,
    colour_both,
    seen_views,
    spread,
)

# Appendix B, table 6: T colours view 1, T' view 2.
VIEW_1 = Colour(
    probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale=0.2,
    blur=1.0,
    solarise=0.0,
)
VIEW_2 = VIEW_1.model_copy(update={"blur": 0.1, "solarise": 0.2})


class BYOLConfig(Section):
    """The paper's values (arXiv 2006.07733)."""

    hidden_width: Width = 4096  # section 3.3: projector and predictor
    projection_width: Width = 256  # section 3.3
    momentum: Probability = 0.996  # section 3.3: tau_base, for 1,000 epochs; 0.99 for 300
    predictor_lr: Annotated[float, Field(gt=0)] = 1.0  # times optim.lr; see the module
    window_scale: AreaRange = (1.0, 1.0)  # ours; see pretext_tasks/two_views.py
    crop_scale: AreaRange = (0.08, 1.0)  # appendix B: part of the picture's area
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # appendix B: width to height, log-uniform
    flip: Probability = 0.5  # appendix B
    rotate: Probability = 0.0  # ours; 0.75 makes the four directions equally likely
    colour_1: Annotated[Colour, starting_from(VIEW_1)] = VIEW_1
    colour_2: Annotated[Colour, starting_from(VIEW_2)] = VIEW_2


class BYOL(PretextTask):
    """Online and target network; `backbone` is what is kept."""

    Config = BYOLConfig

    def __init__(self, backbone: Backbone, config: BYOLConfig) -> None:
        super().__init__()
        width, hidden = config.projection_width, config.hidden_width
        self.momentum = config.momentum
        self.predictor_lr = config.predictor_lr
        self.backbone = backbone
        self.projector = BYOLProjectionHead(backbone.levels[2].channels, hidden, width)
        self.predictor = BYOLPredictionHead(width, hidden, width)
        self.target_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of two views that are coloured by different rules."""
        return TwoViews(
            image_size,
            config.window_scale,
            config.crop_scale,
            config.crop_ratio,
            config.flip,
            config.rotate,
            (config.colour_1, config.colour_2),
        )

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the symmetric loss over view_1, view_2, colour_1, colour_2."""
        image_1, image_2 = colour_both(batch, self.backbone).chunk(2)
        with torch.no_grad():
            target_1 = _project(self.target_backbone, self.target_projector, image_1)
            target_2 = _project(self.target_backbone, self.target_projector, image_2)
        prediction_1 = self.predictor(_project(self.backbone, self.projector, image_1))
        prediction_2 = self.predictor(_project(self.backbone, self.projector, image_2))
        cosine_1 = _cosine(prediction_1, target_2)
        cosine_2 = _cosine(prediction_2, target_1)
        metrics = {
            "cosine": ((cosine_1 + cosine_2) / 2).detach(),
            "projection_spread": spread(target_1),
        }
        return StepOutput((2 - 2 * cosine_1) + (2 - 2 * cosine_2), metrics)

    def after_step(self, progress: float) -> None:
        """Move the target's parameters towards the online ones (section 3.3)."""
        target = (self.target_backbone, self.target_projector)
        follow(target, (self.backbone, self.projector), self.momentum, progress)

    def lr_scales(self) -> dict[str, float]:
        """Say how much faster the predictor learns (groundwork/optim.py)."""
        names = [f"predictor.{name}" for name, _ in self.predictor.named_parameters()]
        return dict.fromkeys(names, self.predictor_lr)

    def product(self) -> dict[str, nn.Module]:
        """Return the online backbone."""
        return {"backbone": self.backbone}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return both views as cut and as the network sees them."""
        return seen_views(batch, self.backbone)


def _project(backbone: Backbone, projector: nn.Module, image: Tensor) -> Tensor:
    projection: Tensor = projector(backbone(image).c5.mean(dim=(2, 3)))
    return projection


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return functional.cosine_similarity(prediction.float(), target.float(), dim=1).mean()
