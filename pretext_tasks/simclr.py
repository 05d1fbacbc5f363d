"""SimCLR: find the other view of a picture among the views of all other pictures of the batch.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", arXiv
2002.05709. Both views go through the backbone and a projector as one batch (algorithm 1); NT-Xent
(equation 1) asks each projection for its partner among the 2N - 1 others. With several processes
the projections are gathered, with gradients, so that the negatives are those of the global batch.

Differs from the paper:
- The representation is C5 averaged over its cells; the paper's ResNet ends in the same pooling.
- A backbone of a detector, not ResNet-50; widths of the head are settings with the paper's values.
- Colours are clamped once, and hue turns about RGB's grey axis: groundwork/colour.py.
- `window_scale` may cut both views from a random part of the picture; off by default.
- `rotate` may turn views by quarter turns (pictures without an up); 0, as in the paper, by default.
- BatchNorm statistics are per process unless the loop converts to SyncBatchNorm (the paper's
  section 2.2 aggregates them, since statistics per process let partners be told apart).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour, Probability
from groundwork.config import Section, starting_from
from pretext_tasks.contract import PretextTask, StepOutput, Views
from pretext_tasks.crops import AreaRange, RatioRange
from pretext_tasks.two_views import (
    TwoViews,
    Width,
    colour_both,
    seen_views,
    spread,
)

# Appendix A, colour distortion of strength s = 1.0; blur from the same appendix.
STRENGTH_1 = Colour(
    probability=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
    solarise=0.0,
)


class SimCLRConfig(Section):
    """The paper's values (arXiv 2002.05709)."""

    hidden_width: Width = 2048  # section 2.1: as wide as ResNet-50's representation
    projection_width: Width = 128  # section 2.1
    projector_batch_norm: bool = True  # as in the authors' code; the text does not say
    # Table 5: 0.1 is best at batch 4096 on ImageNet; appendix B.9: 0.5 on CIFAR-10 at 256 to 4096.
    temperature: Annotated[float, Field(gt=0.001)] = 0.1
    window_scale: AreaRange = (1.0, 1.0)  # ours; see pretext_tasks/two_views.py
    crop_scale: AreaRange = (0.08, 1.0)  # appendix A: part of the picture's area
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # appendix A: width to height
    flip: Probability = 0.5  # appendix A
    rotate: Probability = 0.0  # ours; 0.75 makes the four directions equally likely
    colour: Annotated[Colour, starting_from(STRENGTH_1)] = STRENGTH_1


class SimCLR(PretextTask):
    """Backbone, projector and NT-Xent; `backbone` is what is kept."""

    Config = SimCLRConfig

    def __init__(self, backbone: Backbone, config: SimCLRConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = SimCLRProjectionHead(
            backbone.levels[2].channels,
            config.hidden_width,
            config.projection_width,
            batch_norm=config.projector_batch_norm,
        )
        # Gathers where a process group is initialised, and only there.
        self.nt_xent = NTXentLoss(config.temperature, gather_distributed=True)

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of two views that are coloured by one rule."""
        return TwoViews(
            image_size,
            config.window_scale,
            config.crop_scale,
            config.crop_ratio,
            config.flip,
            config.rotate,
            (config.colour, config.colour),
        )

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return NT-Xent over view_1, view_2, colour_1, colour_2."""
        image = colour_both(batch, self.backbone)
        projection = self.projector(self.backbone(image).c5.mean(dim=(2, 3))).float()
        projection_1, projection_2 = projection.chunk(2)
        # Similarities divided by a temperature of 0.1 keep two digits in bfloat16: lightly's
        # products are taken out of the loop's autocast, which would round them.
        with torch.autocast(projection.device.type, enabled=False):
            loss = self.nt_xent(projection_1, projection_2)
            metrics = _metrics(projection_1.detach(), projection_2.detach())
        return StepOutput(loss, metrics)

    def product(self) -> dict[str, nn.Module]:
        """Return the backbone."""
        return {"backbone": self.backbone}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return both views as cut and as the network sees them."""
        return seen_views(batch, self.backbone)


def _metrics(projection_1: Tensor, projection_2: Tensor) -> dict[str, Tensor]:
    """Cosine of partners, and how often a partner is the nearest of this process's batch."""
    direction_1 = functional.normalize(projection_1, dim=1)
    direction_2 = functional.normalize(projection_2, dim=1)
    similarity = direction_1 @ direction_2.T  # N N
    partner = torch.arange(len(similarity), device=similarity.device)
    return {
        "cosine": similarity.diagonal().mean(),
        "partner_found": (similarity.argmax(dim=1) == partner).float().mean(),
        "projection_spread": spread(projection_1),
    }
