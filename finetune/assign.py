"""Which anchor points are to find which box: task-aligned assignment.

TOOD (Feng et al., arXiv 2108.07755, section 3.2): a point inside a box is the better suited the
higher its score s for the box's class and the overlap u of what it predicts with the box,
t = s^alpha * u^beta. The best `topk` points of every box are positive; a point that several boxes
want goes to the one it overlaps most. A positive point's class target is t, scaled so that the
best point of a box has the box's best overlap (the paper's normalisation).

alpha 0.5, beta 6 and 10 points are the values of the YOLO family (the paper has 1, 6 and 13).

Only pairs of a box and a point inside it are looked at: beside a mask of boxes times points, time
and memory grow with the area that boxes cover. Finding these pairs waits for the device.

Differs from the paper:
- The overlap is complete IoU (arXiv 1911.08287) clamped at 0, as the YOLO family has it.
- A box with sides shorter than its level's cell may hold no point. A side shorter than the
  smallest stride counts as that long when points are looked for, so that no box goes unseen. Where
  nothing that is predicted at its points overlaps it at all, which happens below 4 px, their target
  is 0 all the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss

from finetune.head import Anchors
from groundwork.backbones.contract import STRIDES


class Targets(NamedTuple):
    """The boxes of a batch, one after the other: what a loader makes of its labels.

    `image` G int64 (which picture of the batch), `boxes` G 4 (left, top, right, bottom in pixels),
    `classes` G int64.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor


class Assignment(NamedTuple):
    """The positive points of a batch, P of them.

    `image` and `point` P say which point, `target` P which row of Targets it is to find, `score` P
    (float32) what its class's score should be.
    """

    image: Tensor
    point: Tensor
    target: Tensor
    score: Tensor


@torch.no_grad()
def assign(
    boxes: Tensor,
    scores: Tensor,
    anchors: Anchors,
    targets: Targets,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Assign points to targets from predicted boxes N A 4 (pixels) and scores N A C (0..1)."""
    row, point = _inside(targets.boxes, anchors)
    image = targets.image[row]
    overlap = pairwise_ciou(boxes[image, point], targets.boxes[row]).clamp_(min=0)
    score = scores[image, point, targets.classes[row]]
    # In float64, where the sixth power of a hundredth is still a number like others: a small box
    # that is barely overlapped at first must not lose its targets.
    alignment = score.double() ** alpha * overlap.double() ** beta

    # The best points of each box, among those inside it.
    chosen = _best_of_each(row, alignment, len(targets.boxes), topk)
    row, point, image = row[chosen], point[chosen], image[chosen]
    overlap, alignment = overlap[chosen], alignment[chosen]

    # A point that several boxes want: the largest overlap, of equals the first box.
    place = image * len(anchors.points) + point
    places = len(boxes) * len(anchors.points)
    most = overlap.new_full((places,), -1.0).scatter_reduce_(0, place, overlap, "amax")
    wins = overlap == most[place]
    first = row.new_full((places,), len(targets.boxes))
    first.scatter_reduce_(0, place, torch.where(wins, row, len(targets.boxes)), "amin")
    # Rows and not a mask, which a GPU would be waited for at every use.
    kept = (wins & (row == first[place])).nonzero().squeeze(1)
    row, point, image = row[kept], point[kept], image[kept]
    overlap, alignment = overlap[kept], alignment[kept]

    size = len(targets.boxes)
    best_overlap = overlap.new_zeros(size).scatter_reduce_(0, row, overlap, "amax")
    best = alignment.new_zeros(size).scatter_reduce_(0, row, alignment, "amax")
    share = best_overlap[row] * alignment / best[row].clamp(min=1e-300)
    return Assignment(image, point, row, share.float())


def _inside(boxes: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Return the pairs (row of boxes, point) where the point lies inside the box."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    least = STRIDES[0] / 2  # of half a side
    narrow = half <= least
    half = half.clamp(min=least)
    low, high = middle - half, middle + half  # G 2
    # A side of one cell from point to point has that of its low edge, so that there is one.
    low = torch.where(narrow, torch.nextafter(low, low - 1), low)
    x, y = anchors.points.unbind(1)  # A
    inside = (x > low[:, :1]) & (x < high[:, :1]) & (y > low[:, 1:]) & (y < high[:, 1:])
    row, point = inside.nonzero(as_tuple=True)
    return row, point


def inside(boxes: Targets, anchors: Anchors, shape: torch.Size) -> Tensor:
    """Return bool N A C (`shape`): the points inside boxes, at the boxes' classes."""
    row, point = _inside(boxes.boxes, anchors)
    found = torch.zeros(shape, dtype=torch.bool, device=boxes.boxes.device)
    found[boxes.image[row], point, boxes.classes[row]] = True
    return found


def _best_of_each(row: Tensor, alignment: Tensor, rows: int, topk: int) -> Tensor:
    """Return the pairs that are among the `topk` of their row, of equals those of the first."""
    # Sorted by row, and within a row from the best down: a pair's rank is its place behind the
    # first of its row. Both sorts are stable, so that equals keep the order of their points.
    order = torch.argsort(alignment, descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    counts = torch.bincount(row, minlength=rows)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(row), device=row.device) - starts[row[order]]
    return order[rank < topk]


def pairwise_ciou(first: Tensor, second: Tensor) -> Tensor:
    """Complete IoU of two rows of boxes (P 4), pair by pair; float32.

    torchvision's function of this name is of every box with every other; its loss is of pairs.
    """
    loss: Tensor = complete_box_iou_loss(with_area(first.float()), with_area(second.float()))
    return 1 - loss


def with_area(boxes: Tensor) -> Tensor:
    """Give boxes sides of a thousandth of a pixel at least: an angle without height is NaN."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat((low, torch.maximum(high, low + 1e-3)), 1)
