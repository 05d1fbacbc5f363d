"""The YOLOv12 neck: a top-down and a bottom-up path over C3, C4 and C5.

Layers 9 to 20 of the detector (Tian, Ye and Doermann, arXiv 2502.12524, on the path aggregation of
arXiv 1803.01534): C5 is upsampled and joined with C4, that with C3, which gives P3; then strided
convolutions go back down through P4 to P5. Inside are R-ELAN stages without attention, and a split
stage at the end.

It takes any backbone's levels: only the first convolution of a stage sees their channels. `letter`
(n, s, m, l, x) chooses its own widths and depths. A tensor is called `layers.<i>.` and then as in
the public exchange of YOLOv12 tensors, i being the layer's number there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Level, Pyramid
from groundwork.backbones.yolo12 import SCALES, AggregationStage, ConvUnit, SplitStage


class Features(NamedTuple):
    """What the head sees: N, C, H / stride, W / stride at strides 8, 16 and 32."""

    p3: Tensor
    p4: Tensor
    p5: Tensor


class YOLO12Neck(nn.Module):
    """Turns a Pyramid into Features; `channels` are those of P3, P4 and P5."""

    def __init__(self, levels: Sequence[Level], letter: str) -> None:
        super().__init__()
        scale = SCALES[letter]
        c3, c4, c5 = (level.channels for level in levels)
        p3, p4, p5 = map(scale.channels, (256, 512, 1024))
        repeats = scale.repeats(2)
        self.letter = letter
        self.channels = (p3, p4, p5)
        self.layers = nn.ModuleDict(
            {
                "11": AggregationStage(c5 + c4, p4, repeats),
                "14": AggregationStage(p4 + c3, p3, repeats),
                "15": ConvUnit(p3, p3, 3, 2),
                "17": AggregationStage(p3 + p4, p4, repeats),
                "18": ConvUnit(p4, p4, 3, 2),
                "20": SplitStage(p4 + c5, p5, repeats, ratio=0.5, deep=True),
            }
        )

    def forward(self, pyramid: Pyramid) -> Features:
        """Return P3, P4 and P5."""
        c3, c4, c5 = pyramid
        down = self.layers["11"](torch.cat((_doubled(c5), c4), 1))
        p3 = self.layers["14"](torch.cat((_doubled(down), c3), 1))
        p4 = self.layers["17"](torch.cat((self.layers["15"](p3), down), 1))
        p5 = self.layers["20"](torch.cat((self.layers["18"](p4), c5), 1))
        return Features(p3, p4, p5)


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
