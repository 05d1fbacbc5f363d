"""Boxes into the shards: what `--labels` adds to packing.

What: `with_labels` gives every picture what the labels say of it; `labeled_member` makes the
`.json` member that is packed beside it (groundwork.data.label_shards), cleaned by the policy of
groundwork.data.label_policy; `tile_member` that of one tile of it; `summary` tells what was mended.

A box that a tile cuts ends at the tile's edge. Where less than `min_visible` of it is left it is
marked as a crowd: training does not use it, and evaluation counts no detection there as wrong.
Tiles that overlap by the size of an object show each object whole in one of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture
from groundwork.data.label_lookup import LabelLookup
from groundwork.data.label_policy import SMALLEST_SIDE, Defects, Labels, settle
from groundwork.data.label_shards import to_json
from groundwork.data.tiles import Tile
from groundwork.errors import DataError
from pretrain.pack_plan import Source

DEFECTS_NAME = "label-defects.jsonl"
UNNAMED = "the labels do not name it"


def with_labels(pictures: Sequence[Source], lookup: LabelLookup) -> list[Source]:
    """Give each picture its labels; none to those that the labels do not name.

    Raises DataError where they name none of the pictures.
    """
    found = [lookup.labels(picture.file) for picture in pictures]
    if not any(labels is not None for labels in found):
        raise DataError(
            f"The labels name none of the {len(pictures)} pictures, the first being "
            f"{pictures[0].file}: name the labels of these pictures. They name {lookup.example()}, "
            "for one; folders that labels name count."
        )
    if lookup.unnamed_is_background:
        found = [_nothing() if labels is None else labels for labels in found]
    return [
        dataclasses.replace(picture, labels=labels)
        for picture, labels in zip(pictures, found, strict=True)
    ]


def _nothing() -> Labels:
    none = np.zeros(0, np.int64)
    return Labels("", np.zeros((0, 4)), none, np.zeros(0, np.bool_), none, "line")


def labeled_member(
    labels: Labels | None,
    picture: Picture,
    size: tuple[int, int],
    names: Sequence[str],
    defects: Defects,
) -> bytes:
    """Make the member for a picture that is packed with `size` (height, width).

    Raises DataError for a picture that the labels do not name.
    """
    found = settled(labels, picture, defects)
    height, width = size
    scale = np.array([width / picture.width, height / picture.height] * 2, np.float64)
    scaled = (found.boxes * scale).clip(0, np.array([width, height] * 2, np.float64))
    return to_json(Annotations.of(scaled, found.classes, found.crowd), names)


def settled(labels: Labels | None, picture: Picture, defects: Defects) -> Annotations:
    """Return what is labeled in a picture. Raises DataError where the labels do not name it."""
    if labels is None:
        raise DataError(UNNAMED)
    return settle(labels, picture, defects)


def tile_member(found: Annotations, tile: Tile, names: Sequence[str], min_visible: float) -> bytes:
    """Make the member for one tile of a picture, in the tile's own pixels."""
    corners = found.boxes.astype(np.float64)
    inside = corners.clip(tile[:2] * 2, tile[2:] * 2)
    area, seen = ((box[:, 2:] - box[:, :2]).clip(0).prod(1) for box in (corners, inside))
    there = (inside[:, 2:] - inside[:, :2] >= SMALLEST_SIDE).all(1)
    crowd = found.crowd | (seen < min_visible * area)
    moved = inside - np.array(tile[:2] * 2)
    return to_json(Annotations.of(moved[there], found.classes[there], crowd[there]), names)


def summary(mended: Sequence[Sequence[str]], lookup: LabelLookup, where: str) -> Iterator[str]:
    """Tell of the labels: the classes, and what was mended by reason."""
    shown = ", ".join(lookup.names[:20]) + (", ..." if len(lookup.names) > 20 else "")
    yield f"  boxes of {len(lookup.names):,} classes: {shown}"
    yield from (f"    {note}" for note in lookup.notes)
    counts = Counter(reason for _, reason, _ in mended) + lookup.defects.counts()
    if counts:
        yield f"  defects of the labels, mended ({where}):"
        yield from (f"    {count:,} x {reason}" for reason, count in counts.most_common())
