"""The maps that a frozen backbone, and a neck, make of pictures that are held in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundwork.backbones.contract import Backbone
from groundwork.colour import normalise
from groundwork.necks.yolo12 import Features

_AT_ONCE = 16  # pictures of a forward


@torch.no_grad()
def feature_maps(backbone: Backbone, neck: nn.Module | None, pixels: Tensor) -> Features:
    """Return maps at strides 8, 16 and 32 of uint8 N side side 3, in float32, on the device.

    Without a neck they are the backbone's. The modes of both are as they are.
    """
    device = next(backbone.parameters()).device
    parts = []
    for batch in torch.split(pixels, _AT_ONCE):
        maps = backbone(normalise(batch.to(device), backbone.mean, backbone.std))
        parts.append(maps if neck is None else neck(maps))
    p3, p4, p5 = (torch.cat(levels).float() for levels in zip(*parts, strict=True))
    return Features(p3, p4, p5)
