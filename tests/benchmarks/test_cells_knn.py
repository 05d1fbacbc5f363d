"""The crops and scores of the boxed-cell benchmark, on a small labeled set made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.cells_knn import Crops, balanced, main, read_crops, score, square
from groundwork.backbones import build_backbone
from groundwork.backbones.product import save_product
from groundwork.data.labels import open_labeled


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The command sets the number of threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Grey pictures, 80 x 60, with a red disc's box at the left and a blue one's at the right."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(90, 110, (60, 80, 3), dtype=np.uint8)
            pixels[20:40, 10:30] = (200, 20, 20)
            pixels[20:40, 50:70] = (20, 20, 200)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}.png")
            (tmp_path / "labels" / split / f"{index}.txt").write_text(
                "0 0.25 0.5 0.25 0.333333\n\n1 0.75 0.5 0.25 0.333333\n1 0.5 0.5 0 0.2\n"
            )
    (tmp_path / "labels" / "classes.txt").write_text("red\nblue\n")
    return tmp_path


def test_squares_by_hand() -> None:
    # 200 x 100: a box 40 x 20 around (100, 50) has the side 40, or 60 with half as much again.
    assert square((80, 40, 120, 60), 1.0, 200, 100) == (80, 30, 120, 70)
    assert square((80, 40, 120, 60), 1.5, 200, 100) == (70, 20, 130, 80)
    # At an edge it is moved; larger than the picture it is as large as its short side.
    assert square((-20, 90, 20, 110), 1.0, 200, 100) == (0, 60, 40, 100)
    assert square((10, 40, 190, 60), 1.0, 200, 100) == (50, 0, 150, 100)


def test_every_box_with_an_area_is_cut_out_of_its_picture(data: Path) -> None:
    labeled = open_labeled(str(data), "train", cache=data, cache_bytes=10**6)
    crops = read_crops(labeled, 32, threads=2)
    assert crops.labels.tolist() == [0, 1] * 12
    assert crops.pixels.shape == (24, 32, 32, 3)
    assert crops.pixels[::2, 4:-4, 4:-4].float().mean(dim=(0, 1, 2)).tolist() == [200, 20, 20]
    assert crops.pixels[1::2, 4:-4, 4:-4].float().mean(dim=(0, 1, 2)).tolist() == [20, 20, 200]


def test_a_balanced_bank_has_as_many_of_each_class_and_is_the_same_twice() -> None:
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 20)
    crops = Crops(torch.arange(75).view(75, 1, 1, 1), labels)
    kept = balanced(crops, 10, seed=0)
    assert torch.bincount(kept.labels).tolist() == [10, 5, 10]
    assert torch.equal(kept.labels, labels[kept.pixels.flatten()])
    assert torch.equal(kept.pixels, balanced(crops, 10, seed=0).pixels)
    assert not torch.equal(kept.pixels, balanced(crops, 10, seed=1).pixels)


def test_a_class_without_queries_is_not_counted() -> None:
    bank = torch.eye(3)
    found = score(bank, bank[:2], torch.arange(3), torch.arange(2), 3)
    assert found.mean == 1.0
    assert found.recalls == [1.0, 1.0, None]


def test_the_command_compares_pixels_random_and_given_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    save_product(tmp_path / "a.safetensors", {"backbone": build_backbone("yolo12n")}, {})
    options = ["--data", str(data), "--image-size", "32", "--threads", "1"]
    options += ["--seeds", "5", "6", "--weights", str(tmp_path / "a.safetensors")]
    assert main([*options, "--json", str(tmp_path / "report.json")]) == 0
    written = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(written.splitlines()[-1]) == report
    kinds = [row["features"] for row in report["rows"]]
    assert kinds == ["pixels", "random, seed 5", "random, seed 6", str(tmp_path / "a.safetensors")]
    assert report["rows"][0]["mean"] == 1.0
    # The file holds what seed 5 gives, so both must score the same.
    assert report["rows"][3]["mean"] == report["rows"][1]["mean"]
    assert report["queries"] == [4, 4]


def test_missing_data_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err
