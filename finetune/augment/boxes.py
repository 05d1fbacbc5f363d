"""What becomes of boxes: which survive a cut, and where they lie after a transform.

A box is (left, top, right, bottom) in pixels, edges of an area and not centres of pixels.

The rule. A box that was cut survives when both hold:
- its sides, clipped to what can be seen, are at least `min_side` pixels (2: what the YOLO family
  uses; under it a box is less than a quarter of a cell of the finest level, at stride 8);
- at least `min_visible` of the area that it had before this transform can be seen. The default of
  a quarter is a choice, not yet a measurement: the YOLO family keeps a tenth, of which little can
  be recognised, and SSD (arXiv 1512.02325, section 2.2) boxes whose centre lies inside, about half.
The share is taken anew at every transform: two cuts may leave less than `min_visible`, and where a
grid hides one part of an object and a later window cuts off the other, nothing.
A crowd survives as long as any of it can be seen: what is left of it is not to be background.

A box that is partly hidden (by a grid, a cutout, a pasted rectangle) keeps its edges: it tells how
far the object reaches, not which of its pixels can be seen. Only where a pasted rectangle covers a
whole side of it does it end there, as at the picture's edge.

A linear map makes of a box a parallelogram, and the new box encloses it. For a rotation that box is
looser than the object, which rarely fills its corners: a disc turned by 10 degrees gets a box that
is 16 % too wide. `ellipse` encloses the ellipse that the old box encloses instead (Kalra et al.,
"Towards Rotation Invariance in Object Detection", arXiv 2109.13488): exact for a disc, and for
cells near to it, but it cuts the corners of what does fill its box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float32]  # N 4
Mask = npt.NDArray[np.bool_]  # N
Matrix = npt.NDArray[np.float64]  # 2 3: point -> matrix[:, :2] @ point + matrix[:, 2]
Enclose = Literal["corners", "ellipse"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which boxes survive: see the module's docstring."""

    min_visible: float = 0.25
    min_side: float = 2.0

    def clip(
        self,
        boxes: Boxes,
        window: tuple[float, float, float, float],
        classes: npt.NDArray[np.int64],
    ) -> tuple[Boxes, Mask]:
        """Clip the boxes to a window, and say which of them survive; both have N rows.

        A box that is NaN, or inverted, or without area, does not survive.
        """
        clipped = np.clip(boxes, np.array(window[:2] * 2), np.array(window[2:] * 2))
        clipped = clipped.astype(np.float32)
        return clipped, self.keeps(clipped, area(boxes), area(clipped), classes)

    def keeps(
        self,
        boxes: Boxes,
        whole: npt.NDArray[np.float32],
        visible: npt.NDArray[np.float32],
        classes: npt.NDArray[np.int64],
    ) -> Mask:
        """Say which boxes survive, N, of whose area `whole` the area `visible` can be seen.

        `classes` are as an Item's: below 0 for crowds.
        """
        kept: Mask = np.all(boxes[:, 2:] - boxes[:, :2] >= self.min_side, axis=1)
        kept &= (visible >= self.min_visible * whole) & (whole > 0)
        return np.where(classes < 0, (visible > 0) & (whole > 0), kept)


def area(boxes: Boxes) -> npt.NDArray[np.float32]:
    """Return the areas, N; an inverted box has none."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    product: npt.NDArray[np.float32] = sides[:, 0] * sides[:, 1]
    return product


def overlap(boxes: Boxes, window: tuple[float, float, float, float]) -> npt.NDArray[np.float32]:
    """Return the area of each box, N, that lies inside a window."""
    low = np.maximum(boxes[:, :2], np.array(window[:2], np.float32))
    high = np.minimum(boxes[:, 2:], np.array(window[2:], np.float32))
    return area(np.concatenate([low, high], axis=1))


def moved(boxes: Boxes, left: float, top: float) -> Boxes:
    """Move boxes to the right and down."""
    return boxes + np.array([left, top, left, top], np.float32)


def scaled(boxes: Boxes, horizontal: float, vertical: float) -> Boxes:
    """Scale boxes about the origin."""
    return boxes * np.array([horizontal, vertical, horizontal, vertical], np.float32)


def mapped(boxes: Boxes, matrix: Matrix, enclose: Enclose = "corners") -> Boxes:
    """Map boxes by a 2 x 3 matrix, and enclose what they become."""
    centre = (boxes[:, :2] + boxes[:, 2:]).astype(np.float64) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64) / 2
    centre = centre @ matrix[:, :2].T + matrix[:, 2]
    if enclose == "corners":
        half = half @ np.abs(matrix[:, :2]).T
    else:
        half = np.sqrt(half**2 @ (matrix[:, :2] ** 2).T)
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def uncovered(boxes: Boxes, cover: tuple[float, float, float, float]) -> Boxes:
    """Return the boxes that enclose what an opaque rectangle leaves to be seen of each.

    Only where the rectangle covers one whole side of a box does the box change; one that is
    covered altogether is left without area.
    """
    left, top, right, bottom = boxes.T
    rows = (cover[1] <= top) & (cover[3] >= bottom)  # covered from the top to the bottom
    columns = (cover[0] <= left) & (cover[2] >= right)
    seen = boxes.copy()
    at_left = rows & (cover[0] <= left) & (cover[2] > left)
    seen[at_left, 0] = np.minimum(cover[2], right[at_left])
    at_right = rows & (cover[2] >= right) & (cover[0] < right)
    seen[at_right, 2] = np.maximum(cover[0], left[at_right])
    at_top = columns & (cover[1] <= top) & (cover[3] > top)
    seen[at_top, 1] = np.minimum(cover[3], bottom[at_top])
    at_bottom = columns & (cover[3] >= bottom) & (cover[1] < bottom)
    seen[at_bottom, 3] = np.maximum(cover[1], top[at_bottom])
    return seen
