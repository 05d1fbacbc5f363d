"""Labels in YOLO txt: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from groundwork.data import label_policy
from groundwork.data.label_policy import TWIN
from groundwork.data.labels import splits_of
from groundwork.errors import DataError
from tests.groundwork.data.label_sets import (
    MakeJpeg,
    all_boxes,
    open_,
    write,
    write_yolo,
)

YOLO_TRAIN = {"images/train/a.b": [[24, 12, 40, 36], [8, 6, 24, 18]]}


def test_yolo_without_names_counts_classes_over_all_splits(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    train = open_(root, "train")
    assert train.names == ("class_0", "class_1", "class_2")
    assert all_boxes(train) == {
        "images/train/a.b": (YOLO_TRAIN["images/train/a.b"], ["class_1", "class_0"]),
        "images/train/empty": ([], []),
        "images/train/none": ([], []),
    }
    assert [(d.reason, d.file) for d in train.defects] == [
        (label_policy.NO_LABEL_FILE, str(root / "images" / "train" / "none.jpg"))
    ]


def test_an_outline_becomes_the_box_around_it(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    val = open_(write_yolo(tmp_path / "set", make_jpeg), "val")
    assert all_boxes(val) == {"images/val/c": ([[6.4, 4.8, 57.6, 48]], ["class_2"])}


@pytest.mark.parametrize("where", ["classes.txt", "labels/classes.txt", "labels/train/classes.txt"])
def test_yolo_with_classes_txt(tmp_path: Path, make_jpeg: MakeJpeg, where: str) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    write(root / where, "car\nbig boat\nplane\n")
    samples = open_(root, "train")
    assert samples.names == ("car", "big boat", "plane")
    assert list(samples.defects.counts()) == [label_policy.NO_LABEL_FILE]


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/train\nval: images/val\nnames: [x, y, z]",
        "path: /moved/elsewhere\ntrain: images/train\nval: images/val\nnames: {0: x, 1: y, 2: z}",
        "train: ../images/train\nval: [images/val]\nnc: 3\nnames:\n  - x\n  - y\n  - z",
        "train: train.txt\nval: images/val\nnames: {2: z, 0: x, 1: y}",
        "path: ../set\ntrain: images/train\nvalid: images/val\nnames: ['x', 'y', 'z']",
    ],
)
def test_yolo_with_a_data_yaml(tmp_path: Path, make_jpeg: MakeJpeg, text: str) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    path = write(root / "data.yaml", text)
    listed = [f"./images/train/{name}.jpg" for name in ("a.b", "empty", "none")]
    write(root / "train.txt", "\n".join(listed))
    for data in (root, path):
        assert splits_of(str(data)) == ("train", "val")
        samples = open_(data, "train")
        assert samples.names == ("x", "y", "z")
        keys = {key: boxes for key, (boxes, _) in all_boxes(samples).items() if boxes}
        assert keys == YOLO_TRAIN


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("names: [a]", "names no pictures"),
        ("train: nowhere\nnames: [a]", "'nowhere'"),
        ("train: images/train\nnames: {1: a}", "the numbers from 0 on"),
        ("train: images/train\nnames: [a]\nnc: 2", "nc is 2"),
        ("train: {a: b}\nnames: [a]", "train must be"),
        ("train: [\n", "data.yaml"),
        ("!!python/object/apply:os.system ['false']", "data.yaml"),
    ],
)
def test_a_data_yaml_that_cannot_be_meant_is_refused(
    tmp_path: Path, make_jpeg: MakeJpeg, text: str, match: str
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    write(root / "data.yaml", text)
    with pytest.raises(DataError, match=match):
        open_(root, "train")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("3 0.5 0.5 0.1 0.1", "no class 3 among the 3 of .*classes.txt"),
        ("-1 0.5 0.5 0.1 0.1", "no class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "is neither"),
        ("nan 0.5 0.5 0.1 0.1", "is neither"),
        ("0 0.5 0.5 0.1", "is neither"),
        ("0 0.5 0.5 0.1 0.1 0.9", "is neither"),
        ("0 0.5 0,5 0.1 0.1", "is neither"),
        ("car 0.5 0.5 0.1 0.1", "is neither"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_with_its_number(
    tmp_path: Path, make_jpeg: MakeJpeg, line: str, match: str
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    write(root / "classes.txt", "x\ny\nz\n")
    path = write(root / "labels" / "train" / "a.b.txt", f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=rf"{path}, line 2: .*{match}"):
        open_(root, "train")


def test_two_pictures_of_one_stem_have_one_label_file_and_the_second_is_left_out(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    write(root / "images" / "train" / "a.b.png", make_jpeg(7))
    samples = open_(root, "train")
    assert sum(key.endswith("a.b") for key in all_boxes(samples)) == 1
    assert [(d.reason, d.file) for d in samples.defects if d.reason == TWIN] == [
        (TWIN, str(root / "images" / "train" / "a.b.png"))
    ]


def test_an_archive_beside_its_unpacked_set_is_passed_over(
    tmp_path: Path, make_jpeg: MakeJpeg, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    expected = all_boxes(open_(root, "train"))
    write(root / "._dataset.tar", b"what macOS leaves")
    assert all_boxes(open_(root, "train")) == expected and not caplog.text
    write(root / "dataset.tar", b"whatever")
    assert splits_of(str(root)) == ("train", "val")
    assert all_boxes(open_(root, "train")) == expected
    assert "labels in files as well as dataset.tar" in caplog.text


def test_a_class_without_names_still_must_not_be_negative(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    write(root / "labels" / "train" / "a.b.txt", "-1 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match="line 1: there is no class -1"):
        open_(root, "train")


def test_labels_without_a_picture_are_reported_and_no_labels_at_all_refused(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    stray = write(root / "labels" / "train" / "stray.txt", "0 0.5 0.5 0.1 0.1\n")
    unread = write(root / "labels" / "train" / "none.TXT", "0 0.5 0.5 0.1 0.1\n")
    samples = open_(root, "train")
    assert [(d.reason, d.file) for d in samples.defects] == [
        (label_policy.NO_PICTURE, str(unread)),
        (label_policy.NO_PICTURE, str(stray)),
        (label_policy.NO_LABEL_FILE, str(root / "images" / "train" / "none.jpg")),
    ]
    unread.unlink()
    for path in (root / "labels" / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="None of the 3 pictures has a label file"):
        open_(root, "train")


@pytest.mark.parametrize("shape", ["[1, 2]", "[2, 3]"])
def test_yolo_boxes_with_keypoints_are_boxes(
    tmp_path: Path, make_jpeg: MakeJpeg, shape: str
) -> None:
    root = write_yolo(tmp_path, make_jpeg)
    points = "0.2 0.3" if shape == "[1, 2]" else "0.2 0.3 2 0 0 0"
    write(root / "labels" / "train" / "a.b.txt", f"0 0.5 0.5 0.25 0.5 {points}\n")
    write(root / "labels" / "val" / "c.txt", "0 0.5 0.5 0.25 0.5\n")
    text = f"train: images/train\nval: images/val\nnames: [a]\nkpt_shape: {shape}\n"
    path = write(root / "data.yaml", text)
    assert all_boxes(open_(path, "train"))["images/train/a.b"] == ([[24, 12, 40, 36]], ["a"])
    assert all_boxes(open_(path, "val"))["images/val/c"] == ([[24, 12, 40, 36]], ["a"])
    write(root / "labels" / "val" / "c.txt", "0 0.1 0.1 0.9 0.1 0.9 0.5 0.5 1.0 0.5 0.5 0.6 0.6\n")
    with pytest.raises(DataError, match=r"numbers of keypoints \(kpt_shape\)"):
        open_(path, "val")
    write(path, text.replace(shape, "17"))
    with pytest.raises(DataError, match="kpt_shape must be two numbers"):
        open_(path, "val")


@pytest.mark.parametrize(
    ("picture", "label", "data"),
    [
        ("images/a.jpg", "labels/a.txt", "."),
        ("train/images/a.jpg", "train/labels/a.txt", "."),
        ("images/train/a.jpg", "labels/train/a.txt", "images/train"),
        ("a.jpg", "a.txt", "."),
        ("train/a.jpg", "train/a.txt", "."),
        ("images/x/images/a.jpg", "images/x/labels/a.txt", "images/x/images"),
    ],
)
def test_yolo_labels_are_found_where_tools_put_them(
    tmp_path: Path, make_jpeg: MakeJpeg, picture: str, label: str, data: str
) -> None:
    write(tmp_path / picture, make_jpeg(0))
    write(tmp_path / label, "0 0.5 0.5 0.5 0.5")
    samples = open_(tmp_path / data, "train")
    assert [boxes for boxes, _ in all_boxes(samples).values()] == [[[16, 12, 48, 36]]]
