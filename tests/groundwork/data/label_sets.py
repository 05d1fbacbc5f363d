"""Labeled data sets of a few pictures, in every format, and how tests look at them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from groundwork.data.labels import LabeledSamples, open_labeled

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


def write_coco(root: Path, make_jpeg: MakeJpeg) -> Path:
    for split, names in (("train", ["a.jpg", "b.jpg"]), ("val", ["c.jpg"])):
        for number, name in enumerate(names):
            write(root / "images" / split / name, make_jpeg(number))
    rows = [(0, [1, 2, 10, 20], 1), (0, [5, 5, 8, 8.5], 2)]
    write(root / "annotations" / "train.json", coco(["a.jpg", "b.jpg"], rows))
    write(root / "annotations" / "val.json", coco(["c.jpg"], [(0, [0, 0, 64, 48], 2)]))
    return root


def write_yolo(root: Path, make_jpeg: MakeJpeg) -> Path:
    for split, names in (("train", ["a.b", "none", "empty"]), ("val", ["c"])):
        for number, name in enumerate(names):
            write(root / "images" / split / f"{name}.jpg", make_jpeg(number))
    write(root / "labels" / "train" / "a.b.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.25 0.25\n")
    write(root / "labels" / "train" / "empty.txt", "")
    write(root / "labels" / "val" / "c.txt", "2 0.1 0.1 0.9 0.1 0.9 0.5 0.5 1.0\n")
    return root


def write_voc(root: Path, make_jpeg: MakeJpeg) -> Path:
    for number, name in enumerate("abcd"):
        write(root / "JPEGImages" / f"{name}.jpg", make_jpeg(number))
    write(root / "Annotations" / "a.xml", voc(("dog", 1, 2, 30, 40), ("cat", 1, 1, 9.5, 9)))
    write(root / "Annotations" / "b.xml", voc())
    write(root / "Annotations" / "c.xml", voc(("ant", 1, 2, 30, 40)))
    write(root / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    write(root / "ImageSets" / "Main" / "val.txt", "c  1\nd -1\n")
    return root
