"""Scores: by hand, and against pycocotools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.metrics import FIGURES, Found, Truth, confusion, score, to_rows
from finetune.plots import save_confusion, save_curves
from groundwork.data.annotations import Annotations


def found(*rows: tuple[tuple[float, float, float, float], float, int]) -> Found:
    return Found(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.int64),
    )


def truth(*rows: tuple[tuple[float, float, float, float], int]) -> Truth:
    boxes, classes = [row[0] for row in rows], [row[1] for row in rows]
    return Truth(Annotations.of(boxes, classes), 100, 100)


SQUARE = (10.0, 10.0, 50.0, 50.0)
OTHER = (60.0, 60.0, 90.0, 90.0)


def test_a_right_box_a_wrong_one_and_a_missed_one_by_hand() -> None:
    results = score(
        [found((SQUARE, 0.9, 0), ((0, 60, 20, 90), 0.8, 0))],
        [truth((SQUARE, 0), (OTHER, 0))],
        ["thing"],
    )
    # Precision 1 up to recall 0.5 (51 of COCO's 101 points), then nothing.
    assert results.ap == pytest.approx(51 / 101)
    assert results.ap50 == results.ap75 == pytest.approx(51 / 101)
    assert results.figures["ar1"] == pytest.approx(0.5)
    assert results.per_class["thing"]["boxes"] == 2
    assert results.per_class["thing"]["f1"] == pytest.approx(2 / 3)
    assert results.per_class["thing"]["f1_score"] == 0.8999
    assert results.pictures == 1 and results.boxes == 2


def test_a_class_without_boxes_has_no_figure_and_does_not_count() -> None:
    results = score([found((SQUARE, 0.9, 0))], [truth((SQUARE, 0))], ["there", "nowhere"])
    assert results.ap == pytest.approx(1.0)
    assert results.per_class["nowhere"]["ap"] is None
    nothing = {"ap": None, "ap50": None, "boxes": 0, "f1": None, "f1_score": None}
    assert results.to_json()["per_class"]["nowhere"] == nothing


def test_the_score_to_keep_boxes_by_is_that_of_the_best_f1() -> None:
    """0.9 right, 0.8 wrong, 0.7 right, then nothing but wrong ones: 2 of 3 right, and 2 of 2."""
    wrong = (0.0, 60.0, 20.0, 90.0)
    rows = [(SQUARE, 0.9, 0), (wrong, 0.8, 0), (OTHER, 0.7, 0), *[(wrong, 0.6, 0)] * 5]
    results = score([found(*rows)], [truth((SQUARE, 0), (OTHER, 0))], ["thing"])
    assert results.per_class["thing"]["f1"] == pytest.approx(0.8)
    assert results.per_class["thing"]["f1_score"] == 0.6999  # a box of 0.7 is kept
    missed = score([found()], [truth((SQUARE, 0))], ["thing"])
    assert missed.per_class["thing"]["f1"] is None


def test_nothing_found_and_nothing_labeled_are_told_apart() -> None:
    nothing = score([found()], [truth((SQUARE, 0))], ["thing"])
    assert nothing.figures["ap"] == 0.0
    unlabeled = score([found((SQUARE, 0.9, 0))], [truth()], ["thing"])
    assert unlabeled.figures["ap"] is None and unlabeled.ap == 0.0


def random_case(seed: int) -> tuple[list[Found], list[Truth]]:
    """Pictures with boxes, some of them crowds or absent, and perturbed copies as findings."""
    generator = np.random.default_rng(seed)
    all_found, all_truth = [], []
    for _ in range(25):
        count = int(generator.integers(0, 12))
        corner = generator.uniform(0, 250, (count, 2))
        boxes = np.concatenate((corner, corner + generator.uniform(4, 140, (count, 2))), 1)
        classes = generator.integers(0, 3, count)  # class 3 has no box
        crowd = generator.random(count) < 0.1
        all_truth.append(Truth(Annotations.of(boxes, classes, crowd), 400, 400))
        if generator.random() < 0.1:
            all_found.append(found())
            continue
        moved = boxes + generator.normal(0, 4, boxes.shape)
        strange = generator.uniform(0, 200, (4, 2))
        more = np.concatenate((strange, strange + 50), 1)
        labels = np.where(generator.random(count) < 0.2, 3 - classes, classes)
        all_found.append(
            Found(
                np.concatenate((moved, more)).astype(np.float32),
                generator.random(count + 4).astype(np.float32),
                np.concatenate((labels, generator.integers(0, 4, 4))).astype(np.int64),
            )
        )
    return all_found, all_truth


def pycocotools(ours: list[Found], labeled: list[Truth], names: list[str]) -> list[float]:
    """Return the twelve figures as the oracle has them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(labeled):
        for box, label, crowd in zip(
            one.annotations.boxes.tolist(),
            one.annotations.classes.tolist(),
            one.annotations.crowd.tolist(),
            strict=True,
        ):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            rows.append(
                {
                    "id": len(rows) + 1, "image_id": number, "category_id": label, "bbox": sides,
                    "area": sides[2] * sides[3], "iscrowd": int(crowd),
                }
            )  # fmt: skip
    coco.dataset = {
        "images": [{"id": n, "width": 400, "height": 400} for n in range(len(labeled))],
        "annotations": rows,
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "info": {},
    }
    coco.createIndex()
    oracle = COCOeval(coco, coco.loadRes(to_rows(ours)), "bbox")
    oracle.evaluate()
    oracle.accumulate()
    oracle.summarize()
    stats: list[float] = oracle.stats.tolist()
    return stats


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_all_twelve_figures_are_pycocotools(seed: int) -> None:
    names = ["a", "b", "c", "d"]
    ours, labeled = random_case(seed)
    results = score(ours, labeled, names)
    mine = [-1.0 if results.figures[name] is None else results.figures[name] for name in FIGURES]
    assert mine == pytest.approx(pycocotools(ours, labeled, names), abs=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_of_many_boxes_those_count_that_count_for_pycocotools() -> None:
    """Up to 170 boxes of a class in a picture, many with equal scores, right ones everywhere."""
    names = ["a", "b", "c", "d"]
    generator = np.random.default_rng(0)
    _, labeled = random_case(0)
    ours = []
    for one in labeled:
        right = one.annotations.boxes
        strange = generator.uniform(0, 350, (400, 2))
        boxes = np.concatenate((right, np.concatenate((strange, strange + 40), 1)))
        classes = np.concatenate(
            (one.annotations.classes, generator.choice(4, 400, p=[0.4, 0.4, 0.1, 0.1]))
        )
        scores = np.round(generator.random(len(boxes)), 1)
        mixed = generator.permutation(len(boxes))
        ours.append(
            Found(
                boxes[mixed].astype(np.float32),
                scores[mixed].astype(np.float32),
                classes[mixed].astype(np.int64),
            )
        )
    results = score(ours, labeled, names)
    mine = [-1.0 if results.figures[name] is None else results.figures[name] for name in FIGURES]
    assert 0.01 < results.ap < 0.99
    assert mine == pytest.approx(pycocotools(ours, labeled, names), abs=1e-9)


def test_confusion_counts_each_box_once_best_overlap_first() -> None:
    close = (12.0, 12.0, 52.0, 52.0)
    matrix = confusion(
        [found((SQUARE, 0.3, 1), (close, 0.9, 0), (OTHER, 0.9, 0), ((0, 0, 5, 5), 0.9, 1))],
        [truth((SQUARE, 0), (OTHER, 1), ((0, 90, 9, 99), 1))],
        2,
    )
    # True 0 matched by the exact box of class 1; its neighbour is left over as a false 0.
    assert matrix.tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 0]]
    low = confusion([found((SQUARE, 0.1, 0))], [truth((SQUARE, 0))], 1)
    assert low.tolist() == [[0, 1], [0, 0]]


def test_a_box_on_a_crowd_of_its_class_is_no_mistake() -> None:
    crowd = Truth(Annotations.of([SQUARE], [0], [True]), 100, 100)
    assert score([found((OTHER, 0.9, 0))], [crowd], ["a"]).boxes == 0
    inside = (12.0, 12.0, 20.0, 20.0)
    matrix = confusion([found((inside, 0.9, 0), (inside, 0.9, 1), (OTHER, 0.9, 0))], [crowd], 2)
    assert matrix.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_curves_and_confusion_are_drawn(tmp_path: Path) -> None:
    ours, labeled = random_case(0)
    names = ["a", r"$\foo$", "c", "d"]  # no formula
    results = score(ours, labeled, names)
    save_curves(results, names, tmp_path / "curves.png")
    save_confusion(results, names, tmp_path / "confusion.png")
    for name in ("curves.png", "confusion.png"):
        assert (tmp_path / name).stat().st_size > 5000
