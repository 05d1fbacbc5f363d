"""What boxes are worth: COCO's average precision and recall, precision over recall, confusion.

Source: the COCO evaluation (Lin et al., arXiv 1405.0312), computed by faster-coco-eval, whose
figures equal pycocotools' (a test compares all twelve). AP is the mean over IoU 0.50 to 0.95 and
over the classes that have boxes, with at most 100 boxes of each class in a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

from groundwork.data.annotations import Annotations

Floats = npt.NDArray[np.float64]
FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
# COCO looks at the best so many boxes of a class in a picture.
_COUNTED = 100
# Of the confusion matrix: boxes scored lower are not counted, pairs overlapping less do not match.
CONFUSION_SCORE, CONFUSION_IOU = 0.25, 0.5


class Found(NamedTuple):
    """The boxes that a detector found in one picture, as plain arrays.

    `boxes` K 4 (left, top, right, bottom in pixels: of the frame where a Finder gives them, of the
    picture itself where they are scored, which asks for no order), `scores` K, `classes` K.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]


class Truth(NamedTuple):
    """What is labeled in one picture, and the picture's size in pixels."""

    annotations: Annotations
    width: int
    height: int


@dataclass(frozen=True)
class Results:
    """COCO's figures, 0 to 1; None where nothing could be measured (no box of that kind).

    `per_class` has for each class ap, ap50, the number of boxes, the best F1 at IoU 0.5 (`f1`) and
    the score above which boxes are kept for it (`f1_score`); `recall` and `precision` (IoU 0.5:
    classes x 101) are what the curves are drawn from; `confusion` counts (classes + 1) x (classes +
    1), true classes down, found ones across, the last of both being background.
    """

    figures: Mapping[str, float | None]
    per_class: Mapping[str, Mapping[str, float | None]]
    pictures: int
    boxes: int
    recall: Floats = field(repr=False)
    precision: Floats = field(repr=False)
    confusion: npt.NDArray[np.int64] = field(repr=False)

    @property
    def ap(self) -> float:
        """The mean of AP over classes and IoU thresholds; 0 where nothing is labeled."""
        return self.figures["ap"] or 0.0

    @property
    def ap50(self) -> float:
        """AP at IoU 0.5."""
        return self.figures["ap50"] or 0.0

    @property
    def ap75(self) -> float:
        """AP at IoU 0.75."""
        return self.figures["ap75"] or 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what results.json holds."""
        return {
            **self.figures,
            "per_class": {name: dict(values) for name, values in self.per_class.items()},
            "pictures": self.pictures,
            "boxes": self.boxes,
            "confusion": self.confusion.tolist(),
        }


def score(found: Sequence[Found], truth: Sequence[Truth], names: Sequence[str]) -> Results:
    """Compare what was found with what is labeled, picture by picture."""
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} pictures were looked at, and {len(truth)} are labeled.")
    dataset = to_coco(truth, names)
    annotations = dataset["annotations"]
    real = [row["category_id"] for row in annotations if not row["iscrowd"]]
    counts = np.bincount(np.array(real, np.int64), minlength=len(names)).tolist()
    truth_index = COCO(dataset)
    rows = to_rows([_counted(one) for one in found])
    # An empty list cannot be loaded; a box that scores nothing anywhere changes no figure.
    found_index = truth_index.loadRes(rows) if rows else COCO({**dataset, "annotations": []})
    evaluation = COCOeval_faster(truth_index, found_index, "bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = {
        name: _figure(value) for name, value in zip(FIGURES, evaluation.stats[:12], strict=True)
    }
    precision, scores = (  # IoU, recall, class
        np.asarray(evaluation.eval[key])[:, :, :, 0, -1] for key in ("precision", "scores")
    )
    recall = np.linspace(0, 1, precision.shape[1])
    per_class: dict[str, dict[str, float | None]] = {
        name: {
            "ap": _figure(precision[:, :, number].mean()),
            "ap50": _figure(precision[0, :, number].mean()),
            "boxes": counts[number],
            **_best_f1(precision[0, :, number], recall, scores[0, :, number]),
        }
        for number, name in enumerate(names)
    }
    return Results(
        figures,
        per_class,
        pictures=len(truth),
        boxes=len(real),
        recall=recall,
        precision=precision[0].T.astype(np.float64),
        confusion=confusion(found, truth, len(names)),
    )


def to_coco(
    truth: Sequence[Truth], names: Sequence[str], files: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write labels in COCO's form: pictures numbered by their places, classes from 0.

    `files` are the pictures' file names.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (labeled, width, height) in enumerate(truth):
        named = {} if files is None else {"file_name": files[number]}
        images.append({"id": number, **named, "width": width, "height": height})
        for box, label, crowd in zip(
            labeled.boxes.tolist(), labeled.classes.tolist(), labeled.crowd.tolist(), strict=True
        ):
            wide, tall = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [box[0], box[1], wide, tall],
                    "area": wide * tall,
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def to_rows(found: Sequence[Found], ids: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """Write boxes in COCO's results form; `ids` are the pictures', else their places."""
    rows = []
    for number, (boxes, scores, classes) in enumerate(found):
        sides = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
        for box, value, label in zip(
            sides.tolist(), scores.tolist(), classes.tolist(), strict=True
        ):
            picture = number if ids is None else ids[number]
            rows.append({"image_id": picture, "category_id": label, "bbox": box, "score": value})
    return rows


def _counted(found: Found) -> Found:
    """Leave out what COCO would, before a row is made of it: a new detector finds 300 a picture."""
    if len(found.scores) <= _COUNTED:
        return found
    order = np.argsort(-found.scores, kind="stable")  # as COCO's: of equals the first
    kept = [order[found.classes[order] == label][:_COUNTED] for label in np.unique(found.classes)]
    places = np.sort(np.concatenate(kept))
    return Found(*(part[places] for part in found))


def confusion(
    found: Sequence[Found], truth: Sequence[Truth], classes: int
) -> npt.NDArray[np.int64]:
    """Count which class was found for which, boxes matched best overlap first, each once.

    Crowds are left out, and so are boxes found mostly on a crowd of their class. Background is the
    last row (found, and nothing there) and the last column (there, and not found).
    """
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for one, (labeled, _, _) in zip(found, truth, strict=True):
        kept = one.scores >= CONFUSION_SCORE
        boxes, labels = one.boxes[kept], one.classes[kept]
        real = ~labeled.crowd
        true_boxes, true_labels = labeled.boxes[real], labeled.classes[real]
        overlap = overlaps(true_boxes, boxes)
        pairs = np.argwhere(overlap >= CONFUSION_IOU)
        order = np.argsort(-overlap[tuple(pairs.T)], kind="stable")
        free_true, free_found = set(range(len(true_boxes))), set(range(len(boxes)))
        for row, column in pairs[order].tolist():
            if row in free_true and column in free_found:
                matrix[true_labels[row], labels[column]] += 1
                free_true.discard(row)
                free_found.discard(column)
        for row in free_true:
            matrix[true_labels[row], classes] += 1
        passed = _on_crowds(labeled, boxes, labels)
        for column in free_found - passed:
            matrix[classes, labels[column]] += 1
    return matrix


def _on_crowds(
    labeled: Annotations, boxes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> set[int]:
    """Return which boxes lie by half or more on a crowd of their class."""
    crowds, of_class = labeled.boxes[labeled.crowd], labeled.classes[labeled.crowd]
    low = np.maximum(boxes[:, None, :2], crowds[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    on = (shared >= CONFUSION_IOU * area) & (labels[:, None] == of_class[None])
    return set(np.flatnonzero(on.any(axis=1)).tolist())


def overlaps(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Floats:
    """Return the IoU of every box (N 4) with every other (M 4): N M."""
    a, b = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = (a[..., 2:] - a[..., :2]).prod(axis=2) + (b[..., 2:] - b[..., :2]).prod(axis=2)
    iou: Floats = shared / np.maximum(areas - shared, 1e-9)
    return iou


def _best_f1(precision: Floats, recall: Floats, scores: Floats) -> dict[str, float | None]:
    """Return the best F1 of a class's curve, and the score above which boxes are kept for it.

    Precision is COCO's, the best at this recall or a higher one, at 101 recalls. The score has four
    digits, rounded down, so that the last box that counts is among those above.
    """
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f1.argmax())
    there = f1[best] > 0  # -1 is a class without boxes, 0 one of which nothing is found
    return {
        "f1": float(f1[best]) if there else None,
        "f1_score": math.floor(float(scores[best]) * 1e4 - 1e-3) / 1e4 if there else None,
    }


def _figure(value: float) -> float | None:
    """COCO says -1 where there was nothing to measure."""
    return float(value) if math.isfinite(value) and value >= 0 else None


def _silent(*_: object) -> None:
    """Say nothing where faster-coco-eval would print."""
