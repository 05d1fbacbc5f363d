"""Labeled shards: beside each picture a `.json` member with its boxes.

What: the member is {"boxes": [[left, top, right, bottom], ...] in upright pixels, "classes": [...]
numbers from 0, "names": [...] the name of each box's class, "crowd": [...] where any is}, all of
one length, and empty for background. `python -m pretrain.pack --labels` and the drawn scenes write
it; so may anybody's webdataset. `to_json` and `parse_json` are the two directions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from groundwork.data.annotations import Annotations
from groundwork.data.label_policy import Labels
from groundwork.data.remote_samples import RemoteSamples
from groundwork.data.shard_index import sha256_text
from groundwork.data.shards import Sample, ShardSamples
from groundwork.errors import DataError

_FORM = '{"boxes": [[left, top, right, bottom], ...], "classes": [0, ...], "names": ["car", ...]}'


def to_json(annotations: Annotations, names: Sequence[str]) -> bytes:
    """Write the member. Coordinates are rounded to a thousandth of a pixel."""
    document: dict[str, Any] = {
        "boxes": [[round(edge, 3) for edge in box] for box in annotations.boxes.tolist()],
        "classes": annotations.classes.tolist(),
        "names": [names[number] for number in annotations.classes.tolist()],
    }
    if annotations.crowd.any():
        document["crowd"] = annotations.crowd.tolist()
    return json.dumps(document).encode("ascii")


def parse_json(content: bytes, file: str, classes: int) -> Labels:
    """Read the member. Raises DataError for another form, and for a class that there is not."""
    document = read_document(content, file)
    boxes, numbers = document["boxes"], document["classes"]
    crowd = document.get("crowd") or [False] * len(boxes)
    for place, number in enumerate(numbers, start=1):
        if not 0 <= number < classes:
            raise DataError(
                f"{file}: box {place} has the class {number}, and there are {classes} classes, "
                "which count from 0: write the shard again."
            )
    return Labels(
        file,
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(numbers, np.int64),
        np.array(crowd, np.bool_),
        np.arange(1, len(boxes) + 1),
        "box",
        upright=True,
    )


def read_document(content: bytes, file: str) -> dict[str, Any]:
    """Read the member, and check its form. Raises DataError."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{file}, line {line}: this is no JSON ({error}).") from error
    if not isinstance(document, dict) or not {"boxes", "classes"} <= document.keys():
        raise DataError(f"{file} has no boxes and classes: labeled shards need {_FORM}.")
    columns = [document["boxes"], document["classes"], document.get("names"), document.get("crowd")]
    given = [column for column in columns if column is not None]
    if (
        not all(isinstance(column, list) and len(column) == len(given[0]) for column in given)
        or not all(map(_is_box, document["boxes"]))
        or not all(type(number) is int for number in document["classes"])
        or not all(isinstance(name, str) for name in document.get("names") or ())
    ):
        raise DataError(f"{file} is not of the form {_FORM}, lists of one length.")
    return document


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)


# ---- reading -----------------------------------------------------------------------------------


class ShardLabels:
    """Labeled shards, or some of their samples; the Samples protocol. Samples have Labels.

    `chosen` has for each shard the places of the samples that are meant; None: all.
    """

    def __init__(
        self,
        name: str,
        shards: ShardSamples | RemoteSamples,
        names: tuple[str, ...],
        chosen: Sequence[npt.NDArray[np.int64]] | None,
        digest: str = "",
    ) -> None:
        self.name = name
        self.shard_sizes = shards.shard_sizes
        parts = [shards.fingerprint, digest, *map(repr, names)]
        if chosen is not None:
            self.shard_sizes = np.array([len(places) for places in chosen], np.int64)
            parts += [hashlib.sha256(places.tobytes()).hexdigest() for places in chosen]
        self.fingerprint = sha256_text(parts)
        self._length = int(self.shard_sizes.sum())
        self._shards = shards
        self._classes = len(names)
        self._chosen = chosen

    @property
    def remote(self) -> bool:
        """Whether shards are fetched before they can be read."""
        return isinstance(self._shards, RemoteSamples)

    def __len__(self) -> int:
        return self._length

    def read(self, shard: int, index: int) -> Sample:
        """Read a picture and its labels. Raises DataError for labels that are not there."""
        if not 0 <= index < self.shard_sizes[shard]:
            raise IndexError(f"shard {shard} has {self.shard_sizes[shard]} samples, not {index}")
        place = int(self._chosen[shard][index]) if self._chosen is not None else index
        sample = self._shards.read(shard, place)
        content = self._shards.read_json(shard, place)
        if content is None:
            raise unlabeled(sample.source, sample.key)
        labels = parse_json(content, f"{sample.source} ({sample.key}.json)", self._classes)
        return dataclasses.replace(sample, annotation=labels)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Tell the shards which of them come next."""
        self._shards.prefetch(shards)

    def close(self) -> None:
        """Give back open files; a later read opens them again."""
        self._shards.close()


def unlabeled(shard: str, key: str) -> DataError:
    """Say that a picture has no labels beside it."""
    return DataError(
        f"The shard {shard} has no {key}.json beside the picture, and so no labels: pack with "
        "`python -m pretrain.pack --labels`, or write a json with empty lists for background. "
        "(Shards that were fetched or indexed by an earlier version: empty the cache.)"
    )
