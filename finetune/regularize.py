"""Noise inside the network while it trains: DropBlock, spatial dropout, stochastic depth.

DropBlock (arXiv 1810.12890) zeroes squares of cells, in every channel others, torchvision's;
spatial dropout (arXiv 1411.4280) zeroes channels; both on P3, P4 and P5, before the head.
Stochastic depth (arXiv 1603.09382) drops residual branches of the backbone for single pictures, the
more often the deeper they lie (linear rule, section 3). In eval mode nothing is changed.

Random numbers come from torch's generator of the device, which the loop seeds at every step.

Differs from the papers:
- A block is odd, and at most half of a map's shorter side: on P5 of a 320 px picture a block of 7
  cells would be most of the map.
- DropBlock's probability is constant; the paper raises it over training.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import StochasticDepth, drop_block2d

from finetune.detector import Detector
from finetune.recipe import Regularize
from groundwork.backbones.yolo12 import AttentionBlock, Bottleneck
from groundwork.errors import UsageError


class FeatureNoise(nn.Module):
    """DropBlock and spatial dropout of one feature map."""

    def __init__(self, dropblock: float, block: int, spatial_dropout: float) -> None:
        super().__init__()
        self.probability = dropblock
        self.block = block
        self.spatial = nn.Dropout2d(spatial_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """N C H W -> the same shape."""
        if self.training and self.probability:
            block = max(1, min(self.block, min(x.shape[2:]) // 2))
            block -= 1 - block % 2  # torchvision wants an odd number
            x = drop_block2d(x, self.probability, block)
        out: Tensor = self.spatial(x)
        return out


def regularize(detector: Detector, config: Regularize) -> None:
    """Put the noise that a recipe asks for into a detector; state_dict keys stay the same.

    Raises UsageError for stochastic depth in a backbone that is not YOLOv12's.
    """
    if config.dropblock or config.spatial_dropout:
        detector.head.dropout = FeatureNoise(config.dropblock, config.block, config.spatial_dropout)
    if not config.stochastic_depth:
        return
    blocks = [
        module
        for module in detector.backbone.modules()
        if isinstance(module, AttentionBlock | Bottleneck)
    ]
    if not blocks:
        raise UsageError(
            f"regularize.stochastic_depth: {detector.backbone.name} has no residual branches of "
            "YOLOv12's; leave it at 0."
        )
    for number, block in enumerate(blocks, start=1):
        block.drop = StochasticDepth(config.stochastic_depth * number / len(blocks), "row")
