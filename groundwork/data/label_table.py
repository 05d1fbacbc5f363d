"""The labels of many pictures in a few arrays, before any of it is believed.

What: `LabelTable` holds what the files of a split say, format by format the same; `choose` finds
the pictures that a list names. Why arrays: a million boxes as objects would take minutes to hash
and to send to a worker.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from groundwork.data.label_policy import (
    BROKEN,
    Defects,
    Floats,
    Integers,
    Labels,
    digest,
    find_broken,
)
from groundwork.data.lists import read_lines
from groundwork.data.shard_index import default_key, sha256_text
from groundwork.errors import DataError


class LabelTable:
    """The labels of many pictures in a few arrays: picture i has the rows starts[i]:starts[i+1].

    `paths` are the pictures' files, relative to `root` or absolute; `files` are their label files.
    A size of 0, 0 is one that is not said.
    """

    def __init__(self, root: Path, place: str, *, unit: bool = False) -> None:
        self.root = root
        self.place = place
        self.unit = unit
        self.paths: list[str] = []
        self.files: list[str] = []
        self.sizes: Integers = np.zeros((0, 2), np.int64)
        self.starts: Integers = np.zeros(1, np.int64)
        self.boxes: Floats = np.zeros((0, 4))
        self.classes: Integers = np.zeros(0, np.int64)
        self.crowd: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.places: Integers = np.zeros(0, np.int64)

    @classmethod
    def of(
        cls,
        root: Path,
        place: str,
        pictures: Sequence[tuple[str, str, tuple[int, int] | None]],
        rows: Sequence[tuple[int, Sequence[float], int, bool, int]],
        *,
        unit: bool = False,
    ) -> LabelTable:
        """Build from (path, label file, size) and (picture, box, class, crowd, place) each."""
        table = cls(root, place, unit=unit)
        table.paths = [path for path, _, _ in pictures]
        table.files = [file for _, file, _ in pictures]
        sizes = [size or (0, 0) for _, _, size in pictures]
        table.sizes = np.array(sizes, np.int64).reshape(-1, 2)
        pictured = np.array([row[0] for row in rows], np.int64)
        order = np.argsort(pictured, kind="stable")
        counts = np.bincount(pictured, minlength=len(pictures))
        table.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        table.boxes = np.array([row[1] for row in rows], np.float64).reshape(-1, 4)[order]
        table.classes = np.array([row[2] for row in rows], np.int64)[order]
        table.crowd = np.array([row[3] for row in rows], np.bool_)[order]
        table.places = np.array([row[4] for row in rows], np.int64)[order]
        return table

    def __len__(self) -> int:
        return len(self.starts) - 1

    def labels(self, picture: int) -> Labels:
        """Return what is written of one picture."""
        rows = slice(int(self.starts[picture]), int(self.starts[picture + 1]))
        width, height = self.sizes[picture].tolist()
        return Labels(
            self.files[picture],
            self.boxes[rows],
            self.classes[rows],
            self.crowd[rows],
            self.places[rows],
            self.place,
            self.unit,
            (width, height) if width and height else None,
            self.paths[picture],
        )

    def select(self, pictures: Sequence[int]) -> LabelTable:
        """Return a table of some of the pictures, in the order given."""
        chosen = np.asarray(pictures, np.int64)
        counts = np.diff(self.starts)[chosen]
        # Every row's number: where its picture starts, and how many came before it of that one.
        rows = np.repeat(self.starts[chosen], counts)
        before = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows += np.arange(len(rows)) - np.repeat(before[:-1], counts)
        return self._with(rows, before, chosen)

    @classmethod
    def joined(cls, tables: Sequence[LabelTable]) -> LabelTable:
        """Return one table of several that have their root and their kind in common."""
        first = tables[0]
        table = cls(first.root, first.place, unit=first.unit)
        table.paths = [path for each in tables for path in each.paths]
        table.files = [file for each in tables for file in each.files]
        table.sizes = np.concatenate([each.sizes for each in tables])
        counts = np.concatenate([np.diff(each.starts) for each in tables])
        table.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        table.boxes = np.concatenate([each.boxes for each in tables])
        table.classes = np.concatenate([each.classes for each in tables])
        table.crowd = np.concatenate([each.crowd for each in tables])
        table.places = np.concatenate([each.places for each in tables])
        return table

    def without_broken(self, defects: Defects) -> LabelTable:
        """Leave out, and report, the boxes that are wrong whatever their picture's size."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))
        reasons = find_broken(self.boxes, self.classes, owners)
        bad = np.flatnonzero(reasons)
        for row in bad.tolist():
            where = f"{self.place} {self.places[row]}"
            defects.add(BROKEN[reasons[row]], self.files[owners[row]], where)
        kept = np.flatnonzero(reasons == 0)
        counts = np.bincount(owners[kept], minlength=len(self))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return self._with(kept, starts, np.arange(len(self)))

    def digest(self) -> str:
        """Hash what is said of the pictures."""
        return sha256_text(
            [
                self.unit,
                *map(digest, (self.sizes, self.starts, self.boxes, self.classes, self.crowd)),
            ]
        )

    def _with(self, rows: Integers, starts: Integers, pictures: Integers) -> LabelTable:
        table = LabelTable(self.root, self.place, unit=self.unit)
        table.paths = [self.paths[picture] for picture in pictures.tolist()]
        table.files = [self.files[picture] for picture in pictures.tolist()]
        table.sizes = self.sizes[pictures]
        table.starts = starts
        table.boxes, table.classes = self.boxes[rows], self.classes[rows]
        table.crowd, table.places = self.crowd[rows], self.places[rows]
        return table


def relative(path: str, root: Path) -> str:
    """Return a path relative to the root if it lies below it, else absolute."""
    absolute, above = os.path.abspath(path), os.path.abspath(root)  # noqa: PTH100 (keeps links)
    return absolute.removeprefix(above.rstrip("/") + "/")


# ---- names -------------------------------------------------------------------------------------

MOST_CLASSES = 10_000  # without names, a larger number is a mistake and no class
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> str | None:
    """Return the split that a name speaks of: train for `instances_train2017`."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def check_names(data: str, names: Sequence[str]) -> None:
    """Raise DataError for classes that could not be told apart, drawn or written in a table."""
    if not names:
        raise DataError(f"The labels of {data} have no class: name at least one.")
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if first.setdefault(name, number) != number:
            raise DataError(
                f"The labels of {data} have two classes of the name {name!r}, {first[name]} and "
                f"{number}: give them names of their own, or make them one."
            )
        if not name.strip() or not name.isprintable():
            raise DataError(
                f"The labels of {data} call class {number} {name!r}: give it a name that can be "
                "printed on one line."
            )


@dataclass(frozen=True)
class HeldOut:
    """A share of pictures, by a hash of their paths: these (`kept`), or all others.

    Where pictures are added, most of those that were held out stay so.
    """

    share: float  # above 0, below 1
    kept: bool

    def of(self, paths: Sequence[str]) -> list[int]:
        """Return which pictures are meant, in order; of two or more there is one of either kind.

        Raises DataError for fewer than two pictures.
        """
        if len(paths) < 2:
            raise DataError(
                f"{len(paths)} picture(s) cannot be split into training and validation: give more "
                "labeled pictures, or hold none out."
            )
        # The bytes: a name may hold what no text does.
        keys = [hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest() for path in paths]
        order = sorted(range(len(paths)), key=lambda number: (keys[number], paths[number]))
        count = min(max(1, round(self.share * len(paths))), len(paths) - 1)
        return sorted(order[:count] if self.kept else order[count:])


def choose(names_in: Path | None, held_out: HeldOut | None, paths: Sequence[str]) -> list[int]:
    """Return which of the pictures are meant: those a file names, and of them a held-out part."""
    named = list(range(len(paths))) if names_in is None else _named(names_in, paths)
    if held_out is None:
        return named
    return [named[place] for place in held_out.of([paths[number] for number in named])]


def _named(names_in: Path, paths: Sequence[str]) -> list[int]:
    """Return which of the pictures a file names, in the order of the pictures.

    One name a line: a picture's path, or the end of it from a folder on (so its file name alone),
    with or without its extension. Raises DataError for a name that no picture has or that several
    have, and for a file that cannot be read or names nothing.
    """
    wanted = [line.strip().removeprefix("./") for line in read_lines(names_in)]
    if not wanted:
        raise DataError(f"The list {names_in} names no picture: write one name on each line.")
    by_name: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        base = path.rpartition("/")[2]
        for name in {base, default_key(base)}:
            by_name.setdefault(name, []).append(number)
    chosen: set[int] = set()
    for name in wanted:
        found = [
            place
            for place in by_name.get(name.rpartition("/")[2], [])
            if _ends_with(paths[place], name)
        ]
        if len(found) != 1:
            shown = f"several pictures, such as {paths[found[0]]!r}," if found else "no picture"
            raise DataError(
                f"{names_in}: {shown} of the data set have the name {name!r}: "
                "write a name as its file has it, with as many folders as tell it apart."
            )
        chosen.add(found[0])
    return sorted(chosen)


def _ends_with(path: str, name: str) -> bool:
    return any(f"/{given}".endswith(f"/{name}") for given in (path, default_key(path)))
