"""Evaluation: every picture once, boxes in its own pixels, any number of processes alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune.detector import Limits, build_detector
from finetune.evaluate import detect_all, evaluate, main
from finetune.weights import detector_from_file, parts_of, save_detector
from groundwork.data.labels import LabeledSamples, open_labeled
from groundwork.errors import DataError


def write_set(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """A YOLO set, each picture with one bright square of class 0."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("square\n")
    for number, (width, height) in enumerate(sizes):
        pixels = np.full((height, width, 3), 40, np.uint8)
        pixels[8:32, 16:40] = 250
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        x, y, w, h = 28 / width, 20 / height, 24 / width, 24 / height
        (root / "labels" / f"{number}.txt").write_text(f"0 {x} {y} {w} {h}\n")
    return root


def opened(root: Path) -> LabeledSamples:
    return open_labeled(str(root), None, cache=root / "cache", cache_bytes=1 << 30)


SIZES = [(96, 64), (64, 96), (80, 80), (200, 50), (33, 47), (96, 64), (70, 71)]


def random_detector() -> Any:
    torch.manual_seed(0)
    return build_detector("yolo12n", 1)


class Oracle(torch.nn.Module):
    """Finds the bright square by its pixels, exactly as large as it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_detector("yolo12n", 1).backbone  # for its mean and std

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        boxes = []
        for picture in image:
            rows, columns = (picture[0] > 0.7).nonzero(as_tuple=True)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            boxes.append(torch.stack([edge.float() for edge in edges])[None])
        return torch.stack(boxes), torch.full((len(image), 1, 1), 0.9)


def test_boxes_come_back_in_the_pictures_own_pixels(tmp_path: Path) -> None:
    labeled = opened(write_set(tmp_path / "set", SIZES))
    oracle: Any = Oracle()
    seen = detect_all(oracle, labeled, image_size=192, batch_size=3)
    assert seen is not None and seen.numbers == list(range(7))
    for found, truth in zip(seen.found, seen.truth, strict=True):
        # Whole pixels of the shown picture are at most two of its own.
        scale = 192 / max(truth.width, truth.height)
        assert np.abs(found.boxes - truth.annotations.boxes).max() <= 1.5 / min(scale, 1) + 1e-3
    results = evaluate(oracle, labeled, image_size=192)
    assert results is not None and results.ap50 == pytest.approx(1.0)


def test_the_batch_size_and_the_number_of_threads_change_nothing(tmp_path: Path) -> None:
    labeled = opened(write_set(tmp_path / "set", [(96, 64)] * 5))
    detector = random_detector().train()
    runs = [
        detect_all(
            detector,
            labeled,
            image_size=64,
            batch_size=size,
            workers=workers,
            limits=Limits(score=0.0),
        )
        for size, workers in ((1, 1), (4, 3))
    ]
    assert runs[0] is not None and runs[1] is not None
    for one, other in zip(runs[0].found, runs[1].found, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    assert detector.training and detector.backbone.training  # left as they were


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", SIZES[:3])
    labeled = opened(root)
    (root / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png|images/1"):
        evaluate(random_detector(), labeled, image_size=64)


def test_the_command_writes_figures_boxes_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set", SIZES[:4])
    weights = tmp_path / "detector.safetensors"
    save_detector(
        weights, parts_of(random_detector()), names=["square"], image_size=64, metadata={}
    )
    assert main([str(weights), f"data.val={root}", "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "results.json", "detections.json", "labels.json", "precision-recall.png", "confusion.png",
    }  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["pictures"] == 4 and set(results["per_class"]) == {"square"}
    assert "square" in capsys.readouterr().out
    # The two files are a pair that any COCO tool scores.
    truth = COCO(str(tmp_path / "out" / "labels.json"))
    assert [image["file_name"].split("/")[-1] for image in truth.loadImgs(truth.getImgIds())] == [
        "0", "1", "2", "3",
    ]  # fmt: skip
    found = truth.loadRes(str(tmp_path / "out" / "detections.json"))
    theirs = COCOeval(truth, found, "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert theirs.stats[0] == pytest.approx(results["ap"], abs=1e-6)
    # The file says how the pictures were looked at, and they are looked at so.
    how = ("image_size", "score", "iou", "most", "looks")
    assert [results[key] for key in how] == [64, 0.001, 0.7, 300, 1]
    command = [str(weights), f"data.val={root}", "looks=2", "image_size=96", "--out"]
    assert main([*command, str(tmp_path / "twice")]) == 0
    twice = json.loads((tmp_path / "twice" / "results.json").read_text())
    assert [twice[key] for key in how] == [96, 0.001, 0.7, 300, 2]
    detector, _ = detector_from_file(weights)
    seen = detect_all(detector, opened(root), image_size=96, looks=2)
    assert seen is not None
    once, again = (
        json.loads((tmp_path / folder / "detections.json").read_text())
        for folder in ("out", "twice")
    )
    scores = np.concatenate([found.scores for found in seen.found])
    assert sorted(row["score"] for row in again) == pytest.approx(sorted(scores), abs=1e-6)
    assert again != once


def test_scoring_the_pictures_of_training_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, split = write_set(tmp_path / "whole", SIZES[:2]), tmp_path / "split"
    for kind in ("images", "labels"):
        (split / kind).mkdir(parents=True)
        for name in ("train", "val"):
            shutil.copytree(whole / kind, split / kind / name)
    shutil.copy(whole / "classes.txt", split)
    weights = tmp_path / "detector.safetensors"

    def told(trained: object, *keys: str) -> bool:
        save_detector(
            weights, parts_of(random_detector()), names=["square"], image_size=64,
            metadata={"recipe": {"data": {"train": trained, "holdout": 0.5}}},
        )  # fmt: skip
        assert main([str(weights), *keys]) == 0
        return "was trained on pictures of this set" in "".join(capsys.readouterr())

    assert told(str(split), f"data.val={split}", "data.split=train")
    assert not told(str(split), f"data.val={split}")
    assert told(str(whole), f"data.val={whole}")
    assert told(str(whole), f"data.val={whole}", "data.holdout=0.4")
    assert not told(str(whole), f"data.val={whole}", "data.holdout=0.5")
    assert not told(str(whole), f"data.val={split}", "data.split=train")
    assert told([str(split), str(whole)], f"data.val={whole}")
    assert not told(None, f"data.val={whole}")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["data.vall=x"], 2, "data.val"),
        ([], 2, "one of data.val=ROOT and data.test=ROOT"),
        (["data.val=nowhere"], 3, "nowhere"),
    ],
)
def test_mistakes_of_the_command_are_told_in_a_sentence(
    arguments: list[str],
    code: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "detector.safetensors"
    save_detector(
        weights, parts_of(random_detector()), names=["square"], image_size=64, metadata={}
    )
    assert main([str(weights), *arguments]) == code
    assert sentence in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set", SIZES[:1])
    weights = tmp_path / "detector.safetensors"
    save_detector(
        weights, parts_of(random_detector()), names=["square"], image_size=64, metadata={}
    )
    assert main([str(weights), f"data.val={root}", "--out", str(weights)]) == 2
    told = capsys.readouterr()
    assert "cannot be made" in told.err and "pictures" not in told.out


def test_classes_that_differ_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set", SIZES[:2])
    weights = tmp_path / "detector.safetensors"
    save_detector(
        weights, parts_of(random_detector()), names=["circle"], image_size=64, metadata={}
    )
    assert main([str(weights), f"data.val={root}"]) == 3
    told = capsys.readouterr().err
    assert "square" in told and "circle" in told
