"""The labels of a picture, found by its file: what packing pictures with their boxes needs.

What: `open_lookup` reads all labels that a person names (the root of a data set, a COCO json, a
data.yaml, or a folder that holds nothing but label files), and `LabelLookup.labels` finds those of
one picture. A picture that lies where the labels expect it is known by its path. Labels whose
picture is not there, as those of a json or a folder that came alone, are found by the picture's
name, and as many of its folders as the labels name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from groundwork.data.label_coco import CocoRoot
from groundwork.data.label_policy import Defects, Labels
from groundwork.data.label_roots import find_root
from groundwork.data.label_table import LabelTable, check_names
from groundwork.data.label_voc import read_xml, voc_names
from groundwork.data.label_yolo import (
    YoloRoot,
    parse_lines,
    read_yaml_alone,
    with_classes_txt,
)
from groundwork.data.shard_index import default_key
from groundwork.errors import DataError

_NAMES = frozenset(("classes.txt", "labelmap.txt", "names.txt"))


class LabelLookup:
    """Labels by picture. `names` are the classes, `defects` what was mended when they were read.

    `unnamed_is_background`: a picture without labels is background (YOLO), and else no part of the
    data set.
    """

    def __init__(
        self,
        table: LabelTable,
        names: Sequence[str],
        defects: Defects,
        notes: Sequence[str] = (),
        *,
        unnamed_is_background: bool = False,
    ) -> None:
        self.names = tuple(names)
        self.defects = defects
        self.notes = tuple(notes)
        self.unnamed_is_background = unnamed_is_background
        self._table = table
        self._by_file: dict[str, int] = {}
        self._by_stem: dict[str, list[int]] = {}
        for number, path in enumerate(table.paths):
            file = table.root / path
            if file.is_file():
                self._by_file.setdefault(os.path.realpath(file), number)
            else:
                self._by_stem.setdefault(_stem(path), []).append(number)

    def example(self) -> str:
        """Return what the labels call one of their pictures."""
        return self._table.paths[0] if len(self._table.paths) else "nothing"

    def labels(self, file: str) -> Labels | None:
        """Return what is written of a picture; None where nothing names it.

        Raises DataError where several could be meant.
        """
        number = self._by_file.get(os.path.realpath(file))
        if number is None:
            found = self._by_stem.get(_stem(file), [])
            whole = f"/{default_key(file)}"
            found = [n for n in found if whole.endswith(f"/{default_key(self._table.paths[n])}")]
            if len(found) > 1:
                first, second = (self._table.files[number] for number in found[:2])
                raise DataError(
                    f"The labels of {file} could be those in {first} for "
                    f"{self._table.paths[found[0]]!r} or those in {second} for "
                    f"{self._table.paths[found[1]]!r}: put the pictures where the labels name them."
                )
            number = found[0] if found else None
        return None if number is None else self._table.labels(number)


def _stem(path: str) -> str:
    return default_key(path.rpartition("/")[2])


def open_lookup(data: str) -> LabelLookup:
    """Read the labels that a person names. Raises DataError as the formats do."""
    path = Path(data)
    if path.is_dir():
        files = _label_files(path)
        above = _root_above(path) if files else None
        if above is not None:
            data = str(above)
        elif files:
            return _from_folder(path, files)
    defects = Defects()
    root = find_root(data)
    if isinstance(root, CocoRoot):
        root.loose = True
    tables = root.read(None, defects)
    check_names(data, root.names)
    return LabelLookup(LabelTable.joined(list(tables.values())), root.names, defects, root.notes)


def _label_files(folder: Path) -> list[Path]:
    """Return the label files of a folder in which there is nothing else but them."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith(".") or path.name in _NAMES:
            continue
        if path.suffix.lower() not in (".txt", ".xml"):
            return []
        found.append(path)
    if len({path.suffix.lower() for path in found}) > 1:
        return []
    return found


def _root_above(folder: Path) -> Path | None:
    """Return the data set whose `labels` or `Annotations` this is, if its pictures are there."""
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100 (pathlib keeps `..`)
    for place in (absolute, *absolute.parents):
        pictures = {"labels": "images", "Annotations": "JPEGImages"}.get(place.name)
        if pictures is not None and (place.parent / pictures).is_dir():
            return place.parent
    return None


def _from_folder(folder: Path, files: Sequence[Path]) -> LabelLookup:
    """Read label files that have no pictures with them."""
    listed: list[tuple[str, str, tuple[int, int] | None]] = []
    rows: list[tuple[int, Sequence[float], int, bool, int]] = []
    # A path in `pictures` ends like a picture's, so that it is known by all but its extension.
    paths = [path.relative_to(folder).with_suffix(".none").as_posix() for path in files]
    if files[0].suffix.lower() == ".xml":
        documents = [read_xml(path) for path in files]
        seen = sorted({name for document in documents for name, _ in document.objects})
        names, names_file = voc_names(folder, seen)
        for number, (path, document) in enumerate(zip(files, documents, strict=True)):
            listed.append((paths[number], str(path), document.size))
            for place, (name, box) in enumerate(document.objects, start=1):
                if name not in names:
                    raise DataError(
                        f"{path}: object {place} has the class {name!r}, which {names_file} does "
                        "not name: correct it, or add the name there."
                    )
                rows.append((number, box, names.index(name), False, place))
        table = LabelTable.of(folder, "object", listed, rows)
        return LabelLookup(table, names, Defects())
    root = _named(folder)
    for number, path in enumerate(files):
        listed.append((paths[number], str(path), None))
        for yolo_box, class_number, line in parse_lines(path.read_bytes(), str(path), root):
            rows.append((number, yolo_box, class_number, False, line))
    names = root.names or tuple(
        f"class_{number}" for number in range(1 + max((row[2] for row in rows), default=0))
    )
    table = LabelTable.of(folder, "line", listed, rows, unit=True)
    return LabelLookup(table, names, Defects(), unnamed_is_background=True)


def _named(folder: Path) -> YoloRoot:
    """Find the names of classes in the folder of labels, or in one of the two above it."""
    for place in (folder, *list(folder.absolute().parents)[:2]):
        root = with_classes_txt(YoloRoot(place, {}))
        if root.names:
            return root
        for name in ("data.yaml", "data.yml"):
            if (place / name).is_file():
                return read_yaml_alone(place / name)
    return YoloRoot(folder, {})
