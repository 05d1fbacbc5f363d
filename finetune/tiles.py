"""Large pictures in overlapping tiles: where the tiles lie, and one list of boxes from all of them.

What: the detector looks at every tile at the picture's own resolution, and at the whole picture
made smaller. Why: cars of 20 pixels in a picture of 8000 are gone once it is 640 pixels wide, and
what is larger than a tile is seen whole in the small picture alone.

Two tiles that lie side by side share a strip. A box that touches an inner edge of its tile (within
2 pixels, or a twentieth of its own side, since no detector hits the edge exactly) is a piece: its
object may go on behind the edge. All others are clear. So that each object is found once:

1. A piece that lies in the strip, clear of the strip's far side, is dropped: the neighbour sees
   all of it and what lies behind the edge.
2. A box of the whole picture that is smaller than the strips is dropped if it shares more than
   half of the smaller area with a clear box of its class: a tile saw the same, and saw it better.
3. The clear boxes and those of the whole picture go through class-aware non-maximum suppression.
4. A piece of whose area one of these, of its class, covers more than half is dropped.
5. Of the pieces that are left, those of one class that agree where their tiles overlap (IoU above
   0.5 of what lies in both) are one object that no tile saw whole: the box around them all stands
   for them, with the best of their scores. Steps 3 and 4 are repeated for these.

So an object smaller than the strips is seen whole by some tile, and a larger one that the small
picture did not show is put together from its pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from finetune.detector import Detections, Limits
from groundwork.data.tiles import Tile, tiles_of

# A picture is cut when its longer side is over so many tiles: below, the whole shows as much.
WORTH = 1.5
_EDGE = 2.0  # pixels
_EDGE_SHARE = 0.05  # of a box's side across the edge
_COVERED = 0.5  # share of a piece's area
_AGREE = 0.5  # IoU

Pixels = npt.NDArray[np.uint8]
# Areas of one size (H W C each) and the longer side, in pixels, that the detector is to see them
# with -> the boxes in each, in its own pixels.
Find = Callable[[Sequence[Pixels], int], list[Detections]]


def needs_tiles(width: int, height: int, tile: int) -> bool:
    """Tell whether a picture is large enough to be cut."""
    return max(width, height) > WORTH * tile


def find_in_tiles(
    pixels: Pixels,
    find: Find,
    *,
    image_size: int,
    tile: int,
    overlap: float,
    limits: Limits,
    at_once: int = 1,
    most: int | None = None,
) -> Detections:
    """Look at a picture (H W C) in tiles, `at_once` in a batch, and `image_size` long, as a whole.

    The boxes are on the CPU, best first; `limits` are those of a tile, and `most` is how many boxes
    the picture may have (None: all).
    """
    height, width = pixels.shape[:2]
    tiles = tiles_of(width, height, tile, overlap)
    areas = [pixels[top:bottom, left:right] for left, top, right, bottom in tiles]
    longer = max(areas[0].shape[:2])  # all tiles are of one size
    found = []
    for first in range(0, len(tiles), at_once):
        part = slice(first, first + at_once)
        for (left, top, _, _), one in zip(tiles[part], find(areas[part], longer), strict=True):
            shift = torch.tensor([left, top, left, top], dtype=one.boxes.dtype)
            found.append(one._replace(boxes=one.boxes + shift))
    [whole] = find([pixels], image_size)
    return merge(tiles, found, whole, limits.iou, most)


def merge(
    tiles: Sequence[Tile],
    found: Sequence[Detections],
    whole: Detections,
    iou: float,
    most: int | None = None,
) -> Detections:
    """Make one list of the boxes of tiles and of the whole picture, all in the picture's pixels.

    `tiles` are those of tiles_of; boxes of a class may overlap as far as `iou`, and the best `most`
    are kept (None: all). The rule is in the module's docstring.
    """
    seams = _Seams(tiles)
    every = _joined(found)
    counts = torch.tensor([len(one.boxes) for one in found])
    origin = torch.arange(len(tiles)).repeat_interleave(counts)
    piece, dropped = seams.judge(every.boxes, origin)
    clear = _chosen(every, ~piece)
    small = (whole.boxes[:, 2:] - whole.boxes[:, :2]).amax(1) < seams.narrowest
    whole = _chosen(whole, ~(small & _covered(whole, clear, either=True)))
    clear = _suppressed(_joined([clear, whole]), iou)
    rest = (piece & ~dropped).nonzero().squeeze(1)
    rest = rest[~_covered(_chosen(every, rest), clear)]
    together = _put_together(_chosen(every, rest), seams.areas[origin[rest]])
    together = _suppressed(_chosen(together, ~_covered(together, clear)), iou)
    result = _joined([clear, together])
    return _chosen(result, result.scores.argsort(descending=True, stable=True)[:most])


class _Seams:
    """The inner edges of tiles, and how far the neighbour behind each reaches back."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self.areas = torch.tensor(tiles, dtype=torch.float64)  # T 4
        # As `areas`: where the strip that is shared with the neighbour behind an edge ends. For an
        # edge of the picture it is infinitely far outside, so that nothing touches or lies in it.
        self.strips = torch.empty_like(self.areas)
        for axis in (0, 1):
            firsts = sorted({tile[axis] for tile in tiles})
            lasts = sorted({tile[axis + 2] for tile in tiles})
            for number, tile in enumerate(tiles):
                place = firsts.index(tile[axis])
                self.strips[number, axis] = lasts[place - 1] if place else -math.inf
                last = place + 1 == len(firsts)
                self.strips[number, axis + 2] = math.inf if last else firsts[place + 1]
        self.narrowest = float((self.strips - self.areas).abs().min())

    def judge(self, boxes: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Say of boxes K 4 of tiles K which are pieces, and which a neighbour sees better."""
        areas, strips = self.areas[origin], self.strips[origin]
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        near = (sides * _EDGE_SHARE).clamp(min=_EDGE)
        touches = ((boxes - areas).abs() <= near) & strips.isfinite()
        # A box beside its left edge lies in that strip if its right side does, clear of its end.
        clear = torch.cat(
            (
                boxes[:, 2:] < strips[:, :2] - near[:, :2],
                boxes[:, :2] > strips[:, 2:] + near[:, 2:],
            ),
            1,
        )
        return touches.any(1), (touches & clear).any(1)


def _put_together(pieces: Detections, areas: Tensor) -> Detections:
    """Join pieces (K) of the same object, of tiles K 4: each group becomes the box around it."""
    group = torch.arange(len(pieces.boxes))
    for number in range(len(group)):  # a row at a time: K K boxes may not fit into memory
        seen = _common(areas[number], areas)  # what this tile and the others both see
        own, others = _common(pieces.boxes[number], seen), _common(pieces.boxes, seen)
        shared = _area(_common(own, others))
        agrees = shared > _AGREE * (_area(own) + _area(others) - shared)
        agrees &= pieces.classes == pieces.classes[number]
        agrees[number] = True
        group[torch.isin(group, group[agrees])] = number
    joined = [_chosen(pieces, group == number) for number in sorted(set(group.tolist()))]
    boxes = [torch.cat((one.boxes[:, :2].amin(0), one.boxes[:, 2:].amax(0))) for one in joined]
    return Detections(
        torch.stack(boxes) if boxes else pieces.boxes,
        torch.stack([one.scores.max() for one in joined]) if boxes else pieces.scores,
        torch.stack([one.classes[0] for one in joined]) if boxes else pieces.classes,
    )


def _covered(found: Detections, by: Detections, *, either: bool = False) -> Tensor:
    """Say which boxes (K) share more than half of their area with one of their class in `by`.

    With `either` it is half of the smaller of the two areas.
    """
    result = torch.zeros(len(found.boxes), dtype=torch.bool)
    for number, box in enumerate(found.boxes):
        area = _area(box)
        least = torch.minimum(area, _area(by.boxes)) if either else area
        same = by.classes == found.classes[number]
        result[number] = (same & (_area(_common(box, by.boxes)) > _COVERED * least)).any()
    return result


def _common(one: Tensor, other: Tensor) -> Tensor:
    """Return what boxes (... 4) have in common; its right is left of its left where nothing is."""
    low = torch.maximum(one[..., :2], other[..., :2])
    return torch.cat((low, torch.minimum(one[..., 2:], other[..., 2:])), -1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _suppressed(found: Detections, iou: float) -> Detections:
    scores = found.scores.to(found.boxes.dtype)  # torchvision wants one type for both
    return _chosen(found, batched_nms(found.boxes, scores, found.classes, iou))


def _chosen(found: Detections, which: Tensor) -> Detections:
    return Detections(found.boxes[which], found.scores[which], found.classes[which])


def _joined(parts: Sequence[Detections]) -> Detections:
    return Detections(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
