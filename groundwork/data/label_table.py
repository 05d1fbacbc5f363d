"""What label files say, as written, and the policy by which it becomes boxes that can be trusted.

What: `Labels` is what is written of one picture, `LabelTable` that of a whole split in a few
arrays, and `settle` brings it to `Annotations` in upright pixels. Every format goes through here,
so that a defect means the same wherever it was found. `Defects` counts each of them once.

The policy, box by box:

- Not finite (NaN, infinite), inverted (right of its right edge), without area (a side of less than
  SMALLEST_SIDE pixels), or wholly outside the picture: dropped and reported.
- Partly outside, negative coordinates and shares above 1 included: clipped and reported. What
  sticks out by no more than ROUNDING pixels is the rounding of the file: clipped, not reported.
- An exact copy of an earlier box of the same picture and class: dropped and reported.
- A crowd (COCO iscrowd): kept, and marked.
- A class that does not exist is an error, always. It is raised where the file is read.

Where the file says how large the picture is: if that is the upright size, or the picture is square,
the boxes are upright. If it is the size as stored, before the EXIF orientation exchanged the
sides, the boxes are turned with the picture, once. If it is neither, that is reported, and the
boxes are taken as pixels of the upright picture, unscaled.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture
from groundwork.data.shard_index import default_key, sha256_text
from groundwork.errors import DataError

SMALLEST_SIDE = 1e-3  # pixels
ROUNDING = 0.01  # pixels: six decimals of a 10,000 pixel side

NOT_FINITE = "box not finite, dropped"
INVERTED = "box inverted, dropped"
NO_AREA = "box without area, dropped"
OUTSIDE = "box wholly outside its picture, dropped"
CLIPPED = "box partly outside its picture, clipped"
COPY = "box written twice in one picture, one dropped"
OTHER_SIZE = "size in the labels is not the picture's, boxes taken as pixels"
MISSING_PICTURE = "picture missing on disk, left out"
LISTED_TWICE = "picture listed twice, kept once"
NO_PICTURE = "label without a picture, passed over"
NO_LABEL_FILE = "picture without a label file, kept as background"
NO_BOX = "annotation without a box, passed over"

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Defect:
    """One thing that was wrong and that the policy mended: why, in which file, where in it."""

    reason: str
    file: str
    where: str


@dataclass(slots=True)
class Defects:
    """The defects found so far, each counted once however often its picture is read.

    Those that need a picture's size are found when the picture is read, by whichever process does:
    a copy in another process counts for itself.
    """

    found: dict[Defect, None] = field(default_factory=dict)

    def add(self, reason: str, file: str, where: str = "") -> None:
        """Note a defect; one that is known already changes nothing."""
        self.found[Defect(reason, file, where)] = None

    def counts(self) -> Counter[str]:
        """Count them by reason."""
        return Counter(defect.reason for defect in list(self.found))

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Defect]:
        return iter(sorted(self.found))


@dataclass(frozen=True, slots=True)
class Labels:
    """What is written of one picture, before any of it is believed; rows belong together.

    `boxes` is N 4: left, top, right, bottom in pixels, or, with `unit`, in shares of the picture's
    sides. `places` is N: where in `file` each row stands, counted in `place`s (line, object,
    annotation). `size` is the width and height that the file says the picture has.
    """

    file: str
    boxes: Floats
    classes: Integers
    crowd: npt.NDArray[np.bool_]
    places: Integers
    place: str
    unit: bool = False
    size: tuple[int, int] | None = None

    def where(self, row: int) -> str:
        """Say where in the file a row stands."""
        return f"{self.place} {self.places[row]}"

    def digest(self) -> str:
        """Hash what is said of the picture, and not where it stands."""
        return sha256_text([self.unit, self.size, *map(_digest, _contents(self))])


class LabelTable:
    """The labels of many pictures in a few arrays: picture i has the rows starts[i]:starts[i+1].

    `paths` are the pictures' files, relative to `root` or absolute; `files` their label files: one
    for each picture, or a single one for all. A `size` of 0, 0 is one that is not said.
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

    def without_broken(self, defects: Defects) -> LabelTable:
        """Leave out, and report, the boxes that are wrong whatever their picture's size."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))
        reasons = _broken(self.boxes, self.classes, owners)
        bad = np.flatnonzero(reasons)
        for row in bad.tolist():
            where = f"{self.place} {self.places[row]}"
            defects.add(_REASONS[reasons[row]], self.files[owners[row]], where)
        kept = np.flatnonzero(reasons == 0)
        counts = np.bincount(owners[kept], minlength=len(self))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return self._with(kept, starts, np.arange(len(self)))

    def digest(self) -> str:
        """Hash what is said of the pictures."""
        return sha256_text([self.unit, *map(_digest, (self.sizes, self.starts, *_contents(self)))])

    def _with(self, rows: Integers, starts: Integers, pictures: Integers) -> LabelTable:
        table = LabelTable(self.root, self.place, unit=self.unit)
        table.paths = [self.paths[picture] for picture in pictures.tolist()]
        table.files = [self.files[picture] for picture in pictures.tolist()]
        table.sizes = self.sizes[pictures]
        table.starts = starts
        table.boxes, table.classes = self.boxes[rows], self.classes[rows]
        table.crowd, table.places = self.crowd[rows], self.places[rows]
        return table


def _contents(labels: Labels | LabelTable) -> tuple[npt.NDArray[Any], ...]:
    return labels.boxes, labels.classes, labels.crowd


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- the policy --------------------------------------------------------------------------------

_REASONS = ("", NOT_FINITE, INVERTED, NO_AREA, COPY)


def _broken(boxes: Floats, classes: Integers, owners: Integers) -> Integers:
    """Return for each row the place in _REASONS of what is wrong with it, 0 where nothing is."""
    with np.errstate(invalid="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
    conditions = [~np.isfinite(boxes).all(axis=1), (sides < 0).any(axis=1), (sides == 0).any(axis=1)]
    reasons = np.select(conditions, [1, 2, 3], 0).astype(np.int64)
    good = np.flatnonzero(reasons == 0)
    # + 0.0 makes -0.0 and 0.0 one; numbers of pictures and classes are exact in float64.
    rows = np.column_stack([owners[good], classes[good], boxes[good] + 0.0])
    copies = np.ones(len(good), np.bool_)
    copies[np.unique(rows, axis=0, return_index=True)[1]] = False
    reasons[good[copies]] = 4
    return reasons


def settle(labels: Labels, picture: Picture, defects: Defects) -> Annotations:
    """Bring the labels of a picture to upright pixels by the policy of the module's docstring.

    The same labels and picture always give the same; `defects` hears what was mended.
    """

    def report(rows: Integers, reason: str) -> None:
        for row in rows.tolist():
            defects.add(reason, labels.file, labels.where(row))

    reasons = _broken(labels.boxes, labels.classes, np.zeros(len(labels.boxes), np.int64))
    for number in range(1, len(_REASONS)):
        report(np.flatnonzero(reasons == number), _REASONS[number])
    rows = np.flatnonzero(reasons == 0)
    boxes = _upright(labels, picture, defects)[rows]
    limits = np.array([picture.width, picture.height] * 2, np.float64)
    clipped = boxes.clip(0.0, limits)
    flat = (boxes[:, 2:] - boxes[:, :2] < SMALLEST_SIDE).any(axis=1)
    gone = ~flat & (clipped[:, 2:] - clipped[:, :2] < SMALLEST_SIDE).any(axis=1)
    cut = ~flat & ~gone & (np.abs(boxes - clipped) > ROUNDING).any(axis=1)
    for condition, reason in ((flat, NO_AREA), (gone, OUTSIDE), (cut, CLIPPED)):
        report(rows[condition], reason)
    kept = ~flat & ~gone
    rows = rows[kept]
    return Annotations.of(clipped[kept], labels.classes[rows], labels.crowd[rows])


def _upright(labels: Labels, picture: Picture, defects: Defects) -> Floats:
    """Return the boxes in pixels of the upright picture."""
    width, height = picture.width, picture.height
    if labels.unit:
        return labels.boxes * np.array([width, height, width, height], np.float64)
    if labels.size is None or labels.size == (width, height):
        return labels.boxes
    turned = labels.size == (height, width) and picture._orientation >= 5
    if not turned:
        said, real = "{} x {}".format(*labels.size), f"{width} x {height}"
        defects.add(OTHER_SIZE, labels.file, f"a picture of {real} is said to have {said}")
        return labels.boxes
    # The inverse of Picture._to_stored, for the orientations that exchange the sides.
    left, top, right, bottom = labels.boxes.T
    return np.stack(
        {
            5: (top, left, bottom, right),
            6: (width - bottom, left, width - top, right),
            7: (width - bottom, height - right, width - top, height - left),
            8: (top, height - right, bottom, height - left),
        }[picture._orientation],
        axis=1,
    )


# ---- names -------------------------------------------------------------------------------------


def choose(names_in: Path, paths: Sequence[str]) -> list[int]:
    """Return which of the pictures a file names, in the order of the pictures.

    One name a line: a picture's path, or the end of it from a folder on (so its file name alone),
    with or without its extension. Raises DataError for a name that no picture has or that several
    have, and for a file that cannot be read or names nothing.
    """
    try:
        lines = names_in.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"The list {names_in} cannot be read: {error.strerror}.") from error
    wanted = [line.strip().removeprefix("./") for line in lines]
    if not any(wanted):
        raise DataError(f"The list {names_in} names no picture: write one name on each line.")
    by_name: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        base = path.rpartition("/")[2]
        for name in {base, default_key(base)}:
            by_name.setdefault(name, []).append(number)
    chosen: set[int] = set()
    for number, name in enumerate(wanted, start=1):
        if not name:
            continue
        found = [
            place
            for place in by_name.get(name.rpartition("/")[2], [])
            if _ends_with(paths[place], name)
        ]
        if len(found) != 1:
            shown = f"several pictures, such as {paths[found[0]]!r}," if found else "no picture"
            raise DataError(
                f"{names_in}, line {number}: {shown} of the data set have the name {name!r}: "
                "write a name as its file has it, with as many folders as tell it apart."
            )
        chosen.add(found[0])
    return sorted(chosen)


def _ends_with(path: str, name: str) -> bool:
    return any(f"/{given}".endswith(f"/{name}") for given in (path, default_key(path)))
