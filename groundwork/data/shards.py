"""Pictures in tar shards: which samples there are, and one sample read at its offset.

What: `ShardSamples` reads any sample in any order with one `pread`; `open_shards` (shard_sets.py)
makes it of what a person writes. Why not a stream of the tar: with an index, any position of the
data is reached at once (resume, any number of ranks), a damaged shard is noticed instead of ending
early, and locally it is not slower.

Shards are ours (packed by `python -m pretrain.pack`, with an index.json in their folder) or
someone else's; those are indexed once, from their headers, in `.groundwork-index` beside them, or
in a cache where that folder cannot be written to. Nothing is unpickled, and no command is run.

`Sample` and the protocol `Samples` are what everything above this module builds on.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from groundwork.data.shard_index import (
    SampleIndex,
    SetIndex,
    samples_name,
    sha256_bytes,
    sha256_text,
)
from groundwork.errors import DataError, UsageError, not_read

# More than a shuffle window (16 shards) together with the next one.
_OPEN_SHARDS = 40


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture as it is stored, and where it came from.

    `key` is unique within its shard; `label` is the name of its class where the data has one;
    `source` is the shard (or file) and `offset` the byte in it at which the picture begins.
    `annotation` is what labeled data knows of it (groundwork.data.labels), as it was written.
    """

    key: str
    image: bytes = field(repr=False)
    label: str | None
    source: str
    offset: int
    annotation: object | None = field(default=None, repr=False, compare=False)


class Samples(Protocol):
    """Pictures in a fixed order, shard after shard, that can be read in any order.

    `name` is what a person calls the data; `shard_sizes` has the number of pictures in each shard;
    `fingerprint` is a hash over what is in the data and in which order.
    """

    name: str
    shard_sizes: npt.NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample. Raises DataError that names the shard and the key."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Hear which shards come next: a hint, which local readers need not heed."""

    def close(self) -> None:
        """Give back open files; a later read opens them again."""


def evenly(shard_sizes: npt.NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Place up to `limit` (shard, index) pairs evenly over all samples, in file order."""
    ends = np.cumsum(shard_sizes)
    total = int(ends[-1]) if len(ends) else 0
    count = min(limit, total)
    if count == 0:
        return []
    positions = np.arange(count, dtype=np.int64) * total // count
    shards = np.searchsorted(ends, positions, side="right")
    indices = positions - (ends[shards] - shard_sizes[shards])
    return [(int(shard), int(index)) for shard, index in zip(shards, indices, strict=True)]


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a shard and its sample index lie, and what the index of the set says of it."""

    tar: Path
    samples: Path
    tar_bytes: int
    samples_sha256: str


@dataclass(frozen=True, slots=True)
class ShardSet:
    """Shards of one folder: where they and their index lie, and which rows of it are meant.

    Shards are made from a row when they are opened: 100,000 ready-made paths would cost a second
    and 100 MB.
    """

    folder: Path
    home: Path  # where the sample indices are
    index: SetIndex
    rows: npt.NDArray[np.int64]
    fingerprint: str

    def shard(self, number: int) -> Shard:
        """Say where the shard is that comes `number`th among the rows that are meant."""
        row = int(self.rows[number])
        name = self.index.names[row]
        return Shard(
            tar=self.folder / name,
            samples=self.home / samples_name(name),
            tar_bytes=int(self.index.tar_bytes[row]),
            samples_sha256=self.index.samples_sha256[row],
        )


class ShardSamples:
    """Local tar shards, read by offset; the Samples protocol.

    Start-up reads one index for the set; a shard's own index and file are opened when a sample of
    it is first asked for, and the least recently used are closed again. Picklable; a copy in
    another process opens its own files. A forked copy shares descriptors safely, since every read
    names its offset. One thread at a time.
    """

    def __init__(self, name: str, sets: Sequence[ShardSet]) -> None:
        self.name = name
        self.sets = list(sets)
        self.shard_sizes = np.concatenate([part.index.pictures[part.rows] for part in self.sets])
        self.fingerprint = self.sets[0].fingerprint
        if len(self.sets) > 1:
            self.fingerprint = sha256_text(part.fingerprint for part in self.sets)
        self._length = int(self.shard_sizes.sum())
        self._ends = np.cumsum([len(part.rows) for part in self.sets])
        self._opened: OrderedDict[int, tuple[int, Shard, SampleIndex]] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample.

        Raises DataError for a shard that is missing, cut off or not what its index says, and
        IndexError for a sample that the shard does not have.
        """
        _, place, samples = self._open(shard)
        if not 0 <= index < len(samples):
            raise IndexError(f"shard {shard} has {len(samples)} samples, not one at {index}")
        offset, size = int(samples.offsets[index]), int(samples.sizes[index])
        key = samples.keys[index]
        image = self._bytes(shard, place, key, offset, size)
        return Sample(key, image, samples.labels[index], str(place.tar), offset)

    def read_json(self, shard: int, index: int) -> bytes | None:
        """Read the `.json` member of a sample; None where it has none. Raises as `read` does."""
        _, place, samples = self._open(shard)
        if samples.json_offsets is None or samples.json_sizes is None:
            return None
        offset, size = int(samples.json_offsets[index]), int(samples.json_sizes[index])
        key = f"{samples.keys[index]}.json"
        return self._bytes(shard, place, key, offset, size) if offset else None

    def shard(self, shard: int) -> Shard:
        """Say where a shard lies."""
        if not 0 <= shard < len(self.shard_sizes):
            raise IndexError(f"there are {len(self.shard_sizes)} shards, not one numbered {shard}")
        part = int(np.searchsorted(self._ends, shard, side="right"))
        return self.sets[part].shard(shard - int(self._ends[part]) + len(self.sets[part].rows))

    def samples(self, shard: int) -> SampleIndex:
        """Return the keys, original paths, labels, offsets and sizes of one shard's samples."""
        return self._open(shard)[2]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Do nothing: local files need no fetching."""

    def close(self) -> None:
        """Close every open file; a later read opens it again."""
        while self._opened:
            _close(self._opened.popitem()[1][0])

    def _open(self, shard: int) -> tuple[int, Shard, SampleIndex]:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        place = self.shard(shard)
        samples = read_sample_index(place, int(self.shard_sizes[shard]))
        descriptor = -1
        try:
            descriptor = os.open(place.tar, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(descriptor).st_size
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise not_read(
                error,
                f"The shard {place.tar} cannot be opened: {error.strerror}. Copy it again; find "
                f"every damage with `{verify_command(place.tar.parent)}`.",
                place.tar.parent,
            ) from error
        if found != place.tar_bytes:
            os.close(descriptor)
            raise DataError(
                f"The shard {place.tar} has {found} bytes, and its index says {place.tar_bytes}: "
                f"copy it again; find every damage with `{verify_command(place.tar.parent)}`."
            )
        if len(self._opened) >= _OPEN_SHARDS:
            _close(self._opened.popitem(last=False)[1][0])
        self._opened[shard] = descriptor, place, samples
        return self._opened[shard]

    def _bytes(self, shard: int, place: Shard, key: str, offset: int, size: int) -> bytes:
        """Read a member; what fails is tried once more, by a file that is opened anew.

        One that was open while a network file system was gone stays broken when it is back.
        """
        try:
            return _pread(self._open(shard)[0], place, key, offset, size)
        except OSError:
            _close(self._opened.pop(shard)[0])
        try:
            return _pread(self._open(shard)[0], place, key, offset, size)
        except OSError as error:
            _close(self._opened.pop(shard)[0])
            sentence = f"The sample {key!r} of the shard {place.tar} cannot be read"
            raise not_read(error, f"{sentence}: {error.strerror}.", place.tar.parent) from error


def _close(descriptor: int) -> None:
    """Close a file; where its disk is gone, that fails too."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _pread(descriptor: int, place: Shard, key: str, offset: int, size: int) -> bytes:
    """Read a member, `key` in errors, from an open shard; one call in all but odd cases.

    Raises OSError, and DataError where the shard is too short.
    """
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (
        more := os.pread(descriptor, size - len(content), offset + len(content))
    ):
        content += more
    if len(content) != size:
        raise DataError(
            f"The shard {place.tar} ends inside the sample {key!r}: it has been cut off since it "
            f"was opened; find every damage with `{verify_command(place.tar.parent)}`."
        )
    return content


def read_sample_index(place: Shard, pictures: int) -> SampleIndex:
    """Read the index beside a shard. Raises DataError unless it is the one that is meant."""
    advice = f"copy it again, or see `{verify_command(place.tar.parent)}`"
    try:
        content = place.samples.read_bytes()
    except OSError as error:
        sentence = f"The index {place.samples} cannot be read ({error.strerror}): {advice}."
        raise not_read(error, sentence, place.samples.parent) from error
    if sha256_bytes(content) != place.samples_sha256:
        raise DataError(
            f"The index {place.samples} is not the one that index.json means: {advice}."
        )
    samples = SampleIndex.parse(content, str(place.samples))
    if len(samples) != pictures:
        raise DataError(f"The index {place.samples} has {len(samples)} samples, not {pictures}.")
    return samples


def verify_command(folder: Path) -> str:
    """Return the command that finds every damage in a folder of shards."""
    return f"python -m pretrain.pack verify {folder}"


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..127}` and `{a,b}`, the leftmost first; the numbers keep their width.

    Raises UsageError for braces that do not match.
    """
    if "{" not in pattern:
        return [pattern]
    # Imported here, since webdataset imports torch, and few need it.
    from webdataset.shardlists import expand_urls

    try:
        # It takes `::` for a break between two lists, and an address may have one.
        return [name.replace("\0", "::") for name in expand_urls(pattern.replace("::", "\0"))]
    except ValueError as error:
        raise UsageError(f"{pattern}: the braces do not match ({error}).") from error
