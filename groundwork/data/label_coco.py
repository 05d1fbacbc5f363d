"""COCO json: labels of many pictures in one file.

What: `CocoRoot` reads the json files of a data set, one for each split. Boxes are left, top, width,
height in pixels (https://cocodataset.org/#format-data, "Object Detection").

Classes are the categories of all the files together, in the order of their ids, so that a class
has the same number in every split; files that give one id two names are refused. A category is left
out where no box of any split has it and another category names it as its supercategory: exporters
write such a heading as if it were a class.

A picture of the file without an annotation is background; a picture on the disk that the file does
not name is no part of the data set. `iscrowd` is kept. `segmentation` and `keypoints` are not read.
Of a box that was turned (`attributes.rotation`, degrees, as CVAT writes it) what encloses it is
taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundwork.data.label_policy import LISTED_TWICE, NO_BOX, NO_PICTURE, Defects
from groundwork.data.label_table import LabelTable, relative, split_of
from groundwork.errors import DataError

_LOOKED_AT = 50  # pictures by which a json's folder of pictures is recognised


@dataclass(slots=True)
class CocoRoot:
    """A COCO data set: its json files by split (None: a file that is of no split).

    `loose`: pictures that are nowhere to be found are no error, and keep the names they are given.
    """

    root: Path
    files: Mapping[str | None, Path]
    names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    loose: bool = False

    form = "COCO json"

    def splits(self) -> tuple[str, ...]:
        """Return the splits that there are; none where the data is not split."""
        return tuple(split for split in self.files if split is not None)

    def read(self, split: str | None, defects: Defects) -> dict[str | None, LabelTable]:
        """Read one split, or all. Raises DataError for a file that is not what it should be."""
        documents = {key: _Document.read(path) for key, path in self.files.items()}
        numbers, self.names, self.notes = _classes(list(documents.values()))
        chosen = {
            key: document
            for key, document in documents.items()
            if split is None or key in (None, split)
        }
        turned = sum(
            bool(_turn(one)) for document in chosen.values() for one in document.annotations
        )
        if turned:
            self.notes.append(
                f"{turned} boxes are turned by their attributes.rotation: what encloses them is "
                "taken"
            )
        return {
            key: _table(self.root, self._pictures_of(key, document), document, numbers, defects)
            for key, document in chosen.items()
        }

    def _pictures_of(self, split: str | None, document: _Document) -> Path:
        """Return the folder that file names are relative to.

        It is one that is called as the json's split is, where any of the pictures is there; else
        the one that has the most. Raises DataError where there is none, or several have as many:
        splits may use the same file names.
        """
        images, beside = self.root / "images", document.path.parent
        wanted = split or split_of(document.path.stem)
        named = [name for name in (split, document.split_name()) if name]
        own = [above / name for above in (images, self.root) for name in named]
        own += [
            folder
            for folder in (*_subfolders(images), *_subfolders(self.root))
            if wanted is not None and split_of(folder.name) == wanted
        ]
        others = [images, beside, self.root, *_subfolders(images)]
        folders = list(dict.fromkeys([*own, *others]))
        names = [image["file_name"] for image in document.images]
        looked_at = names[:: max(1, len(names) // _LOOKED_AT)]
        hits = {f: sum((f / name).is_file() for name in looked_at) for f in folders}
        of_the_split = [folder for folder in own if hits[folder]]
        if of_the_split:
            return max(of_the_split, key=lambda folder: hits[folder])
        if not any(hits.values()) and self.loose:
            return self.root
        if not any(hits.values()):
            tried = ", ".join(dict.fromkeys(str(folder) for folder in folders))
            raise DataError(
                f"None of the pictures that {document.path} names was found, the first being "
                f"{names[0]!r}: put them into one of {tried}."
            )
        best = [folder for folder in folders if hits[folder] == max(hits.values())]
        if len({folder.resolve() for folder in best}) > 1:
            raise DataError(
                f"The pictures that {document.path} names, such as {names[0]!r}, are in {best[0]} "
                f"as well as in {best[1]}, and neither is called as the json is: give the folder "
                "the name of the split, or write it before the file names."
            )
        return best[0]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


@dataclass(frozen=True, slots=True)
class _Document:
    """A json file whose three lists are lists of objects with what is needed in them."""

    path: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _Document:
        """Read and check a file. Raises DataError."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"The labels {path} cannot be read: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: this is no JSON ({error.msg}): export it again."
            ) from error
        except (ValueError, RecursionError) as error:  # not UTF-8, or a number of 5,000 digits
            raise DataError(
                f"{path}, line 1: this is no JSON ({error}): export it again."
            ) from error
        if not isinstance(content, dict):
            content = {}
        document = cls(
            path,
            _objects(path, content, "images", {"id": int | str, "file_name": str}),
            _objects(path, content, "annotations", {"image_id": int | str, "category_id": int}),
            _objects(path, content, "categories", {"id": int, "name": str}),
        )
        if not document.images:
            raise DataError(f"{path} names no picture: its list 'images' is empty.")
        return document

    def split_name(self) -> str:
        """Return what the file calls its split: val2017 of instances_val2017."""
        return self.path.stem.rpartition("_")[2]


def _objects(
    path: Path, content: dict[str, Any], name: str, needed: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = content.get(name)
    if not isinstance(rows, list):
        raise DataError(
            f"{path} has no list {name!r}, and so is no COCO json of boxes, which has images, "
            "annotations and categories."
        )
    for number, row in enumerate(rows):
        wrong = [
            key
            for key, kind in needed.items()
            if not isinstance(row, dict)
            or not isinstance(row.get(key), kind)
            or isinstance(row.get(key), bool)
        ]
        if wrong:
            raise DataError(
                f"{path}: element {number} of {name!r} has no usable {wrong[0]!r}: "
                f"{json.dumps(row)[:200]}."
            )
    return rows


def _classes(documents: list[_Document]) -> tuple[dict[int, int], tuple[str, ...], list[str]]:
    """Number the categories of all files; also return the classes' names, and what was left out."""
    names: dict[int, str] = {}
    where: dict[int, Path] = {}
    headings: set[str] = set()
    used: set[int] = set()
    for document in documents:
        own: set[int] = set()
        for category in document.categories:
            number, name = category["id"], category["name"]
            if number in own or names.setdefault(number, name) != name:
                first = where[number] if number not in own else document.path
                raise DataError(
                    f"The category {number} is {names[number]!r} in {first} and {name!r} in "
                    f"{document.path}: give each id one name, the same in all files."
                )
            own.add(number)
            where.setdefault(number, document.path)
            above = category.get("supercategory")
            if isinstance(above, str) and above != name:
                headings.add(above)
        used.update(annotation["category_id"] for annotation in document.annotations)
    notes = []
    kept = []
    for number in sorted(names):
        if number not in used and names[number] in headings:
            notes.append(
                f"the category {names[number]!r} (id {number}) is left out: no box has it, and it "
                "is the supercategory of another"
            )
        else:
            kept.append(number)
    numbers = {number: place for place, number in enumerate(kept)}
    return numbers, tuple(names[number] for number in kept), notes


def _table(
    root: Path, folder: Path, document: _Document, numbers: dict[int, int], defects: Defects
) -> LabelTable:
    file = str(document.path)
    pictures: dict[str, tuple[str, str, tuple[int, int] | None]] = {}
    places: dict[str, int] = {}  # path -> number of the picture
    by_id: dict[int | str, int] = {}
    for image in document.images:
        path = relative(str(folder / image["file_name"]), root)
        if image["id"] in by_id:
            raise DataError(f"{file} has two images of the id {image['id']!r}: export it again.")
        if path in pictures:
            defects.add(LISTED_TWICE, file, f"image {image['id']} ({path})")
        else:
            places[path] = len(pictures)
            pictures[path] = (path, file, _size(image))
        by_id[image["id"]] = places[path]
    rows = []
    for number, annotation in enumerate(document.annotations):
        place = annotation.get("id")
        place = place if type(place) is int and abs(place) < 1 << 62 else number
        if annotation["category_id"] not in numbers:
            raise DataError(
                f"{file}: annotation {place} has the class {annotation['category_id']}, which is "
                f"none of its categories ({', '.join(map(str, sorted(numbers)))}): correct it, or "
                "add the category."
            )
        picture = by_id.get(annotation["image_id"])
        if picture is None:
            where = f"annotation {place} (of image {annotation['image_id']})"
            defects.add(NO_PICTURE, file, where)
            continue
        if not annotation.get("bbox"):
            defects.add(NO_BOX, file, f"annotation {place}")
            continue
        box = _box(annotation, file, place)
        crowd = bool(annotation.get("iscrowd"))
        rows.append((picture, box, numbers[annotation["category_id"]], crowd, place))
    return LabelTable.of(root, "annotation", list(pictures.values()), rows)


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    sides = [image.get("width"), image.get("height")]
    width, height = (side if isinstance(side, int | float) else 0 for side in sides)
    said = 0 < width < 1 << 31 and 0 < height < 1 << 31
    return (int(width), int(height)) if said else None


def _turn(annotation: dict[str, Any]) -> float:
    """Return by how many degrees a box was turned about its middle, as CVAT writes it."""
    said = annotation.get("attributes")
    turned = said.get("rotation") if isinstance(said, dict) else None
    if not isinstance(turned, int | float) or not abs(turned) <= 360:
        return 0.0
    return float(turned)


def _box(annotation: dict[str, Any], file: str, place: int) -> tuple[float, float, float, float]:
    value = annotation["bbox"]
    if (
        not isinstance(value, list)
        or len(value) != 4
        or not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in value)
    ):
        raise DataError(
            f"{file}: annotation {place} has the bbox {json.dumps(value)[:200]}, which is not four "
            "numbers (left, top, width, height)."
        )
    try:
        left, top, width, height = map(float, value)
    except OverflowError:  # of a whole number beyond all floats
        left = top = width = height = math.inf
    if turned := math.radians(_turn(annotation)):
        across, along = abs(math.cos(turned)), abs(math.sin(turned))
        x, y = left + width / 2, top + height / 2
        width, height = width * across + height * along, width * along + height * across
        left, top = x - width / 2, y - height / 2
    return left, top, left + width, top + height
