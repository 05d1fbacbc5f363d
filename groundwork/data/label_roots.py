"""Which labels a data set has: its format and its splits, from what lies in its folder.

What: `find_root` looks at a folder or file and gives a `Root`, which reads the labels of a split.
Looked for, in this order, the first that is there being taken:

1. `ImageSets/Main/{train,val,test}.txt`, or `Annotations` and `JPEGImages` without splits: VOC.
2. `data.yaml` (or the one yaml file with `names` and `train`): YOLO.
3. `images` beside `labels`, with `{train,val,test}` below `images`, or without splits: YOLO. Also
   `{train,val,test}/images` beside `labels`.
4. `annotations/*.json`, or json files in the folder itself or in `{train,val,test}`: COCO. Where
   some are called `instances_*`, only these count.
5. Pictures beside .xml files (VOC) or .txt files (YOLO), also in `{train,val,test}`; a folder of
   pictures inside `images`, with its labels in `labels`.

A file is a COCO json, a data.yaml, or a text file that lists pictures with YOLO labels. `valid` and
`validation` are taken for `val`, and `training` and `testing` for the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from groundwork.config import parse_yaml
from groundwork.data.label_coco import CocoRoot
from groundwork.data.label_policy import Defects
from groundwork.data.label_table import SPLIT_WORDS, SPLITS, LabelTable, split_of
from groundwork.data.label_voc import VocRoot
from groundwork.data.label_yolo import YoloRoot, label_file, read_yaml_root, with_classes_txt
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import DataError, UsageError


class Root(Protocol):
    """Labels of one format. `names` (the classes) and `notes` are there once `read` was called."""

    form: str
    names: tuple[str, ...]
    notes: list[str]

    @property
    def root(self) -> Path:
        """Return the folder of the data set."""

    def splits(self) -> tuple[str, ...]:
        """Return the splits that there are; none where the data is not split."""

    def read(self, split: str | None, defects: Defects) -> dict[str | None, LabelTable]:
        """Read one split, or all; data that is not split is read whatever is asked for."""


def find_root(data: str) -> Root:
    """Find the labels of a data set. Raises DataError where there are none, or several."""
    path = Path(data)
    if path.is_file():
        return _from_file(path)
    if not path.is_dir():
        raise DataError(
            f"{data} does not exist (looked for {path.absolute()}): name the folder of a labeled "
            "data set, a COCO json, a data.yaml, labeled shards, or scenes."
        )
    for look in (_voc, _yolo_yaml, _yolo, _coco, _beside):
        root = look(path)
        if root is not None:
            return root
    raise DataError(
        f"There are no labels in {path.absolute()}: looked for ImageSets/Main, data.yaml, images "
        "beside labels, annotations/*.json, pictures beside .xml or .txt files, and tar shards. "
        "Name the root of the data set, which holds both pictures and labels."
    )


def _from_file(path: Path) -> Root:
    suffix = path.suffix.lower()
    if suffix == ".json":
        # The root is what lies above `annotations`, or the json's own folder.
        above = path.parent.parent if path.parent.name == "annotations" else path.parent
        return CocoRoot(above, {None: path})
    if suffix in (".yaml", ".yml"):
        return read_yaml_root(path)
    if suffix == ".txt":
        return with_classes_txt(YoloRoot(path.parent, {None: [path]}))
    raise DataError(
        f"{path} is no file of labels: name a COCO json, a data.yaml, a text file that lists "
        "pictures, or the folder of a data set."
    )


def _voc(root: Path) -> Root | None:
    lists = root / "ImageSets" / "Main"
    pictures, annotations = root / "JPEGImages", root / "Annotations"
    found: dict[str | None, Path | None] = {
        split: lists / f"{split}.txt" for split in SPLITS if (lists / f"{split}.txt").is_file()
    }
    if "train" not in found and (lists / "trainval.txt").is_file():
        found = {"train": lists / "trainval.txt", **found}
    if not annotations.is_dir() or not (found or pictures.is_dir()):
        return None
    if not found:
        found = {None: None}
    return VocRoot(root, found, dict.fromkeys(found, pictures), dict.fromkeys(found, annotations))


def _yolo_yaml(root: Path) -> Root | None:
    for name in ("data.yaml", "data.yml"):
        if (root / name).is_file():
            return read_yaml_root(root / name)
    found = [path for path in sorted(root.glob("*.y*ml")) if _describes_data(path)]
    if len(found) > 1:
        raise DataError(
            f"The folder {root} has several yaml files of data, {found[0].name} and "
            f"{found[1].name} among them: name the one that is meant."
        )
    return read_yaml_root(found[0]) if found else None


def _describes_data(path: Path) -> bool:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError, UsageError):
        return False
    return isinstance(document, dict) and {"names", "train"} <= document.keys()


def _yolo(root: Path) -> Root | None:
    images, labels = root / "images", root / "labels"
    if images.is_dir() and labels.is_dir():
        sources = dict(_split_folders(images)) or {None: images}
    else:
        sources = {
            split: folder / "images"
            for split, folder in _split_folders(root)
            if (folder / "images").is_dir() and (folder / "labels").is_dir()
        }
    if not sources:
        return None
    return with_classes_txt(YoloRoot(root, {split: [path] for split, path in sources.items()}))


def _split_folders(folder: Path) -> Iterator[tuple[str | None, Path]]:
    """Yield the folders that are splits, in the order of SPLITS."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_WORDS.get(re.sub(r"\d+$", "", path.name.lower()))  # val2017
        if split is None or not path.is_dir():
            continue
        if split in found:
            raise DataError(
                f"{found[split]} and {path} could both be the split {split}: name the one that is "
                "meant, or move the other away."
            )
        found[split] = path
    for split in SPLITS:
        if split in found:
            yield split, found[split]


def _coco(root: Path) -> Root | None:
    for folder in (root / "annotations", root):
        files = _json_files(folder) if folder.is_dir() else []
        by_split = _by_split(files)
        if by_split:
            return CocoRoot(root, by_split)
    below: dict[str | None, Path] = {}
    for split, folder in _split_folders(root):
        files = _json_files(folder)
        if len(files) == 1:
            below[split] = files[0]
    return CocoRoot(root, below) if below else None


def _json_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    return [path for path in files if path.name.startswith("instances_")] or files


def _by_split(files: list[Path]) -> Mapping[str | None, Path]:
    found: dict[str | None, Path] = {}
    for path in files:
        split = split_of(path.stem)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{found[split]} and {path} could both be the split {split}: name the json that is "
                "meant, or move the other away."
            )
        found[split] = path
    others = [path for path in files if path not in found.values()]
    if found and any(path.name.startswith("instances_") for path in others):
        raise DataError(
            f"{others[0]} is of no split, and beside it is {next(iter(found.values()))}, which is: "
            "give it a split's name (train, val, test), name the json that is meant, or move it "
            "away."
        )
    if found:
        return {split: found[split] for split in SPLITS if split in found}
    if len(files) > 1:
        raise DataError(
            f"{files[0]} and {files[1]} could both be the labels: name the json that is meant."
        )
    return {None: files[0]} if files else {}


def _beside(root: Path) -> Root | None:
    """Look for label files beside the pictures, or for `labels` beside an `images` above them."""
    folders: dict[str | None, Path] = dict(_split_folders(root)) or {None: root}
    kinds = {split: _kind_beside(folder) for split, folder in folders.items()}
    if set(kinds.values()) == {"xml"}:
        return VocRoot(root, dict.fromkeys(folders), folders, folders)
    if set(kinds.values()) == {"txt"}:
        sources = {split: [folder] for split, folder in folders.items()}
        return with_classes_txt(YoloRoot(root, sources))
    return None


def _kind_beside(folder: Path) -> str | None:
    absolute = os.path.abspath(folder)  # noqa: PTH100 (pathlib keeps `..`)
    names = set(os.listdir(folder))  # noqa: PTH208 (names alone)
    pictures = sorted(name for name in names if picture_suffix(name))
    if any(f"{name.rpartition('.')[0]}.xml" in names for name in pictures):
        return "xml"
    if any(Path(label_file(f"{absolute}/{name}")).is_file() for name in pictures):
        return "txt"
    return None
