"""Claims about the command that finds objects in pictures."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.detector import Detector, Limits, build_detector
from finetune.finder import Finder, frame_of
from finetune.looks import looking
from finetune.metrics import Found
from finetune.predict import Predictor, main
from finetune.weights import parts_of, save_detector
from groundwork.data.decode import open_picture
from groundwork.data.samples import FolderSamples
from groundwork.data.shards import Sample
from groundwork.errors import UnavailableError
from pretrain.pack import main as pack

MakeJpeg = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("car", "boat", "plane")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detector with random weights, whose scores are raised so that it finds something."""
    torch.manual_seed(0)
    detector = build_detector("yolo12n", num_classes=3)
    with torch.no_grad():
        for name, parameter in detector.head.classes.named_parameters():
            if name.endswith(".2.bias"):
                parameter.add_(5.0)
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    save_detector(path, parts_of(detector), names=NAMES, image_size=128, metadata={})
    return path


@pytest.fixture
def pictures(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    folder = tmp_path / "given"
    (folder / "sub.dir").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(make_jpeg(1, 200, 120))
    (folder / "sub.dir" / "b.c.jpg").write_bytes(make_jpeg(2, 64, 90))
    Image.new("RGB", (50, 50), "white").save(folder / "a.png")
    (folder / "broken.jpg").write_bytes(b"<html>")
    (folder / "cut.jpg").write_bytes(make_jpeg(3, 200, 120)[:900])
    return folder


def read(folder: Path, name: str = "predictions.json") -> Any:
    return json.loads((folder / name).read_text())


def check(document: Any, results: Any) -> None:
    """Check that both json files are whole and say the same."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    assert list(sizes) == list(range(1, len(sizes) + 1))
    assert document["categories"] == [{"id": n, "name": name} for n, name in enumerate(NAMES)]
    for number, row in enumerate(document["annotations"], 1):
        assert row["id"] == number and 0 < row["score"] <= 1
        assert row["category_id"] in range(3)
        left, top, width, height = row["bbox"]
        assert width > 0 and height > 0 and left >= 0 and top >= 0
        assert left + width <= sizes[row["image_id"]][0] + 1e-3
        assert top + height <= sizes[row["image_id"]][1] + 1e-3
        assert row["area"] == pytest.approx(width * height, rel=0.01, abs=0.1)
    keys = ("image_id", "category_id", "bbox", "score")
    assert results == [{key: row[key] for key in keys} for row in document["annotations"]]


def test_the_command_as_a_person_types_it(weights: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "finetune.predict", str(weights), str(pictures)]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "Left out" in line]
    assert len(lines) == 2 and "broken.jpg" in lines[0] and "cut.jpg" in lines[1]
    assert "2 pictures could not be read" in done.stdout and "in 3 pictures" in done.stdout
    document = read(out)
    assert document["annotations"]
    check(document, read(out, "detections.json"))
    assert [image["file_name"] for image in document["images"]] == [
        "a.jpg",
        "a.png",
        "sub.dir/b.c.jpg",
    ]
    drawn = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg"))
    assert drawn == ["pictures/a-2.jpg", "pictures/a.jpg", "pictures/sub.dir/b.c.jpg"]
    with Image.open(out / "pictures" / "a.jpg") as image:
        assert image.size == (200, 120)
    assert not list(out.glob(".*"))


def test_looks_are_as_many_as_are_asked_for(
    weights: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def watched(detector: Detector, looks: int, limits: Limits) -> Finder:
        asked.append((looks, limits.score))
        return looking(detector, looks, limits)

    monkeypatch.setattr("finetune.predict.looking", watched)
    command = [str(weights), str(pictures / "a.jpg"), "--no-pictures", "--out"]
    assert main([*command, str(tmp_path / "once"), "--score", "0.1"]) == 0
    assert main([*command, str(tmp_path / "twice"), "--looks", "2", "--score", "0.1"]) == 0
    assert asked == [(1, 0.1), (2, 0.1)]
    once, twice = (read(tmp_path / name)["annotations"] for name in ("once", "twice"))
    assert twice and twice != once
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "x"), "--looks", "3"])


def test_shards_a_list_a_picture_and_none_drawn(
    weights: Path, pictures: Path, tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    (pictures / "broken.jpg").unlink()
    (pictures / "cut.jpg").unlink()
    (pictures / "a.png").unlink()
    assert pack([str(pictures), str(tmp_path / "shards")]) == 0
    (tmp_path / "list.txt").write_text(f"given/sub.dir/b.c.jpg\n{pictures}/a.jpg\n")
    found = {}
    for name in ("given", "shards", "list.txt", "given/a.jpg"):
        out = tmp_path / f"out-{name.replace('/', '-')}"
        common = ["--out", str(out), "--no-pictures", "--score", "0.1"]
        assert main([str(weights), str(tmp_path / name), *common]) == 0
        assert not (out / "pictures").exists()
        found[name] = read(out)
        check(found[name], read(out, "detections.json"))
    assert found["given"] == found["shards"]
    assert [image["file_name"] for image in found["list.txt"]["images"]] == [
        "given/sub.dir/b.c.jpg",
        f"{pictures}/a.jpg",
    ]
    assert found["given/a.jpg"]["annotations"] == [
        row for row in found["given"]["annotations"] if row["image_id"] == 1
    ]


def test_a_second_run_passes_over_its_drawings(weights: Path, pictures: Path) -> None:
    for _ in range(2):
        assert main([str(weights), str(pictures), "--out", str(pictures / "out")]) == 0
        assert len(read(pictures / "out")["images"]) == 3


def test_drawings_stay_in_their_folder(weights: Path, tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    (tmp_path / "x.jpg").write_bytes(make_jpeg(1))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("../x.jpg\n")
    out = tmp_path / "deep" / "out"
    assert main([str(weights), str(tmp_path / "lists" / "list.txt"), "--out", str(out)]) == 0
    assert [path.name for path in (out / "pictures").iterdir()] == ["x.jpg"]


def test_tiles_from_the_command(
    weights: Path, tmp_path: Path, make_jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large.jpg").write_bytes(make_jpeg(5, 350, 120))
    shapes = []
    look = Detector.predict

    def spy(self: Detector, image: Tensor) -> tuple[Tensor, Tensor]:
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert torch.is_inference_mode_enabled()
        shapes.append(tuple(image.shape))
        return look(self, image)

    monkeypatch.setattr(Detector, "predict", spy)
    out = tmp_path / "out"
    tiled = ["--tile", "128", "--overlap", "0.25"]
    assert main([str(weights), str(tmp_path / "large.jpg"), "--out", str(out), *tiled]) == 0
    # 350 pixels in tiles of 128, steps of 96; 120 rows in a frame of 128; the whole is 128 x 44.
    assert shapes == [(1, 3, 128, 128)] * 4 + [(1, 3, 64, 128)]
    check(read(out), read(out, "detections.json"))
    assert read(out)["images"] == [{"id": 1, "file_name": "large.jpg", "width": 350, "height": 120}]


# ---- coordinates -------------------------------------------------------------------------------


class Fixed:
    """Stands in for a detector: says that there is an object where it is told to."""

    def __init__(self, *boxes: list[float]) -> None:
        self.given = np.array(boxes, np.float32)
        self.seen: list[np.ndarray[Any, Any]] = []

    def __call__(self, frames: np.ndarray[Any, Any]) -> list[Found]:
        self.seen.append(frames)
        count = len(self.given)
        return [Found(self.given, np.full(count, 0.9, np.float32), np.zeros(count, np.int64))]


def predictor(fixed: Fixed, image_size: int, **others: Any) -> Predictor:
    return Predictor(fixed, image_size, **others)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(640, 480, 640), (4000, 3000, 640), (333, 517, 640), (1920, 1080, 1024), (100, 9000, 640)],
)
def test_boxes_come_back_exactly(width: int, height: int, size: int) -> None:
    frame = frame_of(width, height, size)
    sides = (frame.frame_height, frame.frame_width)
    assert max(sides) == size and all(side % 32 == 0 for side in sides)
    assert min(sides) - min(frame.shown_height, frame.shown_width) < 32
    wanted = np.array([[0.2 * width, 0.3 * height, 0.7 * width, 0.9 * height]])
    scale = np.array([frame.shown_width / width, frame.shown_height / height] * 2)
    framed = wanted * scale + [frame.left, frame.top, frame.left, frame.top]
    fixed = Fixed(framed[0].tolist())
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    found = predictor(fixed, size).find(open_picture(file.getvalue()))
    # What is left is float32's: 24 bits of the frame's coordinates.
    tolerance = max(1e-3, 2e-7 * size / scale.min())
    np.testing.assert_allclose(found.boxes.numpy(), wanted, atol=tolerance, rtol=0)
    assert fixed.seen[0].shape[1:3] == sides


def test_boxes_are_clipped_and_those_in_the_grey_left_out() -> None:
    file = io.BytesIO()
    Image.new("RGB", (128, 70)).save(file, "PNG")  # in a frame of 128 x 96, 13 rows down
    fixed = Fixed([-5.0, 5.0, 60.0, 60.0], [10.0, 0.0, 50.0, 12.0], [70.0, 20.0, 200.0, 95.0])
    found = predictor(fixed, 128).find(open_picture(file.getvalue()))
    assert found.boxes.tolist() == [[0, 0, 60, 47], [70, 7, 128, 70]]


def test_a_turned_picture_is_seen_upright() -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32] = 255  # the left as stored, which is the top once it is upright
    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    fixed = Fixed([0.0, 0.0, 64.0, 32.0])
    picture = open_picture(file.getvalue())
    found = predictor(fixed, 128).find(picture)
    assert (picture.width, picture.height) == (64, 128)
    assert found.boxes.tolist() == [[0, 0, 64, 32]]
    seen = fixed.seen[0]
    assert seen.shape == (1, 128, 64, 3)
    assert (seen[:, :32] == 255).all() and (seen[:, 32:] == 0).all()


# ---- what goes wrong ---------------------------------------------------------------------------


def test_exit_codes(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    for wrong in ("other.safetensors", "missing.safetensors"):
        assert main([str(tmp_path / wrong), str(pictures), *out]) == 4
        told = capsys.readouterr().err
        assert wrong in told and len(told.splitlines()) == 1
    assert main([str(weights), str(tmp_path / "nowhere"), *out]) == 3
    assert f"PICTURES={tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err
    assert main([str(weights), str(pictures / "broken.jpg"), *out]) == 3
    assert "None of the 1 pictures" in capsys.readouterr().err
    assert not (tmp_path / "out" / "predictions.json").exists()
    assert main([str(weights), str(pictures), *out, "--overlap", "0.3"]) == 2
    assert "--overlap is of tiles" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    assert main([str(weights), str(pictures), "--out", str(file)]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_waited_for_and_no_picture_left_out(
    weights: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls = []

    def flaky(self: FolderSamples, shard: int, index: int) -> Sample:
        calls.append(shard)
        if len(calls) in failing:
            raise UnavailableError("no answer.")
        return healthy(self, shard, index)

    healthy = FolderSamples.read
    monkeypatch.setattr(FolderSamples, "read", flaky)
    monkeypatch.setattr("groundwork.data.reach.PAUSE", 0.001)
    failing: Container[int] = {2, 3}
    command = [str(weights), str(pictures), "--no-pictures", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert len(read(tmp_path / "out")["images"]) == 3
    monkeypatch.setattr("groundwork.data.reach.PATIENCE", 0.01)
    failing = range(10**6)
    assert main([*command[:-1], str(tmp_path / "other")]) == 3
    assert capsys.readouterr().err.endswith("no answer.\n")
    assert not (tmp_path / "other" / "predictions.json").exists()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--tile", "100"], "100 is not a multiple of 32"),
        (["--image-size", "0"], "0 is not a multiple of 32"),
        (["--image-size", "big"], "big is not a multiple of 32"),
        (["--score", "2"], "2 is no number between 0 and 1"),
        (["--overlap", "0"], "0 is no number between 0.05 and 0.75"),
        (["--most", "0"], "0 is not 1 or more"),
        (["--most", "1.5"], "1.5 is not 1 or more"),
        (["--iou", "x"], "x is no number between 0 and 1"),
    ],
)
def test_usage(
    wrong: list[str], told: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), "pictures", "--out", "out", *wrong])
    assert stopped.value.code == 2
    assert f"{wrong[0]}: {told}" in capsys.readouterr().err


def test_pictures_that_have_as_many_boxes_as_they_may_are_told(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(weights), str(pictures / "a.jpg"), "--no-pictures", "--out", str(tmp_path)]
    assert main([*command, "--most", "2"]) == 0
    assert "1 pictures have as many boxes as --most allows" in capsys.readouterr().out
    assert main(command) == 0
    assert "--most" not in capsys.readouterr().out


def test_pictures_that_lie_where_boxes_are_drawn_are_refused(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be taken for drawings of an earlier run, and passed over."""
    given = pictures / "pictures"
    (pictures / "sub.dir").rename(given)
    for place in (given, given / "b.c.jpg"):
        assert main([str(weights), str(place), "--out", str(pictures)]) == 2
        assert "where PICTURES are" in capsys.readouterr().err
    assert [path.name for path in given.iterdir()] == ["b.c.jpg"]
