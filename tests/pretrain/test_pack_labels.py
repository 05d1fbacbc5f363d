"""Claims about packing pictures with their boxes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from groundwork.data.labels import LabeledSamples, open_labeled
from groundwork.data.shard_sets import open_shards
from pretrain.pack import main

MakeJpeg = Callable[..., bytes]


def pack(*arguments: object) -> int:
    return main(["--workers", "1", *map(str, arguments)])


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def open_(data: Path, split: str | None = None) -> LabeledSamples:
    return open_labeled(str(data), split, cache=data.parent / "cache", cache_bytes=1 << 20)


def all_boxes(samples: LabeledSamples) -> dict[str, Any]:
    places = [(s, i) for s, size in enumerate(samples.shard_sizes.tolist()) for i in range(size)]
    found = {}
    for place in places:
        sample, _, annotations = samples.look(*place)
        name = sample.key.rpartition("/")[2]
        boxes = annotations.boxes.astype(float).round(3).tolist()
        found[name] = boxes, annotations.classes.tolist()
    return found


def test_pictures_that_the_labels_do_not_name_are_left_out_and_no_damage(
    tmp_path: Path, make_jpeg: MakeJpeg, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {
        "images": [{"id": 1, "file_name": "0.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]}],
        "categories": [{"id": 1, "name": "car"}],
    }
    pictures = tmp_path / "pictures"
    for number in range(10):
        write(pictures / f"{number}.jpg", make_jpeg(number))
    write(tmp_path / "labels.json", json.dumps(document))
    command = ["--labels", tmp_path / "labels.json", pictures]
    assert pack(*command, tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "1 pictures in 1 shards" in told
    assert "9 pictures left out that the labels do not name" in told
    (pictures / "0.jpg").unlink()
    assert pack(*command, tmp_path / "none") == 3
    assert "The labels name none of the 9 pictures" in capsys.readouterr().err


@pytest.fixture
def root(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """A YOLO data set with boxes, background, a box to clip, and a copy."""
    root = tmp_path / "root"
    for number, name in enumerate(("a", "b.c", "none")):
        write(root / "images" / "train" / f"{name}.jpg", make_jpeg(number))
    write(root / "images" / "val" / "v.jpg", make_jpeg(9))
    write(root / "labels" / "train" / "a.txt", "1 0.5 0.5 0.5 0.5\n0 0.25 0.25 0.25 0.25\n")
    write(root / "labels" / "train" / "b.c.txt", "0 1 1 0.5 0.5\n1 0.5 0.5 0.1 0.1\n" * 2)
    write(root / "labels" / "val" / "v.txt", "0 0.5 0.5 1 1\n")
    write(root / "classes.txt", "car\nboat\n")
    return root


def test_packed_labels_are_those_of_the_data_set(root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / "shards" / split
        assert pack("--labels", root, root / "images" / split, folder) == 0
    for split in ("train", "val"):
        packed, plain = open_(tmp_path / "shards", split), open_(root, split)
        assert packed.names == plain.names == ("car", "boat")
        assert all_boxes(packed) == all_boxes(plain)
        assert not len(packed.defects)  # mended when they were packed
    content = open_shards(tmp_path / "shards" / "train", tmp_path).read_json(0, 0)
    assert content is not None
    assert json.loads(content) == {
        "boxes": [[16, 12, 48, 36], [8, 6, 24, 18]],
        "classes": [1, 0],
        "names": ["boat", "car"],
    }


def test_a_copy_with_boxes_stays_when_copies_are_dropped(root: Path, tmp_path: Path) -> None:
    first = root / "images" / "all" / "x.jpg"
    write(first, (root / "images" / "train" / "a.jpg").read_bytes())
    folder = tmp_path / "shards"
    assert pack("--labels", root, "--drop-duplicates", root / "images", folder) == 0
    [line] = (folder / "duplicates.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": "all/x.jpg", "same_as": "train/a.jpg"}
    assert all_boxes(open_(folder))["a"][1] == [1, 0]


def test_labels_of_one_folder_are_not_those_of_another(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    """Frames of several cameras are called alike."""
    for number, site in enumerate(("siteA", "siteB")):
        write(tmp_path / "pictures" / site / "0000.jpg", make_jpeg(number))
    write(tmp_path / "labels" / "siteA" / "0000.txt", "0 0.5 0.5 0.5 0.5\n")
    write(tmp_path / "labels" / "classes.txt", "car\n")
    folder = tmp_path / "shards"
    assert pack("--labels", tmp_path / "labels", tmp_path / "pictures", folder) == 0
    samples = open_(folder)
    found = {samples.look(0, i)[0].key: len(samples.look(0, i)[2].boxes) for i in range(2)}
    assert found == {"siteA/0000": 1, "siteB/0000": 0}


def test_the_whole_data_set_is_named_as_simply(root: Path, tmp_path: Path) -> None:
    assert pack("--labels", root, root / "images", tmp_path / "shards") == 0
    assert sorted(all_boxes(open_(tmp_path / "shards"))) == ["a", "b.c", "none", "v"]


def test_defects_are_told_and_noted_also_of_shards_made_earlier(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--labels", root, root / "images" / "train", tmp_path / "shards")
    for _ in range(2):
        assert pack(*command) == 0
        told = capsys.readouterr().out
        assert "2 x box written twice" in told and "1 x box partly outside" in told
        assert "boxes of 2 classes: car, boat" in told
        lines = (tmp_path / "shards" / "label-defects.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["path"] for row in rows] == ["b.c.jpg"] * 3
        assert rows[0]["where"].startswith(str(root / "labels" / "train" / "b.c.txt, line "))


def test_other_labels_are_another_packing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--labels", root, root / "images" / "train", tmp_path / "shards")
    assert pack(*command) == 0
    write(root / "labels" / "train" / "a.txt", "1 0.5 0.5 0.5 0.4\n")
    assert pack(*command) == 2
    assert "holds a packing of other pictures" in capsys.readouterr().err


def test_boxes_are_scaled_with_their_picture_and_upright(tmp_path: Path) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 48), "gray").save(file, "JPEG", exif=exif)  # upright: 48 x 64
    write(tmp_path / "set" / "images" / "a.jpg", file.getvalue())
    write(tmp_path / "set" / "labels" / "a.txt", "0 0.5 0.25 1 0.5\n")
    for side, expected in ((24, [0, 0, 24, 16]), (1000, [0, 0, 48, 32])):
        folder = tmp_path / f"shards{side}"
        arguments = ("--labels", tmp_path / "set", "--resize", side)
        assert pack(*arguments, tmp_path / "set" / "images", folder) == 0
        samples = open_(folder)
        picture = samples.look(0, 0)[1]
        assert (picture.width, picture.height) == ((24, 32) if side == 24 else (48, 64))
        assert all_boxes(samples) == {"a": ([expected], [0])}
        assert not len(samples.defects)  # what is packed is upright, whatever its EXIF says


def coco(*names: str) -> str:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [i, 1, 5, 5]}
                for i in range(len(names))
            ],
            "categories": [{"id": 1, "name": "plane"}],
        }
    )


def test_a_json_that_came_alone_finds_pictures_by_name_and_leaves_others_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "elsewhere" / "boxes.json", coco("train/a.jpg", "b.c.jpg"))
    assert pack("--labels", path, root / "images", tmp_path / "shards") == 0
    told = capsys.readouterr().out
    assert "2 pictures left out that the labels do not name" in told
    assert all_boxes(open_(tmp_path / "shards")) == {
        "a": ([[0, 1, 5, 6]], [0]),
        "b.c": ([[1, 1, 6, 6]], [0]),
    }


def test_folders_of_label_files_are_labels(root: Path, tmp_path: Path) -> None:
    expected = all_boxes(open_(root, "train"))
    alone = tmp_path / "alone"
    shutil.copytree(root / "labels" / "train", alone)
    shutil.copy(root / "classes.txt", alone)
    for number, labels in enumerate((root / "labels", root / "labels" / "train", alone)):
        folder = tmp_path / f"shards{number}"
        assert pack("--labels", labels, root / "images" / "train", folder) == 0
        samples = open_(folder)
        assert samples.names == ("car", "boat") and all_boxes(samples) == expected
    xml = "<annotation><object><name>x</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax>"
    write(tmp_path / "xml" / "a.xml", xml + "<ymax>4</ymax></bndbox></object></annotation>")
    arguments = ("--labels", tmp_path / "xml", "--max-bad-fraction", 1)
    assert pack(*arguments, root / "images" / "train", tmp_path / "voc") == 0
    assert all_boxes(open_(tmp_path / "voc")) == {"a": ([[1, 2, 3, 4]], [0])}


def test_what_cannot_be_meant_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_jpeg: MakeJpeg
) -> None:
    images = root / "images" / "train"
    write(tmp_path / "others" / "z.jpg", make_jpeg(3))
    path = write(tmp_path / "elsewhere" / "boxes.json", coco("z.jpg"))
    assert pack("--labels", path, images, tmp_path / "one") == 3
    assert "name none of the 3 pictures" in capsys.readouterr().err
    write(tmp_path / "elsewhere" / "boxes.json", coco("x/a.jpg", "y/a.jpg"))
    assert pack("--labels", path, images, tmp_path / "two") == 3
    assert "They name x/a.jpg, for one" in capsys.readouterr().err
    write(tmp_path / "elsewhere" / "boxes.json", coco("train/a.jpg", "a.jpg"))
    assert pack("--labels", path, images, tmp_path / "two") == 3
    assert "could be those in" in capsys.readouterr().err
    write(root / "labels" / "train" / "a.txt", "2 0.5 0.5 0.5 0.5\n")
    assert pack("--labels", root, images, tmp_path / "three") == 3
    assert "line 1: there is no class 2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        pack("--labels", root, "--class-folders", images, tmp_path / "four")
    assert caught.value.code == 2


def test_without_labels_nothing_of_a_packing_changes(root: Path, tmp_path: Path) -> None:
    assert pack(root / "images", tmp_path / "shards") == 0
    shards = open_shards(tmp_path / "shards", tmp_path)
    assert shards.samples(0).json_offsets is None
    assert b"json" not in next((tmp_path / "shards").glob("*.samples.json")).read_bytes()
    assert not (tmp_path / "shards" / "label-defects.jsonl").exists()


def test_tiles_have_their_boxes_cut_at_their_edges(tmp_path: Path) -> None:
    """Two tiles of 64 on 112 x 40, at 0 and 48: what they show of four boxes, by hand."""
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (112, 40), (9, 90, 200)).save(root / "images" / "scene.png")
    boxes = {
        "whole in the first": (4, 4, 20, 20),
        "whole in both": (50, 10, 60, 20),
        "cut by the first, whole in the second": (56, 0, 76, 10),  # 8 of 20 pixels in the first
        "nearly all in the second": (62, 20, 92, 40),  # 2 of 30 pixels in the first
    }
    lines = [
        f"{number % 2} {(left + right) / 224} {(top + bottom) / 80} "
        f"{(right - left) / 112} {(bottom - top) / 40}"
        for number, (left, top, right, bottom) in enumerate(boxes.values())
    ]
    write(root / "labels" / "scene.txt", "\n".join(lines))
    write(root / "classes.txt", "car\nboat\n")
    arguments = [root / "images", tmp_path / "shards", "--labels", root, "--tiles", 64]
    assert pack(*arguments, "--overlap", 0.2) == 0
    samples = open_(tmp_path / "shards")
    found = all_boxes(samples)
    first, second = found["scene_x0_y0"], found["scene_x48_y0"]
    assert first[0] == [
        [4, 4, 20, 20], [50, 10, 60, 20], [56, 0, 64, 10], [62, 20, 64, 40],
    ]  # fmt: skip
    assert first[1] == [0, 1, 0, 1]
    assert second[0] == [[2, 10, 12, 20], [8, 0, 28, 10], [14, 20, 44, 40]]
    assert second[1] == [1, 0, 1]
    crowds = {
        sample.key: annotations.crowd.tolist()
        for sample, _, annotations in (samples.look(0, index) for index in range(2))
    }
    assert crowds == {
        "scene_x0_y0": [False, False, False, True], "scene_x48_y0": [False, False, False],
    }  # fmt: skip
    assert samples.names == ("car", "boat")
    # Another share is another packing; the same goes on where it was.
    assert pack(*arguments, "--overlap", 0.2) == 0
    assert pack(*arguments, "--overlap", 0.2, "--min-visible", 0.5) == 2
