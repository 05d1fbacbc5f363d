"""Labels in COCO json: what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groundwork.data import label_policy
from groundwork.data.labels import has_split, splits_of
from groundwork.errors import DataError
from tests.groundwork.data.label_sets import (
    NAN,
    MakeJpeg,
    all_boxes,
    coco,
    open_,
    write,
    write_coco,
)


def test_coco_splits_names_and_background(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    root = write_coco(tmp_path / "set", make_jpeg)
    assert splits_of(str(root)) == ("train", "val")
    assert has_split(str(root), "val") and not has_split(str(root), "test")
    train, val = open_(root, "train"), open_(root, "val")
    assert train.names == val.names == ("a", "b")
    assert all_boxes(train) == {
        "images/train/a": ([[1, 2, 11, 22], [5, 5, 13, 13.5]], ["a", "b"]),
        "images/train/b": ([], []),
    }
    assert all_boxes(val) == {"images/val/c": ([[0, 0, 64, 48]], ["b"])}
    assert len(open_(root)) == 3
    with pytest.raises(DataError, match=r"no split 'test', only train, val"):
        open_(root, "test")


@pytest.mark.parametrize("names", ["train val", "train valid", "training validation"])
def test_splits_that_use_the_same_file_names_are_told_apart(
    tmp_path: Path, make_jpeg: MakeJpeg, names: str
) -> None:
    for place, split in enumerate(names.split()):
        for number in range(2):
            write(tmp_path / "images" / split / f"{number}.jpg", make_jpeg(9 * place + number))
        rows = [(0, [1, 2, 10, 20], 1)]
        write(tmp_path / "annotations" / f"{split}_coco.json", coco(["0.jpg", "1.jpg"], rows))
    json_of_val = tmp_path / "annotations" / f"{names.split()[1]}_coco.json"
    places: list[tuple[Path, str | None]] = [(tmp_path, "val"), (json_of_val, None)]
    for data, given in places:
        sample = open_(data, given).read(0, 0)
        assert Path(sample.source) == tmp_path / "images" / names.split()[1] / "0.jpg"
    other = json_of_val.rename(tmp_path / "annotations" / "some.json")
    with pytest.raises(DataError, match=r"are in .* as well as in"):
        open_(other)


def test_pictures_of_the_split_count_where_another_split_has_more_of_these_names(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_coco(tmp_path, make_jpeg)
    write(root / "annotations" / "val.json", coco(["c.jpg", "a.jpg", "b.jpg"], []))
    with pytest.raises(
        DataError, match=r"2 of 3 pictures are missing, the first being .*images/val/a"
    ):
        open_(root, "val")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["cell", "cell"], "two classes of the name 'cell', 0 and 1"),
        (["a", "b\nc"], r"class 1 'b\\nc'"),
        (["a", " "], "class 1 ' '"),
        ([], "have no class"),
    ],
)
def test_names_that_cannot_be_told_apart_or_written_are_refused(
    tmp_path: Path, make_jpeg: MakeJpeg, names: list[str], match: str
) -> None:
    root = write_coco(tmp_path, make_jpeg)
    for split, picture in (("train", "a.jpg"), ("val", "c.jpg")):
        write(root / "annotations" / f"{split}.json", coco([picture], [], names))
    with pytest.raises(DataError, match=match):
        open_(root, "train")


def test_numbers_and_names_beyond_all_bounds_are_told(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    root = write_coco(tmp_path, make_jpeg)
    text = json.dumps(coco(["a.jpg", "\0.jpg"], [(0, [1, 2, 7777, 4], 1)]))
    write(root / "annotations" / "train.json", text.replace("7777", "1" + "0" * 400))
    samples = open_(root, "train")
    assert {label_policy.NOT_FINITE, label_policy.MISSING_PICTURE} == set(samples.defects.counts())
    write(root / "annotations" / "train.json", text.replace("7777", "1" * 5000))
    with pytest.raises(DataError, match="this is no JSON"):
        open_(root, "train")


def test_a_single_json_is_data_that_is_not_split(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    root = write_coco(tmp_path / "set", make_jpeg)
    path = root / "annotations" / "val.json"
    assert splits_of(str(path)) == ()
    assert not has_split(str(path), "val")
    assert all_boxes(open_(path, "val")) == all_boxes(open_(root, "val"))


@pytest.mark.parametrize(
    ("json_path", "picture"),
    [
        ("annotations/instances_val2017.json", "val2017/a.jpg"),
        ("annotations/val.json", "images/a.jpg"),
        ("val.json", "images/val/a.jpg"),
        ("valid/_annotations.coco.json", "valid/a.jpg"),
        ("labels.json", "pictures/../a.jpg"),
        ("annotations/anything.json", "images/some/a.jpg"),
    ],
)
def test_pictures_are_found_where_exporters_put_them(
    tmp_path: Path, make_jpeg: MakeJpeg, json_path: str, picture: str
) -> None:
    (tmp_path / "pictures").mkdir()
    write(tmp_path / picture, make_jpeg(0))
    write(tmp_path / json_path, coco(["a.jpg"], [(0, [1, 1, 5, 5], 1)]))
    samples = open_(tmp_path, "val")
    assert len(samples) == 1 and len(samples.look(0, 0)[2]) == 1


def test_ids_are_numbered_in_order_and_empty_headings_left_out(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    for split in ("train", "val"):
        write(tmp_path / "images" / split / "a.jpg", make_jpeg(0))
    document = coco(["a.jpg"], [(0, [1, 1, 5, 5], 7)])
    document["categories"] = [
        {"id": 7, "name": "plane", "supercategory": "things"},
        {"id": 3, "name": "car", "supercategory": "things"},
        {"id": 0, "name": "things", "supercategory": "none"},
    ]
    write(tmp_path / "annotations" / "train.json", document)
    document["categories"] = [{"id": 9, "name": "boat"}, document["categories"][0]]
    document["annotations"][0]["category_id"] = 9
    write(tmp_path / "annotations" / "val.json", document)
    for split, number in (("train", 1), ("val", 2)):
        samples = open_(tmp_path, split)
        assert samples.names == ("car", "plane", "boat")  # unused, but no heading
        assert samples.look(0, 0)[2].classes.tolist() == [number]
        assert "'things' (id 0) is left out" in samples.notes[0]


def test_splits_that_disagree_about_a_category_are_refused(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_coco(tmp_path / "set", make_jpeg)
    document = coco(["c.jpg"], [], ["b", "a"])
    write(root / "annotations" / "val.json", document)
    with pytest.raises(DataError, match=r"category 1 is 'a' in .*train.json and 'b' in .*val.json"):
        open_(root, "train")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["annotations"][0].update(category_id=3), "annotation 0 has the class 3"),
        (lambda d: d["annotations"][0].update(category_id=-1), "annotation 0 has the class -1"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "annotation 0 has the bbox"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, "x", 4]), "annotation 0 has the bbox"),
        (lambda d: d["annotations"][0].pop("image_id"), "element 0 of 'annotations'"),
        (lambda d: d["images"][0].pop("file_name"), "element 0 of 'images'"),
        (lambda d: d.pop("categories"), "has no list 'categories'"),
        (lambda d: d["images"].append(d["images"][0]), "two images of the id 0"),
        (lambda d: d["images"].clear(), "names no picture"),
    ],
)
def test_a_coco_json_that_cannot_be_meant_is_refused(
    tmp_path: Path, make_jpeg: MakeJpeg, change: Callable[[Any], object], match: str
) -> None:
    write(tmp_path / "images" / "a.jpg", make_jpeg(0))
    document = coco(["a.jpg"], [(0, [1, 1, 5, 5], 1)])
    change(document)
    path = write(tmp_path / "annotations" / "train.json", document)
    with pytest.raises(DataError, match=match) as caught:
        open_(tmp_path, "train")
    assert str(path) in str(caught.value)


def test_broken_json_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "annotations" / "train.json", '{"images": [],\n "annotations": [}')
    with pytest.raises(DataError, match=rf"{path}, line 2: this is no JSON"):
        open_(tmp_path, "train")


def test_what_a_coco_json_may_have_and_is_passed_over(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    write(tmp_path / "images" / "a.jpg", make_jpeg(0))
    document = coco(
        ["a.jpg"], [(0, [1, 1, 5, 5], 1), (4, [1, 1, 5, 5], 1), (0, [], 1), (0, [NAN, 1, 5, 5], 1)]
    )
    document["annotations"][0]["iscrowd"] = 1
    document["images"].append({"id": 9, "file_name": "a.jpg"})
    samples = open_(write(tmp_path / "annotations" / "train.json", document))
    found = samples.look(0, 0)[2]
    assert found.boxes.tolist() == [[1, 1, 6, 6]] and found.crowd.tolist() == [True]
    assert dict(samples.defects.counts()) == {
        label_policy.NO_PICTURE: 1,
        label_policy.NO_BOX: 1,
        label_policy.NOT_FINITE: 1,
        label_policy.LISTED_TWICE: 1,
    }


def test_a_json_of_no_split_beside_those_of_splits_is_not_passed_over(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    """CVAT writes instances_default.json for tasks that are in no subset."""
    root = write_coco(tmp_path, make_jpeg)
    for path in sorted((root / "annotations").iterdir()):
        path.rename(path.with_name(f"instances_{path.name}"))
    (root / "annotations" / "captions_all.json").write_text("{}")
    assert len(open_(root, "train")) == 2
    write(root / "annotations" / "instances_default.json", coco(["a.jpg"], []))
    with pytest.raises(DataError, match=r"instances_default\.json is of no split"):
        open_(root, "train")


def test_of_a_box_that_was_turned_what_encloses_it_is_taken(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    write(tmp_path / "images" / "a.jpg", make_jpeg(0))
    document: Any = coco(["a.jpg"], [(0, [10, 20, 20, 10], 1)] * 3 + [(0, [1, 2, 4, 4], 1)])
    turns: list[Any] = [90.0, 45, 0, 10**400]
    for annotation, turn in zip(document["annotations"], turns, strict=True):
        annotation["attributes"] = {"rotation": turn, "occluded": False}
    write(tmp_path / "annotations.json", document)
    labels = open_(tmp_path)
    assert any(note.startswith("2 boxes are turned") for note in labels.notes)
    [(boxes, _)] = all_boxes(labels).values()
    half = 30 / 2**0.5 / 2
    assert boxes[0] == pytest.approx([15, 15, 25, 35])
    assert boxes[1] == pytest.approx([20 - half, 25 - half, 20 + half, 25 + half], abs=1e-3)
    assert boxes[2:] == [[10, 20, 30, 30], [1, 2, 5, 6]]
