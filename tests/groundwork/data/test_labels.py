"""Claims about labels: one policy for every defect, one form for every format."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groundwork.data import label_policy
from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture, open_picture
from groundwork.data.label_policy import Defects, Labels, settle
from groundwork.data.labels import splits_of
from groundwork.data.loader import Loader
from groundwork.data.order import Order
from groundwork.errors import DataError
from tests.groundwork.data.label_sets import (
    INF,
    NAN,
    MakeJpeg,
    all_boxes,
    open_,
    picture_of,
    write,
    write_coco,
    write_voc,
    write_yolo,
)

# ---- the policy ----------------------------------------------------------------------------------


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


# ---- EXIF ----------------------------------------------------------------------------------------


def marked(orientation: int, form: str = "PNG") -> tuple[Picture, list[float]]:
    """A stored picture of 40 x 24 with a white rectangle, and the rectangle as it is stored."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[4:10, 20:36] = 255
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(file, form, exif=exif)
    return open_picture(file.getvalue()), [20.0, 4.0, 36.0, 10.0]


def lit(picture: Picture) -> list[float]:
    rows, columns = np.nonzero(picture.pixels()[:, :, 0] > 128)
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return [float(edge) for edge in edges]


def labels_of(box: list[float], size: tuple[int, int] | None) -> Labels:
    one = np.zeros(1, np.int64)
    return Labels("f", np.array([box]), one, np.zeros(1, np.bool_), one, "object", size=size)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])  # Pillow turns a TIFF by itself
@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_of_the_stored_picture_are_turned_with_it(orientation: int, form: str) -> None:
    picture, stored = marked(orientation, form)
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


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_where_nothing_shows_which_way_boxes_are_that_is_reported(
    orientation: int, form: str
) -> None:
    picture, _ = marked(orientation, form)
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


# ---- any format ----------------------------------------------------------------------------------


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
    with pytest.raises(DataError, match=rf"{names}: no picture .*'missing.jpg'"):
        open_(root, "train", names)
    write(root / "images" / "train" / "deep" / "a.b.jpg", make_jpeg(9))
    names.write_text("a.b.jpg\n")
    with pytest.raises(DataError, match=r": several pictures"):
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


# ---- real data -----------------------------------------------------------------------------------


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
    paths = sorted((shared_data / "label-fractions").glob("*-seed0.txt"))
    assert paths
    for path in paths:
        data = path.name.rsplit("-", 2)[0]
        samples = open_(shared_data / data, "train", path)
        assert len(samples) == len(set(path.read_text().split()))
