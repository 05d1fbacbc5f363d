"""The anchor-free head: for every cell, four distances to a box's sides and a logit a class.

Layer 21 of YOLOv12 (arXiv 2502.12524), decoupled as in YOLOX (arXiv 2107.08430): one branch for
boxes, one for classes, at each of P3, P4 and P5. A side's distance from the anchor point (the
centre of the cell) is the expectation over 16 bins, in strides (distribution focal loss's general
distribution, arXiv 2006.04388, section 3.2). `objectness` adds a third branch with one logit a
cell, as YOLO had it before; scores are then its product with the class's.

Biases start so that a class is found in five of the cells of a 640 px picture, and so that a side
is `_START_STRIDES` away: boxes of 32, 64 and 128 px at the three levels, of which small boxes share
enough to be learned from. (Bins that start even, as the YOLO family has them, make boxes of 120 px
at P3; a box of 14 px then overlaps its best cell by a hundredth, and learns last.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundwork.backbones.contract import STRIDES
from groundwork.backbones.yolo12 import ConvUnit
from groundwork.necks.yolo12 import Features

BINS = 16
_START_SIZE = 640  # pixels: the side of picture that the biases are made for
_START_STRIDES = 2.0  # mean of the bins that box biases make


class Raw(NamedTuple):
    """Logits of every anchor point, P3's first, row by row: what losses and decoding start from.

    `boxes` N A 64 (left, top, right, bottom times 16 bins), `classes` N A C, `objectness` N A, or
    None without that branch.
    """

    boxes: Tensor
    classes: Tensor
    objectness: Tensor | None = None


class Anchors(NamedTuple):
    """Where the anchor points are: `points` A 2 (x, y) in pixels, `strides` A in pixels."""

    points: Tensor
    strides: Tensor


class DetectionHead(nn.Module):
    """Box and class branches over Features of these channels."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, *, objectness: bool = False
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"A detector needs at least one class, not {num_classes}.")
        self.num_classes = num_classes
        first = channels[0]
        box_width = max(16, first // 4, 4 * BINS)
        class_width = max(first, min(num_classes, 100))
        self.boxes = nn.ModuleList(
            nn.Sequential(
                ConvUnit(c, box_width, 3),
                ConvUnit(box_width, box_width, 3),
                nn.Conv2d(box_width, 4 * BINS, 1),
            )
            for c in channels
        )
        self.classes = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(ConvUnit(c, c, 3, groups=c), ConvUnit(c, class_width)),
                nn.Sequential(
                    ConvUnit(class_width, class_width, 3, groups=class_width),
                    ConvUnit(class_width, class_width),
                ),
                nn.Conv2d(class_width, num_classes, 1),
            )
            for c in channels
        )
        self.objectness = (
            nn.ModuleList(
                nn.Sequential(ConvUnit(c, box_width, 3), nn.Conv2d(box_width, 1, 1))
                for c in channels
            )
            if objectness
            else None
        )
        # The bins' places as a fixed 1x1 convolution, which is how the public tensors count them.
        self.bins = nn.Parameter(torch.arange(float(BINS)), requires_grad=False)
        self.dropout: nn.Module = nn.Identity()  # finetune/regularize.py may put one here
        self._start()

    def forward(self, features: Features) -> Raw:
        """Return the logits of all cells of all levels."""
        features = Features(*(self.dropout(level) for level in features))
        boxes = _joined(self.boxes, features)
        classes = _joined(self.classes, features)
        if self.objectness is None:
            return Raw(boxes, classes)
        return Raw(boxes, classes, _joined(self.objectness, features).squeeze(2))

    def distances(self, boxes: Tensor) -> Tensor:
        """Turn box logits (..., 64) into distances (..., 4) in strides: the mean over the bins."""
        shares = boxes.reshape(*boxes.shape[:-1], 4, BINS).softmax(-1)
        return shares @ self.bins.to(shares.dtype)

    def decode(self, boxes: Tensor, anchors: Anchors) -> Tensor:
        """Turn box logits N A 64 into boxes N A 4: left, top, right, bottom in pixels."""
        distances = self.distances(boxes) * anchors.strides[:, None]
        return torch.cat(
            (anchors.points - distances[..., :2], anchors.points + distances[..., 2:]), -1
        )

    def read(self, raw: Raw, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Turn logits of pictures of height x width into boxes N A 4 in pixels and scores N A C."""
        boxes = self.decode(raw.boxes.float(), anchors_of(height, width, raw.boxes))
        scores = raw.classes.float().sigmoid()
        if raw.objectness is not None:
            scores = scores * raw.objectness.float().sigmoid().unsqueeze(-1)
        return boxes, scores

    def _start(self) -> None:
        """Set the last layers' biases."""
        # Shares that fall by the same factor from bin to bin: of infinitely many bins, factor
        # / (1 - factor) is the mean; of 16, it is a little less.
        factor = _START_STRIDES / (1 + _START_STRIDES)
        falling = (math.log(factor) * torch.arange(BINS)).repeat(4)
        for level, stride in enumerate(STRIDES):
            cells = (_START_SIZE / stride) ** 2
            with torch.no_grad():
                _bias(self.boxes[level]).copy_(falling)
            nn.init.constant_(_bias(self.classes[level]), math.log(5 / self.num_classes / cells))
            if self.objectness is not None:
                nn.init.constant_(_bias(self.objectness[level]), math.log(5 / cells))


def anchors_of(height: int, width: int, like: Tensor) -> Anchors:
    """Return the anchor points of pictures of height x width, on `like`'s device, in float32."""
    points, strides = [], []
    for stride in STRIDES:
        rows = (torch.arange(height // stride, device=like.device) + 0.5) * stride
        columns = (torch.arange(width // stride, device=like.device) + 0.5) * stride
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append(torch.stack((x, y), -1).flatten(0, 1))
        strides.append(torch.full((points[-1].shape[0],), float(stride), device=like.device))
    return Anchors(torch.cat(points), torch.cat(strides))


def _joined(branches: nn.ModuleList, features: Features) -> Tensor:
    """Run one branch at every level: N C H W of three levels -> N A C."""
    maps = [branch(level) for branch, level in zip(branches, features, strict=True)]
    return torch.cat([one.flatten(2) for one in maps], 2).transpose(1, 2)


def _bias(branch: nn.Module) -> Tensor:
    assert isinstance(branch, nn.Sequential)
    last = branch[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    return last.bias
