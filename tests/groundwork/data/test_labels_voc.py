"""Labels in Pascal VOC xml: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from groundwork.data import label_policy
from groundwork.errors import DataError
from tests.groundwork.data.label_sets import (
    MakeJpeg,
    all_boxes,
    open_,
    picture_of,
    voc,
    write,
    write_voc,
)


def test_voc_takes_corners_as_they_are_and_names_from_all_splits(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_voc(tmp_path / "set", make_jpeg)
    train, val = open_(root, "train"), open_(root, "val")
    assert train.names == val.names == ("ant", "cat", "dog")
    assert all_boxes(train) == {
        "JPEGImages/a": ([[1, 2, 30, 40], [1, 1, 9.5, 9]], ["dog", "cat"]),
        "JPEGImages/b": ([], []),
    }
    assert list(all_boxes(val)) == ["JPEGImages/c", "JPEGImages/d"]
    assert list(val.defects.counts()) == [label_policy.NO_LABEL_FILE]


def test_voc_names_may_end_in_what_marks_a_class(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    names = ["img 1", "img 0", "scan-1", "x 1"]
    for number, name in enumerate(names):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", make_jpeg(number))
        write(tmp_path / "Annotations" / f"{name}.xml", voc(("dog", 1, 2, 30, 40)))
    lists = tmp_path / "ImageSets" / "Main"
    write(lists / "train.txt", "img 1\nimg 0\n")
    write(lists / "val.txt", "scan-1\nx 1\n")
    write(lists / "test.txt", "scan-1 -1\nx 1  1\n")  # marked
    assert list(all_boxes(open_(tmp_path, "train"))) == ["JPEGImages/img 1", "JPEGImages/img 0"]
    for split in ("val", "test"):
        assert list(all_boxes(open_(tmp_path, split))) == ["JPEGImages/scan-1", "JPEGImages/x 1"]


def test_voc_twins_are_reported_and_trainval_does_not_leak(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_voc(tmp_path, make_jpeg)
    write(root / "JPEGImages" / "a.png", make_jpeg(7))
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    write(root / "ImageSets" / "Main" / "trainval.txt", "a\nb\nc\nd\n")
    train = open_(root, "train")
    assert list(all_boxes(train)) == ["JPEGImages/a", "JPEGImages/b"]
    assert [(d.reason, d.file) for d in train.defects] == [
        (label_policy.TWIN, str(root / "JPEGImages" / "a.png"))
    ]
    assert train.notes == ("train is trainval.txt without what val.txt names",)
    assert list(all_boxes(open_(root, "val"))) == ["JPEGImages/c", "JPEGImages/d"]


def test_voc_names_keep_the_order_of_a_list_of_them(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    root = write_voc(tmp_path / "set", make_jpeg)
    lines = ("# label:color:parts:actions", "background:::", "dog:1,2,3::", "cat:::", "ant:::")
    write(root / "labelmap.txt", "\n".join(lines))
    assert open_(root, "train").names == ("dog", "cat", "ant")
    (root / "labelmap.txt").unlink()
    write(root / "classes.txt", "dog\ncat\n")
    with pytest.raises(DataError, match=r"c.xml: object 1 has the class 'ant'.*classes.txt"):
        open_(root)


def test_voc_without_lists_and_beside_pictures(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    write(tmp_path / "flat" / "train" / "a.jpg", make_jpeg(0))
    write(tmp_path / "flat" / "train" / "a.xml", voc(("x", 1, 2, 3, 4)))
    write(tmp_path / "voc" / "JPEGImages" / "a.jpg", make_jpeg(0))
    write(tmp_path / "voc" / "Annotations" / "a.xml", voc(("x", 1, 2, 3, 4)))
    for name in ("flat", "voc"):
        samples = open_(tmp_path / name, "train")
        assert [boxes for boxes, _ in all_boxes(samples).values()] == [[[1, 2, 3, 4]]]


BOMB = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "{}">]><annotation>&a;</annotation>'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("<annotation>\n<object>\n</annotation>", "line 3: this is no XML"),
        (BOMB.format("ha" * 10), "declares a document type"),
        (BOMB.format("ha" * 10).encode("utf-16"), "declares a document type|no XML"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation>&undefined;</annotation>", "line 1: this is no XML"),
        ("<html></html>", "begins with <html>"),
        ("<annotation><object><name>x</name></object></annotation>", "object 1 lacks"),
        (voc(("x", 1, 2, 3, 4)).replace("<xmax>3", "<xmax>three"), "object 1 lacks"),
        (voc(("", 1, 2, 3, 4)), "object 1 lacks its name"),
        ("", "no XML"),
    ],
)
def test_an_xml_that_cannot_be_meant_is_refused(
    tmp_path: Path, make_jpeg: MakeJpeg, content: str | bytes, match: str
) -> None:
    root = write_voc(tmp_path / "set", make_jpeg)
    path = write(root / "Annotations" / "a.xml", content)
    with pytest.raises(DataError, match=match) as caught:
        open_(root, "train")
    assert str(path) in str(caught.value)


def test_a_stored_size_in_the_labels_turns_the_boxes(tmp_path: Path) -> None:
    write(tmp_path / "JPEGImages" / "a.jpg", picture_of(64, 48, orientation=6))
    write(tmp_path / "Annotations" / "a.xml", voc(("x", 0, 0, 10, 48)))
    assert all_boxes(open_(tmp_path)) == {"JPEGImages/a": ([[0, 0, 48, 10]], ["x"])}
