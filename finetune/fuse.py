"""A detector made ready to look at pictures: a copy without BatchNorm, which computes the same.

In eval mode BatchNorm is a scale and a shift of every channel, so it is folded into the convolution
before it (arXiv 1712.05877, section 3.2), and SiLU overwrites its input: two passes less over every
feature map, which is what a small detector spends its time on. Results differ by float rounding.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from groundwork.backbones.yolo12 import ConvUnit

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class FusedUnit(nn.Module):
    """A ConvUnit in eval mode: one convolution with bias, and SiLU in place unless `linear`."""

    def __init__(self, unit: ConvUnit) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(unit.conv, unit.bn)
        self.linear = not isinstance(unit.activation, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """As ConvUnit's."""
        out: Tensor = self.conv(x)
        return out if self.linear else functional.silu(out, inplace=True)


@torch.no_grad()
def fused(module: ModuleT) -> ModuleT:
    """Return a copy in eval mode, in channels_last, with every ConvUnit fused.

    The module itself stays as it is. Modules of other libraries (timm) keep their BatchNorm.
    """
    twin = copy.deepcopy(module).eval()
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvUnit):
                setattr(parent, name, FusedUnit(child))
    return twin.to(memory_format=torch.channels_last)
