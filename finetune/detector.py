"""A detector: backbone, neck and head, and what turns its logits into boxes.

Source: YOLOv12 (arXiv 2502.12524); class-aware non-maximum suppression is torchvision's.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torchvision.ops import batched_nms

from finetune.head import DetectionHead, Raw
from groundwork.backbones import build_backbone
from groundwork.backbones.contract import Backbone
from groundwork.backbones.yolo12 import SCALES
from groundwork.errors import UsageError
from groundwork.necks.yolo12 import YOLO12Neck

Width = Literal["n", "s", "m", "l", "x"]

# Non-maximum suppression looks at no more than this many boxes of a picture, the best ones.
CANDIDATES = 30_000


class Limits(NamedTuple):
    """Which boxes of a detector count.

    Those of a score above `score` (0..1); of two boxes of one class whose intersection over union
    is above `iou` the better one; and at most `most` of a picture, the best ones.
    """

    score: float = 0.001
    iou: float = 0.7
    most: int = 300


DEFAULT_LIMITS = Limits()  # those of evaluation


class Detections(NamedTuple):
    """The boxes found in one picture, best first.

    `boxes` K 4 (left, top, right, bottom in pixels), `scores` K in 0..1, `classes` K int64.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class Detector(nn.Module):
    """Pictures normalised with the backbone's mean and std -> Raw logits of every anchor point.

    Sides are multiples of 32. Train and eval mode return the same thing; `predict` makes boxes.
    """

    def __init__(self, backbone: Backbone, neck: nn.Module, head: DetectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.scales: dict[str, float] = {}

    def lr_scales(self) -> dict[str, float]:
        """Say which parameters learn at another rate than the common one (groundwork/optim.py)."""
        return self.scales

    def forward(self, image: Tensor) -> Raw:
        """N C H W -> logits."""
        pyramid = self.backbone(image)
        features = self.neck(pyramid)
        raw: Raw = self.head(features)
        return raw

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """N C H W -> boxes N A 4 in pixels and scores N A C in 0..1, before any suppression."""
        return self.head.read(self(image), image.shape[2], image.shape[3])


def suppress(boxes: Tensor, scores: Tensor, limits: Limits = DEFAULT_LIMITS) -> Detections:
    """Keep the boxes of one picture (A 4 and A C) that no better box of their class overlaps.

    Every class with a score above that of `limits` is a box of its own, so a cell may give several.
    """
    cells, classes = (scores > limits.score).nonzero(as_tuple=True)
    found = scores[cells, classes]
    if len(found) > CANDIDATES:
        found, best = found.topk(CANDIDATES)
        cells, classes = cells[best], classes[best]
    kept = batched_nms(boxes[cells], found, classes, limits.iou)[: limits.most]
    return Detections(boxes[cells[kept]], found[kept], classes[kept])


def build_detector(
    name: str,
    num_classes: int = 80,
    *,
    width: str | None = None,
    objectness: bool = False,
    in_channels: int = 3,
) -> Detector:
    """Build a detector with random weights: yolo12n to yolo12x, or timm/<model>.

    `width` (n, s, m, l, x) chooses neck and head; None is the backbone's own letter, and n for
    timm. `in_channels` is how many channels its pictures have. Raises UsageError for names that
    are not known.
    """
    if width is not None and width not in SCALES:
        raise UsageError(f"width={width} is not one of {', '.join(SCALES)}.")
    backbone = build_backbone(name, in_channels)
    neck = YOLO12Neck(backbone.levels, width or own_width(name))
    head = DetectionHead(neck.channels, num_classes, objectness=objectness)
    return Detector(backbone, neck, head)


def own_width(name: str) -> Width:
    """Return the width of neck and head that goes with a backbone: its own letter, n for timm's."""
    letter: Any = name.removeprefix("yolo12")
    return letter if letter in SCALES else "n"
