"""Pascal VOC xml: one file for each picture, corners in pixels.

What: `VocRoot` reads the xml of each picture of a split (ImageSets/Main/train.txt and so on, or the
folders of the pictures).

Corners are taken as they are written. VOC's own files count pixels from 1 and include the last
(VOC2012 development kit, 3.3), which makes their boxes one pixel too far right and down, and one
too small; nearly all tools that write the format since then count from 0, and torchvision and most
training code take the numbers as they are. So does this, so that numbers can be compared.
`difficult` objects are kept as ordinary ones: a detector should find them.

Names are those of labelmap.txt or classes.txt, in their order, else those that occur in any split,
sorted. An xml that declares a document type is refused, since entities can read other files and
fill the memory.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from groundwork.data.label_policy import NO_LABEL_FILE, NO_PICTURE, TWIN, Defects
from groundwork.data.label_table import LabelTable, relative
from groundwork.data.label_yolo import read_names
from groundwork.data.lists import read_lines
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import DataError

_MARKED = re.compile(r"(\S.*?)\s+-?[01]")
_EDGES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class Objects:
    """What one xml says: the size of its picture, and the objects' names and boxes, in order."""

    size: tuple[int, int] | None
    objects: list[tuple[str, tuple[float, float, float, float]]]


@dataclass(slots=True)
class VocRoot:
    """A VOC data set: for each split (None: not split) its pictures' names, None for all.

    `pictures` and `annotations` are the folders of each split.
    """

    root: Path
    lists: Mapping[str | None, Path | None]
    pictures: Mapping[str | None, Path]
    annotations: Mapping[str | None, Path]
    names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    form = "Pascal VOC xml"

    def splits(self) -> tuple[str, ...]:
        """Return the splits that there are; none where the data is not split."""
        return tuple(split for split in self.lists if split is not None)

    def read(self, split: str | None, defects: Defects) -> dict[str | None, LabelTable]:
        """Read one split, or all. Raises DataError for a file that is not what it should be."""
        parsed: dict[str, Objects] = {}
        found = {}
        for key in self.lists:
            wanted = split is None or key in (None, split)
            found[key] = self._pairs(key, defects if wanted else Defects())
        train, val = self.lists.get("train"), self.lists.get("val")
        if train is not None and val is not None and train.name == "trainval.txt":
            held_out = set(found["val"])
            found["train"] = [pair for pair in found["train"] if pair not in held_out]
            self.notes = ["train is trainval.txt without what val.txt names"]
        for key in self.lists:
            for _, file in found[key]:
                if file not in parsed and Path(file).is_file():
                    parsed[file] = read_xml(Path(file))
        seen = sorted({name for objects in parsed.values() for name, _ in objects.objects})
        self.names, names_file = voc_names(self.root, seen)
        if not self.names:
            raise DataError(f"No xml of {self.root} has an object, so there are no classes.")
        if split is None and None not in self.lists:
            self._report_strays(parsed, defects)
        return {
            key: self._table(pairs, parsed, names_file, defects)
            for key, pairs in found.items()
            if split is None or key in (None, split)
        }

    def _pairs(self, key: str | None, defects: Defects) -> list[tuple[str, str]]:
        """Return picture and xml of each name of a split; both may be missing."""
        pictures, annotations, listed = (
            self.pictures[key],
            self.annotations[key],
            self.lists[key],
        )
        by_stem: dict[str, str] = {}
        for name in sorted(_names_in(pictures)):
            stem = name.rpartition(".")[0]
            if picture_suffix(name) and by_stem.setdefault(stem, name) != name:
                where = f"{by_stem[stem]} has the same label file"
                defects.add(TWIN, str(pictures / name), where)
        if listed is None:
            stems = list(by_stem)
            if {f"{stem}.xml" for stem in stems}.isdisjoint(_names_in(annotations)):
                raise DataError(f"No picture of {pictures} has an xml in {annotations}.")
        else:
            stems = _read_list(listed, by_stem)
        return [
            (str(pictures / by_stem.get(stem, f"{stem}.jpg")), str(annotations / f"{stem}.xml"))
            for stem in stems
        ]

    def _table(
        self,
        pairs: Sequence[tuple[str, str]],
        parsed: Mapping[str, Objects],
        names_file: str,
        defects: Defects,
    ) -> LabelTable:
        numbers = {name: number for number, name in enumerate(self.names)}
        pictures: list[tuple[str, str, tuple[int, int] | None]] = []
        rows = []
        for picture, file in pairs:
            objects = parsed.get(file)
            size = objects.size if objects else None
            if objects is None:
                defects.add(NO_LABEL_FILE, picture)
            for place, (name, box) in enumerate(objects.objects if objects else (), start=1):
                if name not in numbers:
                    raise DataError(
                        f"{file}: object {place} has the class {name!r}, which {names_file} does "
                        "not name: correct it, or add the name there."
                    )
                rows.append((len(pictures), box, numbers[name], False, place))
            pictures.append((relative(picture, self.root), file, size))
        return LabelTable.of(self.root, "object", pictures, rows)

    def _report_strays(self, parsed: Mapping[str, Objects], defects: Defects) -> None:
        """Report xml files that no split names."""
        for folder in sorted(set(self.annotations.values())):
            for name in sorted(_names_in(folder)):
                if name.endswith(".xml") and str(folder / name) not in parsed:
                    defects.add(NO_PICTURE, str(folder / name))


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names alone)
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def _read_list(path: Path, pictures: Mapping[str, str]) -> list[str]:
    """Read the names of a split, less a picture's extension. `pictures` are those there, by stem.

    VOC's lists of one class have 1, 0 or -1 behind every name. Names may have blanks otherwise, and
    may end in a number.
    """
    lines = [line.strip() for line in read_lines(path)]
    marked = [_MARKED.fullmatch(line) for line in lines]
    names = [match[1] for match in marked if match]
    if len(names) < len(lines) or all(_stem(line) in pictures for line in lines):
        names = lines
    names = [_stem(name) for name in names]
    if not names:
        raise DataError(f"The list {path} names no picture.")
    return list(dict.fromkeys(names))


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if picture_suffix(name) else name


def voc_names(folder: Path, seen: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Return the classes, and the file that lists them ("" where it is those that were seen).

    Of a labelmap's lines, `name:colour:parts:actions`, the name alone is read.
    """
    files = (folder / "labelmap.txt", folder / "classes.txt")
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return tuple(seen), ""
    names = read_names(path)
    if path.name == "labelmap.txt":
        names = tuple(name.partition(":")[0] for name in names if not name.startswith("#"))
        names = tuple(name for name in names if name != "background" or name in seen)
    return names, str(path)


# ---- one file ----------------------------------------------------------------------------------


class _NoDocumentType(ElementTree.TreeBuilder):
    """Builds the tree, and refuses a document type at its beginning, before any entity."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        """Refuse. Called by the parser."""
        raise DataError(f"it declares a document type ({name}), which may hide other files")


def read_xml(path: Path) -> Objects:
    """Read one xml. Raises DataError naming the file, and the line or the object."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"The labels {path} cannot be read: {error.strerror}.") from error
    try:
        tree = ElementTree.fromstring(
            content, parser=ElementTree.XMLParser(target=_NoDocumentType())
        )
    except DataError as error:
        raise DataError(f"{path} is not read: {error}. Remove the declaration.") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        line = getattr(error, "position", (1, 0))[0]
        raise DataError(
            f"{path}, line {line}: this is no XML ({error}): export the file again."
        ) from error
    if tree.tag != "annotation":
        raise DataError(f"{path}, line 1: begins with <{tree.tag}>, not with <annotation>.")
    objects = []
    for number, element in enumerate(tree.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        texts = [element.findtext(f"bndbox/{edge}") or "" for edge in _EDGES]
        try:
            left, top, right, bottom = map(float, texts)
        except ValueError:
            name = ""
        if not name:
            raise DataError(
                f"{path}: object {number} lacks its name, or one of {', '.join(_EDGES)} in its "
                f"bndbox is no number ({texts})."
            )
        objects.append((name, (left, top, right, bottom)))
    return Objects(_size(tree), objects)


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(tree.findtext(f"size/{x}") or 0)) for x in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if 0 < width < 1 << 31 and 0 < height < 1 << 31 else None
