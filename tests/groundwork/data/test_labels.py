"""Claims about labels: one form from every format, one policy for every defect."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groundwork.data import label_policy
from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture, open_picture
from groundwork.data.label_policy import Defects, Labels, settle
from groundwork.data.labels import LabeledSamples, has_split, open_labeled, splits_of
from groundwork.data.loader import Loader
from groundwork.data.order import Order
from groundwork.errors import DataError

MakeJpeg = Callable[..., bytes]
NAN, INF = float("nan"), float("inf")


def open_(data: Path | str, split: str | None = None, names_in: Path | None = None) -> Any:
    cache = Path("/nonexistent")  # nothing here needs one
    return open_labeled(str(data), split, cache=cache, cache_bytes=1 << 20, names_in=names_in)


def all_boxes(samples: LabeledSamples) -> dict[str, tuple[list[list[float]], list[str]]]:
    """Return key -> boxes and names of classes."""
    found = {}
    for shard, size in enumerate(samples.shard_sizes.tolist()):
        for index in range(size):
            sample, _, annotations = samples.look(shard, index)
            names = [samples.names[number] for number in annotations.classes.tolist()]
            found[sample.key] = annotations.boxes.astype(float).round(3).tolist(), names
    return found


def picture_of(width: int, height: int, orientation: int = 1) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (width, height), "gray").save(file, "JPEG", exif=exif)
    return file.getvalue()


def write(path: Path, content: bytes | str | Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def coco(
    pictures: Sequence[str], rows: Sequence[tuple[int, Any, int]], names: Sequence[str] = ("a", "b")
) -> dict[str, Any]:
    """A COCO json of 64 x 48 pictures; rows are (picture, bbox, category)."""
    return {
        "images": [
            {"id": number, "file_name": name, "width": 64, "height": 48}
            for number, name in enumerate(pictures)
        ],
        "annotations": [
            {"id": number, "image_id": picture, "bbox": box, "category_id": category}
            for number, (picture, box, category) in enumerate(rows)
        ],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(names)],
    }


def voc(*objects: tuple[str, float, float, float, float], size: tuple[int, int] = (64, 48)) -> str:
    rows = "".join(
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{left}</xmin>"
        f"<ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>\n"
        for name, left, top, right, bottom in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{sides}\n{rows}</annotation>"


# ---- the policy --------------------------------------------------------------------------------


def mended(
    boxes: Sequence[Sequence[float]], classes: Sequence[int] | None = None, **more: Any
) -> tuple[Annotations, list[tuple[str, str]]]:
    """Settle boxes in a 64 x 48 picture; also return what was reported."""
    defects = Defects()
    count = len(boxes)
    labels = Labels(
        "labels.txt",
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(classes or [0] * count, np.int64),
        np.array(more.pop("crowd", [False] * count), np.bool_),
        np.arange(1, count + 1),
        "line",
        **more,
    )
    found = settle(labels, open_picture(picture_of(64, 48)), defects)
    return found, [(defect.reason, defect.where) for defect in defects]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([NAN, 1, 2, 3], label_policy.NOT_FINITE),
        ([1, 1, INF, 3], label_policy.NOT_FINITE),
        ([-INF, 1, INF, 3], label_policy.NOT_FINITE),
        ([9, 1, 3, 5], label_policy.INVERTED),
        ([1, 9, 3, 5], label_policy.INVERTED),
        ([5, 5, 5, 9], label_policy.NO_AREA),
        ([5, 5, 5.0009, 9], label_policy.NO_AREA),
        ([64, 5, 70, 9], label_policy.OUTSIDE),
        ([-9, -9, 0, 0], label_policy.OUTSIDE),
        ([3, 48.5, 9, 60], label_policy.OUTSIDE),
    ],
)
def test_a_box_that_cannot_be_is_dropped_and_reported(box: list[float], reason: str) -> None:
    found, told = mended([[1, 2, 3, 4], box])
    assert found.boxes.tolist() == [[1, 2, 3, 4]]
    assert told == [(reason, "line 2")]


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ([-5, 4, 10, 9], [0, 4, 10, 9]),
        ([5, -4, 10, 9], [5, 0, 10, 9]),
        ([60, 40, 70, 60], [60, 40, 64, 48]),
        ([-100, -100, 100, 100], [0, 0, 64, 48]),
    ],
)
def test_a_box_that_sticks_out_is_clipped_and_reported(
    box: list[float], inside: list[float]
) -> None:
    found, told = mended([box])
    assert found.boxes.tolist() == [inside]
    assert told == [(label_policy.CLIPPED, "line 1")]


def test_what_sticks_out_by_rounding_is_clipped_without_a_word() -> None:
    found, told = mended([[-0.005, 0, 64.009, 48]])
    assert found.boxes.tolist() == [[0, 0, 64, 48]]
    assert told == []


def test_shares_above_one_are_clipped() -> None:
    found, told = mended([[0.5, 0.5, 1.5, 1.0]], unit=True)
    assert found.boxes.tolist() == [[32, 24, 64, 48]]
    assert told == [(label_policy.CLIPPED, "line 1")]


def test_copies_go_but_the_same_box_of_another_class_stays() -> None:
    box = [1, 2, 30, 40]
    found, told = mended([box, box, box, [1, 2, 30, 41]], [0, 1, 0, 0])
    assert found.classes.tolist() == [0, 1, 0]
    assert told == [(label_policy.COPY, "line 3")]


def test_crowds_are_kept_and_marked_and_no_box_is_background() -> None:
    found, told = mended([[1, 2, 3, 4], [5, 6, 7, 8]], crowd=[False, True])
    assert found.crowd.tolist() == [False, True]
    empty, told_of_empty = mended([])
    assert len(empty) == 0 and empty.boxes.shape == (0, 4) and told == told_of_empty == []


def test_a_defect_is_counted_once_however_often_its_picture_is_read() -> None:
    defects = Defects()
    for _ in range(3):
        defects.add("reason", "file", "line 1")
    assert dict(defects.counts()) == {"reason": 1}
    assert len(pickle.loads(pickle.dumps(defects))) == 1


# ---- EXIF --------------------------------------------------------------------------------------


def marked(orientation: int) -> tuple[Picture, list[float]]:
    """A stored picture of 40 x 24 with a white rectangle, and the rectangle as it is stored."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[4:10, 20:36] = 255
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    return open_picture(file.getvalue()), [20.0, 4.0, 36.0, 10.0]


def lit(picture: Picture) -> list[float]:
    rows, columns = np.nonzero(picture.pixels()[:, :, 0] > 128)
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return [float(edge) for edge in edges]


def labels_of(box: list[float], size: tuple[int, int] | None) -> Labels:
    one = np.zeros(1, np.int64)
    return Labels("f", np.array([box]), one, np.zeros(1, np.bool_), one, "object", size=size)


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_of_the_stored_picture_are_turned_with_it(orientation: int) -> None:
    picture, stored = marked(orientation)
    assert (picture.width, picture.height) == (24, 40)
    defects = Defects()
    found = settle(labels_of(stored, (40, 24)), picture, defects)
    assert found.boxes.tolist() == [lit(picture)]
    assert not len(defects)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_upright_picture_stay_as_they_are(orientation: int) -> None:
    picture, _ = marked(orientation)
    for size in (None, (picture.width, picture.height)):
        found = settle(labels_of(lit(picture), size), picture, Defects())
        assert found.boxes.tolist() == [lit(picture)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_where_nothing_shows_which_way_boxes_are_that_is_reported(orientation: int) -> None:
    picture, _ = marked(orientation)
    for size in (None, (picture.width, picture.height)):
        defects = Defects()
        settle(labels_of([1, 2, 3, 4], size), picture, defects)
        shown = orientation == 1 or (orientation >= 5 and size is not None)
        assert list(defects.counts()) == ([] if shown else [label_policy.UNSURE])


def test_a_size_that_is_neither_is_reported_and_boxes_are_pixels() -> None:
    for orientation, size in ((1, (24, 40)), (6, (80, 48)), (1, (80, 48))):
        picture, _ = marked(orientation)
        defects = Defects()
        found = settle(labels_of([1, 2, 3, 4], size), picture, defects)
        assert found.boxes.tolist() == [[1, 2, 3, 4]]
        assert list(defects.counts()) == [label_policy.OTHER_SIZE]


# ---- COCO --------------------------------------------------------------------------------------


def write_coco(root: Path, make_jpeg: MakeJpeg) -> Path:
    for split, names in (("train", ["a.jpg", "b.jpg"]), ("val", ["c.jpg"])):
        for number, name in enumerate(names):
            write(root / "images" / split / name, make_jpeg(number))
    rows = [(0, [1, 2, 10, 20], 1), (0, [5, 5, 8, 8.5], 2)]
    write(root / "annotations" / "train.json", coco(["a.jpg", "b.jpg"], rows))
    write(root / "annotations" / "val.json", coco(["c.jpg"], [(0, [0, 0, 64, 48], 2)]))
    return root


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


# ---- YOLO --------------------------------------------------------------------------------------


def write_yolo(root: Path, make_jpeg: MakeJpeg) -> Path:
    for split, names in (("train", ["a.b", "none", "empty"]), ("val", ["c"])):
        for number, name in enumerate(names):
            write(root / "images" / split / f"{name}.jpg", make_jpeg(number))
    write(root / "labels" / "train" / "a.b.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.25 0.25\n")
    write(root / "labels" / "train" / "empty.txt", "")
    write(root / "labels" / "val" / "c.txt", "2 0.1 0.1 0.9 0.1 0.9 0.5 0.5 1.0\n")
    return root


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


# ---- VOC ---------------------------------------------------------------------------------------


def write_voc(root: Path, make_jpeg: MakeJpeg) -> Path:
    for number, name in enumerate("abcd"):
        write(root / "JPEGImages" / f"{name}.jpg", make_jpeg(number))
    write(root / "Annotations" / "a.xml", voc(("dog", 1, 2, 30, 40), ("cat", 1, 1, 9.5, 9)))
    write(root / "Annotations" / "b.xml", voc())
    write(root / "Annotations" / "c.xml", voc(("ant", 1, 2, 30, 40)))
    write(root / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    write(root / "ImageSets" / "Main" / "val.txt", "c  1\nd -1\n")
    return root


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


# ---- any format --------------------------------------------------------------------------------


def test_a_missing_picture_is_reported_in_train_and_an_error_in_val(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    for make in (write_coco, write_voc):
        root = make(tmp_path / make.__name__, make_jpeg)
        first = next(path for path in sorted(root.rglob("*.jpg")) if path.name == "a.jpg")
        first.unlink()
        train = open_(root, "train")
        assert len(train) == 1
        assert [(d.reason, d.file) for d in train.defects] == [
            (label_policy.MISSING_PICTURE, str(first))
        ]
        next(path for path in root.rglob("c.jpg")).unlink()
        with pytest.raises(DataError, match=r"c\.jpg"):
            open_(root, "val")


def test_a_list_keeps_the_pictures_that_it_names(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    names = tmp_path / "names.txt"
    for text in (
        "none.jpg\na.b.jpg\n",
        "a.b\r\n\r\nnone\r\n",
        "./images/train/a.b.jpg\ntrain/none",
    ):
        names.write_text(text)
        samples = open_(root, "train", names)
        assert list(all_boxes(samples)) == ["images/train/a.b", "images/train/none"]
    names.write_text("a.b.jpg\n\nmissing.jpg\n")
    with pytest.raises(DataError, match=rf"{names}, line 3: no picture .*'missing.jpg'"):
        open_(root, "train", names)
    write(root / "images" / "train" / "deep" / "a.b.jpg", make_jpeg(9))
    names.write_text("a.b.jpg\n")
    with pytest.raises(DataError, match=r"line 1: several pictures"):
        open_(root, "train", names)
    names.write_text("deep/a.b.jpg\n")
    assert list(all_boxes(open_(root, "train", names))) == ["images/train/deep/a.b"]


def test_the_fingerprint_covers_pictures_labels_and_names(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = write_yolo(tmp_path / "set", make_jpeg)
    prints = [open_(root, "train").fingerprint, open_(root, "train").fingerprint]
    assert prints[0] == prints[1]
    write(root / "labels" / "train" / "a.b.txt", "1 0.5 0.5 0.25 0.25\n")
    prints.append(open_(root, "train").fingerprint)
    write(root / "classes.txt", "x\ny\nz\n")
    prints.append(open_(root, "train").fingerprint)
    write(root / "images" / "train" / "none.jpg", make_jpeg(5, 80, 80))
    prints.append(open_(root, "train").fingerprint)
    assert len(set(prints)) == 4


def test_a_pickled_copy_reads_the_same(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    samples = open_(write_coco(tmp_path / "set", make_jpeg))
    copy = pickle.loads(pickle.dumps(samples))
    assert all_boxes(copy) == all_boxes(samples)
    assert copy.fingerprint == samples.fingerprint and copy.names == samples.names


def test_order_and_loader_read_labeled_data_as_any_other(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    samples = open_(write_coco(tmp_path / "set", make_jpeg))

    def views(picture: Picture, generator: np.random.Generator) -> dict[str, Any]:
        return {"image": picture.cut([(0.0, 0.0, 32.0, 32.0)], 8)[0]}

    order = Order(samples.shard_sizes, seed=1)
    loader = Loader(samples, order, views, seed=1, batch_size=3)
    batch = next(iter(loader))
    assert sorted(batch.keys) == ["images/train/a", "images/train/b", "images/val/c"]
    loader.close()


def test_what_is_no_labeled_data_is_told(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    write(tmp_path / "pictures" / "a.jpg", make_jpeg(0))
    with pytest.raises(DataError, match="There are no labels in"):
        open_(tmp_path / "pictures", "train")
    with pytest.raises(DataError, match="does not exist"):
        open_(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="is no file of labels"):
        open_(tmp_path / "pictures" / "a.jpg", "train")
    write(tmp_path / "two" / "annotations" / "train_a.json", "{}")
    write(tmp_path / "two" / "annotations" / "train_b.json", "{}")
    with pytest.raises(DataError, match="could both be the split train"):
        open_(tmp_path / "two", "train")


# ---- real data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "written", "dropped"),
    [
        ("aerial-hrplanes", ("0",), {"train": 6697, "val": 2551, "test": 2012}, [0, 0, 0]),
        (
            "medical-txl-pbc",
            ("WBC", "RBC", "Platelet"),
            {"train": 18616, "val": 5334, "test": 2687},
            [2, 0, 36],  # exact copies
        ),
        (
            "medical-bccd",
            ("Platelets", "RBC", "WBC"),
            {"train": 2805, "val": 1138, "test": 945},
            [1, 1, 0],  # without area
        ),
    ],
)
def test_real_data_has_the_boxes_that_it_is_known_to_have(
    shared_data: Path,
    name: str,
    classes: tuple[str, ...],
    written: dict[str, int],
    dropped: list[int],
) -> None:
    assert splits_of(str(shared_data / name)) == ("train", "val", "test")
    for (split, expected), bad in zip(written.items(), dropped, strict=True):
        samples = open_(shared_data / name, split)
        assert samples.names == classes
        found = sum(len(samples.look(shard, 0)[2]) for shard in range(len(samples)))
        assert found == expected - bad
        assert len(samples.defects) == bad


def test_real_label_fractions_name_real_pictures(shared_data: Path) -> None:
    for path in sorted((shared_data / "label-fractions").glob("*-seed0.txt")):
        data = path.name.rsplit("-", 2)[0]
        samples = open_(shared_data / data, "train", path)
        assert len(samples) == len(set(path.read_text().split()))
