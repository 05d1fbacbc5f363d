"""Boxes and classes of one picture: the one form that every label format is brought to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Annotations:
    """What is labeled in one picture; all rows belong together, none for background.

    `boxes` is float32 N 4: left, top, right, bottom in upright pixels (EXIF applied), edges of the
    area and not centres of pixels. `classes` is int64 N. `crowd` is bool N: a box that stands for
    many objects, which evaluation ignores and training does not use.
    """

    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, boxes: Any, classes: Any, crowd: Any = None) -> Annotations:
        """Build from anything numpy reads; `crowd` None is no crowd at all."""
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        classes = np.asarray(classes, np.int64).reshape(-1)
        crowd = np.zeros(len(boxes), np.bool_) if crowd is None else np.asarray(crowd, np.bool_)
        if not len(boxes) == len(classes) == len(crowd):
            raise ValueError(f"{len(boxes)} boxes, {len(classes)} classes, {len(crowd)} crowd.")
        return cls(boxes, classes, crowd)

    def __len__(self) -> int:
        return len(self.boxes)
