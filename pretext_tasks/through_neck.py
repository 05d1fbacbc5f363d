"""What tasks have in common that compare all three levels: a backbone's, or a trained neck's."""

from __future__ import annotations

from typing import Literal

from torch import nn

from groundwork.backbones.contract import STRIDES, Backbone, Level, Pyramid
from groundwork.necks.yolo12 import Features, YOLO12Neck
from pretext_tasks.contract import PretextTask

Letter = Literal["n", "s", "m", "l", "x"]


class ThroughNeck(PretextTask):
    """A task on C3 to C5, or with a `letter` on P3 to P5 of a YOLOv12 neck that learns too."""

    def __init__(self, backbone: Backbone, letter: Letter | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = None if letter is None else YOLO12Neck(backbone.levels, letter)

    @property
    def levels(self) -> tuple[Level, Level, Level]:
        """Stride and channels of what `through` gives."""
        if self.neck is None:
            return self.backbone.levels
        p3, p4, p5 = map(Level, STRIDES, self.neck.channels)
        return p3, p4, p5

    def through(self, pyramid: Pyramid) -> Pyramid | Features:
        """Return what the neck makes of the backbone's maps, or these where there is no neck."""
        if self.neck is None:
            return pyramid
        features: Features = self.neck(pyramid)
        return features

    def product(self) -> dict[str, nn.Module]:
        """Return the backbone, and the neck where there is one."""
        if self.neck is None:
            return {"backbone": self.backbone}
        return {"backbone": self.backbone, "neck": self.neck}
