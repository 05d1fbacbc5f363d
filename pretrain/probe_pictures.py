"""The pictures that a probe looks at: read once, evenly over a set, the same over a whole run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from groundwork.data.decode import naming, open_picture
from groundwork.data.reach import read_patiently
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.shards import Samples, evenly
from groundwork.errors import DataError, UnavailableError

logger = logging.getLogger(__name__)

# Remote shards are fetched whole, so the unlabeled pictures come from few of them.
SHARDS = 8
# One labeled picture in five is held out where no validation set is named.
HELD_OUT = 5


@dataclass(frozen=True)
class Pictures:
    """Pictures as the probe sees them: uint8 N side side C, and the class number of each."""

    pixels: Tensor
    labels: Tensor | None = None

    def take(self, rows: Sequence[int]) -> Pictures:
        """Return some of them, in this order."""
        assert self.labels is not None
        index = torch.tensor(rows, dtype=torch.int64)
        return Pictures(self.pixels[index], self.labels[index])


def read_unlabeled(samples: Samples, limit: int, side: int, reading: Reading = PLAIN) -> Pictures:
    """Read up to `limit` pictures, evenly over a few shards; unreadable ones are left out."""
    kept = []
    places = evenly_over_shards(samples.shard_sizes, limit)
    for shard, index in places:
        which = f"a picture of {samples.name}"
        try:
            sample = read_patiently(samples, shard, index)
            which = f"{sample.key} of {sample.source}"
            kept.append(_whole(sample.image, side, reading))
        except UnavailableError:  # of a store that does not answer every picture would be left out
            raise
        except DataError as error:
            logger.warning("The probe leaves out %s: %s", which, error)
    if len(kept) < 2:
        raise DataError(
            f"{samples.name} has {len(kept)} readable pictures of {len(places)} for the probe; "
            "it needs two at least."
        )
    return Pictures(torch.from_numpy(np.stack(kept)))


def read_labeled(
    samples: Samples, limit: int, side: int, reading: Reading = PLAIN
) -> tuple[Tensor, list[str]]:
    """Read up to `limit` pictures, evenly over all: uint8 N side side C, and their labels.

    Raises DataError where a picture cannot be read or has no label.
    """
    pixels: list[npt.NDArray[np.uint8]] = []
    labels: list[str] = []
    for shard, index in evenly(samples.shard_sizes, limit):
        sample = read_patiently(samples, shard, index)
        if sample.label is None or not sample.label.strip():
            raise DataError(
                f"{sample.key} of {sample.source} has no label: probe.labeled and probe.val want "
                "a folder for each class, or shards with .cls members."
            )
        with naming(f"{sample.key} of {sample.source}"):
            pixels.append(_whole(sample.image, side, reading))
        labels.append(sample.label.strip())
    if not pixels:
        raise DataError(f"{samples.name} has no pictures for the probe.")
    return torch.from_numpy(np.stack(pixels)), labels


def evenly_over_shards(shard_sizes: npt.NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Place up to `limit` pairs evenly over SHARDS shards, or over as many more as it takes."""
    shards = len(shard_sizes)
    count = min(SHARDS, shards)
    chosen = np.arange(count, dtype=np.int64) * shards // max(count, 1)
    while count < shards and int(shard_sizes[chosen].sum()) < limit:
        count = min(2 * count, shards)
        chosen = np.arange(count, dtype=np.int64) * shards // count
    return [(int(chosen[which]), index) for which, index in evenly(shard_sizes[chosen], limit)]


def number(names: Sequence[str], classes: Sequence[str], where: str) -> Tensor:
    """Turn class names into numbers (N,); raises DataError for a class that is not known."""
    numbers = {name: index for index, name in enumerate(classes)}
    strange = sorted(set(names) - numbers.keys())
    if strange:
        raise DataError(
            f"{where} has the class {strange[0]}, which none of the labeled pictures taken has; "
            f"they have {', '.join(classes)}. Remove it, or raise probe.pictures."
        )
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)


def hold_out(pictures: Pictures, where: str) -> tuple[Pictures, Pictures]:
    """Split into a bank and queries: every fifth picture of each class, in file order."""
    assert pictures.labels is not None
    seen: dict[int, int] = {}
    bank: list[int] = []
    queries: list[int] = []
    for row, label in enumerate(pictures.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        (queries if seen[label] % HELD_OUT == 0 else bank).append(row)
    if not queries:
        raise DataError(
            f"{where} has fewer than {HELD_OUT} pictures of every class, so that none can be held "
            "out; name more of them, or set probe.val."
        )
    return pictures.take(bank), pictures.take(queries)


def _whole(data: bytes, side: int, reading: Reading) -> npt.NDArray[np.uint8]:
    picture = open_picture(data, reading)
    return picture.cut([picture.whole], side)[0]
