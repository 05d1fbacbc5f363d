"""What is written of a picture's boxes, and the policy by which it becomes what can be trusted.

What: `Labels` is what a file says of one picture, `settle` brings it to `Annotations` in upright
pixels, and `Defects` counts what was mended, each defect once. Every format goes through here, so
that a defect means the same wherever it was found.

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
boxes are taken as pixels of the upright picture, unscaled. Nothing tells the two apart where EXIF
mirrors a picture or turns it upside down, where it is square, or where the labels say no size: the
boxes are then taken as upright, and that is reported.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture
from groundwork.data.shard_index import sha256_text

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
TWIN = "picture of another one's name but for its ending, left out"
UNSURE = "picture is turned or mirrored by EXIF and its labels do not show it, taken as upright"
NO_BOX = "annotation without a box, passed over"

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Defect:
    """One thing that was wrong and that the policy mended: why, in which file, where in it."""

    reason: str
    file: str
    where: str

    def shown(self) -> str:
        """Say where it is."""
        return f"{self.file}, {self.where}" if self.where else self.file


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
    annotation). `size` is the width and height that the file says the picture has, and `picture`
    what it is called, where one file speaks of many. `upright`: by its form the file speaks of the
    upright picture.
    """

    file: str
    boxes: Floats
    classes: Integers
    crowd: npt.NDArray[np.bool_]
    places: Integers
    place: str
    unit: bool = False
    size: tuple[int, int] | None = None
    picture: str = ""
    upright: bool = False

    def where(self, row: int) -> str:
        """Say where in the file a row stands."""
        return f"{self.place} {self.places[row]}"

    def digest(self) -> str:
        """Hash what is said of the picture, and not where it stands."""
        return sha256_text(
            [self.unit, self.size, *map(digest, (self.boxes, self.classes, self.crowd))]
        )


def digest(array: npt.NDArray[Any]) -> str:
    """Hash the contents of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- the policy --------------------------------------------------------------------------------

BROKEN = ("", NOT_FINITE, INVERTED, NO_AREA, COPY)


def find_broken(boxes: Floats, classes: Integers, owners: Integers) -> Integers:
    """Return for each row the place in BROKEN of what is wrong with it, 0 where nothing is."""
    with np.errstate(invalid="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
    conditions = [
        ~np.isfinite(boxes).all(axis=1),
        (sides < 0).any(axis=1),
        (sides == 0).any(axis=1),
    ]
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

    reasons = find_broken(labels.boxes, labels.classes, np.zeros(len(labels.boxes), np.int64))
    for number in range(1, len(BROKEN)):
        report(np.flatnonzero(reasons == number), BROKEN[number])
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
    exchanged = picture.orientation >= 5
    shown = labels.upright or (exchanged and width != height and labels.size is not None)
    if picture.orientation != 1 and len(labels.boxes) and not shown:
        where = f"{labels.picture} has orientation {picture.orientation}"
        defects.add(UNSURE, labels.file, where)
    if labels.unit:
        return labels.boxes * np.array([width, height, width, height], np.float64)
    if labels.size is None or labels.size == (width, height):
        return labels.boxes
    turned = labels.size == (height, width) and exchanged
    if not turned:
        said, real = "{} x {}".format(*labels.size), f"{width} x {height}"
        defects.add(OTHER_SIZE, labels.file, f"{labels.picture} has {real}, not {said}")
        return labels.boxes
    # The inverse of Picture._to_stored, for the orientations that exchange the sides.
    left, top, right, bottom = labels.boxes.T
    return np.stack(
        {
            5: (top, left, bottom, right),
            6: (width - bottom, left, width - top, right),
            7: (width - bottom, height - right, width - top, height - left),
            8: (top, height - right, bottom, height - left),
        }[picture.orientation],
        axis=1,
    )
