"""Claims about the command that shows what labels a data set has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from finetune.labels import main
from groundwork.data.reach import Readable
from groundwork.data.shards import Sample
from groundwork.errors import DataError

MakeJpeg = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """A YOLO data set of two splits, with a box to clip and an unreadable picture."""
    root = tmp_path / "set"
    for split, names in (("train", "abc"), ("val", "d")):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number, name in enumerate(names):
            (root / "images" / split / f"{name}.jpg").write_bytes(make_jpeg(number))
    (root / "images" / "train" / "broken.jpg").write_bytes(b"<html>")
    (root / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0 0 1 1\n")
    (root / "labels" / "train" / "b.txt").write_text("0 0.5 0.5 1 1\n")
    (root / "labels" / "val" / "d.txt").write_text("1 0.5 0.5 1 1\n")
    (root / "classes.txt").write_text("car\nboat\n")
    return root


def test_what_was_found_is_told_and_drawn(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert main([str(root), "--out", str(sheet)]) == 0
    told = capsys.readouterr().out
    for line in (
        "YOLO text, 2 classes: car, boat",
        "train: 3 pictures, of them 1 background; 3 boxes",
        "car           2 boxes in       2 pictures",
        "boxes' sizes: small 2 (67%), medium 1 (33%), large 0 (0%)",
        "the middle one, px: 110.9 at image_size=256, 277.1 at image_size=640",
        "pictures' sizes: 64 x 48 (3)",
        "1 x box partly outside its picture, clipped",
        "a.txt, line 2",
        "1 x picture that cannot be read",
        "val: 1 pictures, of them 0 background; 1 boxes",
        "defects: none",
    ):
        assert line in told
    with Image.open(sheet) as image:
        assert image.width == 2 * 480
        pixels = np.asarray(image.convert("RGB"))
    red = (pixels == (255, 0, 0)).all(axis=2)  # the first class
    # The first tile, below its title of 26 pixels: the right half of its first box's upper edge.
    assert red[26 + 90, 250:355].all() and not red[26 + 180, 250:350].any()


def test_a_file_that_cannot_be_opened_is_told_and_left_out_of_the_sheet(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(samples: Readable, shard: int, index: int) -> Sample:
        sample = samples.read(shard, index)
        if sample.key.endswith("b"):
            raise DataError("b cannot be read: permission denied.")
        return sample

    monkeypatch.setattr("finetune.labels.read_patiently", read)
    assert main([str(root), "--out", str(tmp_path / "sheet.png")]) == 0
    assert "2 x picture that cannot be read" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()


def test_one_split_and_no_sheet(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(root), "--split", "val", "--pictures", "0"]) == 0
    told = capsys.readouterr().out
    assert "val: 1 pictures" in told and "train" not in told
    assert not list(tmp_path.glob("*.png"))


def test_exit_codes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 3
    assert "does not exist" in capsys.readouterr().err
    assert main([str(root), "--out", str(tmp_path / "no" / "folder.png")]) == 3
    assert "cannot be written" in capsys.readouterr().err
    (root / "labels" / "train" / "a.txt").write_text("7 0.5 0.5 0.5 0.5\n")
    assert main([str(root), "--pictures", "0"]) == 3
    assert "a.txt, line 1: there is no class 7" in capsys.readouterr().err
    for wrong in ([], [str(root), "--split", "other"], [str(root), "--pictures", "-1"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_the_command_as_it_is_written(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune.labels", str(root), "--out", str(tmp_path / "s.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 pictures with their boxes" in done.stdout


@pytest.mark.parametrize("name", ["aerial-hrplanes", "medical-txl-pbc", "medical-bccd"])
def test_real_data_is_drawn(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = [str(shared_data / name), "--split", "test", "--out", str(tmp_path / "s.png")]
    assert main(arguments) == 0
    boxes = {"aerial-hrplanes": "2,012", "medical-txl-pbc": "2,651", "medical-bccd": "945"}[name]
    assert f"; {boxes} boxes" in capsys.readouterr().out


def test_bands_that_want_a_mapping_are_told_where_nothing_can_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    pixels = np.zeros((48, 64, 5), np.uint16)
    tifffile.imwrite(
        root / "images" / "a.tif", pixels, photometric="minisblack", planarconfig="contig"
    )
    (root / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "classes.txt").write_text("car\n")
    assert main([str(root), "--out", str(tmp_path / "sheet.png")]) == 0
    told = capsys.readouterr().out
    assert "defects: none" in told and "0 pictures with their boxes" in told
    assert "1 others could not be drawn, the first: " in told and "bands" in told
