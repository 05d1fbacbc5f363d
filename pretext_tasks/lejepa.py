"""LeJEPA: all views of a picture lie near one point, and the points of all pictures are Gaussian.

Balestriero and LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the
Heuristics", arXiv 2511.08544. Large and small views go through backbone and projector; the first
term draws each projection to the mean of its picture's large views, the second (SIGReg) compares
the batch's projections along random directions with a normal distribution, by their characteristic
functions (Epps and Pulley). One weight joins the two. No teacher, no predictor, no negatives, no
stopped gradient: nothing that wants large batches or a schedule of its own.

Differs from the paper:
- The representation is C5 averaged over its cells; a backbone of a detector, not a transformer.
- The random directions are drawn with the views, 16 with each picture, so that a run that is
  resumed draws the same; of the global batch's all processes use the same first `directions`.
- Colours are clamped once, and hue turns about RGB's grey axis: groundwork/colour.py.
- `window_scale` may cut all views from a random part of the picture; off by default.
- `rotate` may turn views by quarter turns (pictures without an up); 0 by default.
- BatchNorm statistics are those of the large and of the small views, each by themselves, and per
  process unless the loop converts to SyncBatchNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from lightly.utils import dist
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import MLP

from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour, Probability
from groundwork.config import Section, starting_from
from groundwork.data.decode import Picture
from pretext_tasks.contract import PretextTask, StepOutput, Views
from pretext_tasks.crops import AreaRange, RatioRange
from pretext_tasks.multi_crop import Crops, MultiCrop, coloured, seen
from pretext_tasks.two_views import Width, spread

_DRAWN = 16  # directions with each picture

# After DINO's (arXiv 2104.14294), one rule for all views.
COLOUR = Colour(
    probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale=0.2,
    blur=0.5,
    solarise=0.1,
)


class LeJEPAConfig(Section):
    """The authors' values where their example or lightly's loss states them; views are ours."""

    hidden_width: Width = 2048  # the authors' example: two hidden layers with BatchNorm
    projection_width: Width = 16  # the same
    projector_batch_norm: bool = True  # the same
    gaussian: Probability = 0.05  # lambda, the weight of SIGReg, as lightly has it
    directions: Width = 1024  # at most; 16 are drawn with each picture, a batch of 64 has them all
    large_views: Width = 2  # ours
    small_views: int = Field(default=6, ge=0)  # ours
    small_size: Width = 96  # pixels, a multiple of 32
    window_scale: AreaRange = (1.0, 1.0)  # ours; see pretext_tasks/two_views.py
    large_scale: AreaRange = (0.3, 1.0)  # part of the picture's area
    small_scale: AreaRange = (0.05, 0.3)
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # width to height, log-uniform
    flip: Probability = 0.5
    rotate: Probability = 0.0  # ours; 0.75 makes the four directions equally likely
    colour: Annotated[Colour, starting_from(COLOUR)] = COLOUR


@dataclass(frozen=True)
class LeJEPAViews:
    """Cuts the views, and draws this picture's part of the directions."""

    crops: MultiCrop
    directions: tuple[int, int]

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Return large and small (uint8 V H W C), their colours, directions (float32 M D)."""
        entries = self.crops(picture, generator)
        entries["directions"] = generator.standard_normal(self.directions, dtype=np.float32)
        return entries


class GivenDirections(SIGReg):  # type: ignore[misc]  # lightly says nothing of its types
    """lightly's SIGReg along directions that were drawn in the workers.

    Its own are drawn from the device's generator, of which a task must not draw.
    """

    def __init__(self, most: int = 1024) -> None:
        super().__init__(gather_distributed=True)
        self._most = most
        self._given: Tensor | None = None

    def along(self, projection: Tensor, directions: Tensor) -> Tensor:
        """Return the statistic of V N D along directions N M D of this process and all others."""
        given = directions.flatten(0, 1)
        every = torch.cat(dist.gather(given)) if dist.world_size() > 1 else given
        self._given = every[: self._most]
        statistic: Tensor = self(projection)
        self._given = None
        return statistic

    def _generate_unit_vectors(
        self, device: torch.device, dtype: torch.dtype, num_features: int
    ) -> Tensor:
        assert self._given is not None
        unit: Tensor = nn.functional.normalize(self._given.to(device, dtype), dim=1)
        return unit.T


class LeJEPA(PretextTask):
    """Backbone, projector, SIGReg and invariance; `backbone` is what is kept."""

    Config = LeJEPAConfig

    def __init__(self, backbone: Backbone, config: LeJEPAConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.gaussian = config.gaussian
        widths = [config.hidden_width, config.hidden_width, config.projection_width]
        norm = nn.BatchNorm1d if config.projector_batch_norm else None
        self.projector = MLP(backbone.levels[2].channels, widths, norm_layer=norm)
        self.sigreg = GivenDirections(config.directions)

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of large views (of `image_size`) and small ones."""
        kinds = {"large": Crops(config.large_views, image_size, config.large_scale)}
        if config.small_views:
            kinds["small"] = Crops(config.small_views, config.small_size, config.small_scale)
        crops = MultiCrop(
            kinds, config.window_scale, config.crop_ratio, config.flip, config.rotate, config.colour
        )
        return LeJEPAViews(crops, (_DRAWN, config.projection_width))

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return lambda SIGReg + (1 - lambda) invariance, over every view.

        Metrics: the two terms, and the spread of the first large view's projections.
        """
        large = self._projected(batch, "large")
        every = torch.cat((large, self._projected(batch, "small"))) if "small" in batch else large
        # Cosines of products want float32, whatever the loop's autocast is.
        with torch.autocast(every.device.type, enabled=False):
            invariance = lejepa_invariance_loss(all_proj=every, global_proj=large)
            gaussian = self.sigreg.along(every, batch["directions"])
            loss = self.gaussian * gaussian + (1 - self.gaussian) * invariance
        metrics = {
            "invariance": invariance.detach(),
            "gaussian": gaussian.detach(),
            "projection_spread": spread(large[0]),
        }
        return StepOutput(loss, metrics)

    def product(self) -> dict[str, nn.Module]:
        """Return the backbone."""
        return {"backbone": self.backbone}

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the views as the network sees them."""
        kinds = [kind for kind in ("large", "small") if kind in batch]
        return {k: v for kind in kinds for k, v in seen(batch, kind, self.backbone).items()}

    def _projected(self, batch: dict[str, Tensor], kind: str) -> Tensor:
        """Return the projections of a kind's views, float32 V N D."""
        image = coloured(batch, kind, self.backbone)
        projection: Tensor = self.projector(self.backbone(image).c5.mean((2, 3)))
        return torch.stack(projection.float().chunk(batch[kind].shape[1]))
