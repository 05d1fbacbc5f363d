"""Several looks at one picture: mirrored and turned, and what is found in them made one.

A detector finds a box a little elsewhere in a mirrored picture. The mean of these boxes lies better
than each, and what is found in one look alone counts less. Boxes of a class that overlap are
brought together by weighted boxes fusion (Solovyev et al. 2019, arXiv 1910.13302, section 3): from
the best box down, each joins the fused box that it has most in common with, whose corners are the
mean of its members', weighed by their scores, and whose score is the mean over all looks, where a
look that has not found it counts as 0.

Differs from the paper: a look gives at most one box to a fused one, its best (a detector's own
suppression leaves few others); so a score is a mean and never above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import batched_nms

from finetune.detector import DEFAULT_LIMITS, Detector, Limits
from finetune.finder import DetectorFinder, Finder
from finetune.metrics import Found
from groundwork.errors import UsageError

# Mirrored or not, and then quarter turns counter-clockwise: the first 2, 4 or 8 of these.
_LOOKS = tuple((mirrored, turns) for turns in (0, 2, 1, 3) for mirrored in (False, True))
LOOKS = (1, 2, 4, 8)
_LEAST = 0.01  # the score of a box of one look that may join others

Boxes = npt.NDArray[np.float32]


def looking(detector: Detector, looks: int = 1, limits: Limits = DEFAULT_LIMITS) -> Finder:
    """Return a Finder that looks `looks` times: 1, 2, 4 or 8. Raises UsageError for others.

    2: as it is and mirrored left to right; 4: upside down, too; 8: all turns by quarters. 4 and 8
    are for pictures without an up.
    """
    if looks not in LOOKS:
        raise UsageError(f"looks={looks} is none of {', '.join(map(str, LOOKS))}.")
    if looks == 1:
        return DetectorFinder(detector, limits)
    each = limits._replace(score=min(limits.score, _LEAST))
    return LooksFinder(DetectorFinder(detector, each), looks, limits)


@dataclass(frozen=True)
class LooksFinder:
    """A Finder that asks another one several times; see `looking`.

    Boxes of two looks are of one thing where they are of one class and have more than `common` in
    common. `limits` are for what this gives.
    """

    finder: Finder
    looks: int
    limits: Limits = DEFAULT_LIMITS
    common: float = 0.55  # the paper's

    def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
        """Find boxes in frames (uint8 N H W C), best first."""
        looks: list[list[Found]] = []
        for mirrored, turns in _LOOKS[: self.looks]:
            seen = np.rot90(frames[:, :, ::-1] if mirrored else frames, turns, axes=(1, 2))
            found = self.finder(np.ascontiguousarray(seen))
            height, width = seen.shape[1:3]
            looks.append(
                [
                    one._replace(boxes=_turned_back(one.boxes, mirrored, turns, height, width))
                    for one in found
                ]
            )
        return [self._fused(of_frame) for of_frame in zip(*looks, strict=True)]

    def _fused(self, looks: Sequence[Found]) -> Found:
        found = fuse(looks, self.common)
        boxes, scores, classes = (torch.from_numpy(part) for part in found)
        kept = batched_nms(boxes, scores, classes, self.limits.iou).numpy()
        kept = kept[found.scores[kept] > self.limits.score][: self.limits.most]
        return Found(found.boxes[kept], found.scores[kept], found.classes[kept])


def _turned_back(boxes: Boxes, mirrored: bool, turns: int, height: int, width: int) -> Boxes:
    """Bring boxes (K 4) of a turned frame, height x width, to the frame as it was."""
    left, top, right, bottom = boxes.T
    for _ in range(turns):  # a turn back is clockwise
        left, top, right, bottom = height - bottom, left, height - top, right
        height, width = width, height
    if mirrored:
        left, right = width - right, width - left
    return np.stack((left, top, right, bottom), 1).astype(np.float32)


def fuse(looks: Sequence[Found], common: float) -> Found:
    """Make one of what several looks found in one frame, best first."""
    boxes = np.concatenate([one.boxes for one in looks]).astype(np.float64)
    scores = np.concatenate([one.scores for one in looks]).astype(np.float64)
    classes = np.concatenate([one.classes for one in looks])
    look = np.repeat(np.arange(len(looks)), [len(one.boxes) for one in looks])
    order = np.argsort(-scores, kind="stable")
    sums = np.zeros((len(order), 4))  # of each fused box: its members' corners by their scores
    means = np.zeros((len(order), 4))
    weights = np.zeros(len(order))
    kinds = np.zeros(len(order), np.int64)
    given = np.zeros((len(order), len(looks)), bool)  # which looks have a box in it
    count = 0
    for index in order:
        share = _iou(boxes[index], means[:count])
        share[(kinds[:count] != classes[index]) | given[:count, look[index]]] = 0
        place = int(share.argmax()) if count else 0
        if count == 0 or share[place] <= common:
            place, count = count, count + 1
            kinds[place] = classes[index]
        sums[place] += scores[index] * boxes[index]
        weights[place] += scores[index]
        means[place] = sums[place] / max(weights[place], 1e-12)
        given[place, look[index]] = True
    total = weights[:count] / len(looks)
    best = np.argsort(-total, kind="stable")
    return Found(means[best].astype(np.float32), total[best].astype(np.float32), kinds[best])


def _iou(box: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what a box has in common with each of K others."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = sides.clip(0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return np.asarray(common / np.maximum(areas - common, 1e-12))
