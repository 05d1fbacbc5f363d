"""Pictures in tar shards: which samples there are, and one sample read at its offset.

What: `open_shards` takes what a person writes (a folder, a glob, a brace pattern, a list of tar
files) and gives `ShardSamples`, which reads any sample in any order with one `pread`. Why not a
stream of the tar: with an index, any position of the data is reached at once (resume, any number
of ranks), a damaged shard is noticed instead of ending early, and locally it is not slower.

Shards are ours (packed by `python -m pretrain.pack`, with an index.json in their folder) or
someone else's; those are indexed once, from their headers, in `.groundwork-index` beside them, or
in a cache where that folder cannot be written to. Nothing is unpickled, and no command is run.

`Sample` and the protocol `Samples` are what everything above this module builds on.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from groundwork.data.folders import walk
from groundwork.data.foreign_shards import index_foreign
from groundwork.data.shard_index import (
    INDEX_NAME,
    SAMPLES_SUFFIX,
    SampleIndex,
    SetIndex,
    is_set_index,
    samples_name,
    sha256_bytes,
    sha256_text,
)
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import DataError, UsageError, not_read

logger = logging.getLogger(__name__)

# More than a shuffle window (16 shards) together with the next one.
_OPEN_SHARDS = 40
UNFINISHED_NAME = ".pack.json"


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
        descriptor, place, samples = self._open(shard)
        if not 0 <= index < len(samples):
            raise IndexError(f"shard {shard} has {len(samples)} samples, not one at {index}")
        offset, size = int(samples.offsets[index]), int(samples.sizes[index])
        key = samples.keys[index]
        image = _bytes(descriptor, place, key, offset, size)
        return Sample(key, image, samples.labels[index], str(place.tar), offset)

    def read_json(self, shard: int, index: int) -> bytes | None:
        """Read the `.json` member of a sample; None where it has none. Raises as `read` does."""
        descriptor, place, samples = self._open(shard)
        if samples.json_offsets is None or samples.json_sizes is None:
            return None
        offset, size = int(samples.json_offsets[index]), int(samples.json_sizes[index])
        key = f"{samples.keys[index]}.json"
        return _bytes(descriptor, place, key, offset, size) if offset else None

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
            os.close(self._opened.popitem()[1][0])

    def _open(self, shard: int) -> tuple[int, Shard, SampleIndex]:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        place = self.shard(shard)
        samples = read_sample_index(place, int(self.shard_sizes[shard]))
        try:
            descriptor = os.open(place.tar, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise not_read(
                error,
                f"The shard {place.tar} cannot be opened: {error.strerror}. Copy it again; find "
                f"every damage with `{verify_command(place.tar.parent)}`.",
                place.tar.parent,
            ) from error
        found = os.fstat(descriptor).st_size
        if found != place.tar_bytes:
            os.close(descriptor)
            raise DataError(
                f"The shard {place.tar} has {found} bytes, and its index says {place.tar_bytes}: "
                f"copy it again; find every damage with `{verify_command(place.tar.parent)}`."
            )
        if len(self._opened) >= _OPEN_SHARDS:
            os.close(self._opened.popitem(last=False)[1][0])
        self._opened[shard] = descriptor, place, samples
        return self._opened[shard]


def _bytes(descriptor: int, place: Shard, key: str, offset: int, size: int) -> bytes:
    """Read a member, `key` in errors, from an open shard; one call in all but odd cases."""
    try:
        content = os.pread(descriptor, size, offset)
        while len(content) < size and (
            more := os.pread(descriptor, size - len(content), offset + len(content))
        ):
            content += more
    except OSError as error:
        sentence = f"The sample {key!r} of the shard {place.tar} cannot be read"
        raise not_read(error, f"{sentence}: {error.strerror}.", place.tar.parent) from error
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


# ---- opening -----------------------------------------------------------------------------------


def open_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], index_cache: Path
) -> ShardSamples:
    """Open tar shards: a folder, a glob, a brace pattern (`{000..127}`), a tar, or a list of these.

    `index_cache` is where the index of someone else's shards goes if their own folder cannot be
    written to. A glob is sorted; a list keeps its order. Raises DataError when there is nothing,
    when a shard is missing or named twice, and for a folder whose packing was not finished.
    """
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    name = " ".join(os.fspath(item) for item in given)
    known: dict[str, bool] = {}
    sets = [part for item in given for part in _open_item(os.fspath(item), index_cache, known)]
    if not any(part.index.pictures[part.rows].any() for part in sets):
        raise DataError(f"There are no pictures in the shards {name!r}.")
    if len(given) > 1 or any(mark in name for mark in "*?[{"):
        tars = [
            (folder, part.index.names[row])
            for part in sets
            for folder in [part.folder.resolve()]
            for row in part.rows.tolist()
        ]
        if len(set(tars)) != len(tars):
            raise DataError(
                f"The shards {name!r} name the same tar file twice: name each of them once."
            )
    return ShardSamples(name, sets)


def _open_item(item: str, index_cache: Path, known: dict[str, bool]) -> list[ShardSet]:
    """Open one folder, pattern or tar: one set for each folder of ours that shards lie in.

    `known` remembers which folders are ours.
    """
    if item.startswith("pipe:"):
        raise DataError(f"Shards that are commands are not run: {item!r}. Name files instead.")
    path = Path(item)
    deeper: list[ShardSet] = []
    if path.is_dir():
        if is_set_index(path / INDEX_NAME):
            return [_open_own(path, None)]
        whole, tars = _in_folder(path)
    else:
        whole, tars = [], _expanded(item)
        for odd in [name for name in tars if not name.endswith(".tar")]:
            if picture_suffix(odd):
                raise DataError(
                    f"{item!r} matches {odd}, which is a picture and no tar: name pictures by "
                    "their folder, or by a list (.txt)."
                )
            if Path(odd).is_dir():
                tars.remove(odd)
                deeper += _open_item(odd, index_cache, known)
        if deeper and not tars:
            return deeper
    if not tars and not whole:
        raise DataError(f"No shard found: {item!r} is, or matches, no tar file.")
    # Text, not paths, which would take seconds for 100,000 shards.
    names: dict[str, list[str]] = {}
    for tar in tars:
        folder, _, name = tar.rpartition("/")
        names.setdefault(folder or ("/" if tar.startswith("/") else "."), []).append(name)
    for folder in names.keys() - known.keys():
        known[folder] = _is_own(Path(folder))
    own = [folder for folder in names if known[folder]]
    sets = [_open_own(folder, None) for folder in whole]
    sets += [_open_own(Path(folder), names.pop(folder)) for folder in own]
    foreign = [Path(folder) / name for folder in names for name in names[folder]]
    if foreign:
        root, home = index_foreign(foreign, index_cache)
        index = read_set_index(home / INDEX_NAME)
        sets.append(ShardSet(root, home, index, np.arange(len(index)), index.fingerprint()))
    return deeper + sets


def _in_folder(path: Path) -> tuple[list[Path], list[str]]:
    """Find the sets of ours below a folder that is none itself, and all other tars."""
    places = list(walk(path))
    whole = [Path(place) for place, _ in places if is_set_index(Path(place, INDEX_NAME))]
    inside = {str(place) for place in whole}
    others = [(place, name) for place, names in places if place not in inside for name in names]
    tars = [os.path.join(*one) for one in others if is_tar(one[1])]  # noqa: PTH118
    pictures = [one for one in others if picture_suffix(one[1])]
    if pictures and (tars or whole):
        top, names = places[0]
        shown = os.path.join(*pictures[0])  # noqa: PTH118
        # A set with previews in folders of their own is a set; all else may mean either.
        if pictures[0][0] == top or not any(map(is_tar, names)):
            raise mixed(path, shown, tars[0] if tars else str(whole[0] / INDEX_NAME))
        _passed_over(path, shown)
    return whole, tars


def is_tar(name: str) -> bool:
    """Tell whether a file's name is that of a tar; those that begin with a dot are passed over."""
    return name.endswith(".tar") and not name.startswith(".")


def mixed(where: Path, picture: str, tar: str) -> DataError:
    """Return the error for a folder in which pictures lie as well as shards."""
    return DataError(
        f"{where} holds pictures ({picture}) as well as tar shards ({tar}): put them into folders "
        "of their own, and name one of these, or both."
    )


def _passed_over(folder: Path, picture: str) -> None:
    logger.warning("%s holds shards; pictures that lie there are passed over: %s.", folder, picture)


def _tars_of_a_set(folder: Path) -> set[str]:
    """Return the names of the tars beside an index.json of ours.

    Warns of a picture that lies there, or below, and is passed over; raises DataError for more
    shards below, which index.json does not name.
    """
    present: set[str] = set()
    below: list[str] = []
    pictures: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_tar(entry.name):
                present.add(entry.name)
            elif picture_suffix(entry.name):
                pictures.append(entry.path)
            elif not entry.name.endswith(".json") and entry.name[0] != "." and entry.is_dir():
                below.append(entry.path)
    for one in sorted(below):
        try:
            found = list(walk(one))
        except DataError:  # not ours to read: lost+found
            continue
        for place, names in found:
            tar = next(filter(is_tar, names), None)
            if tar is not None:
                raise DataError(
                    f"{folder} is a set of shards, and {place} in it holds more ({tar}), which its "
                    "index.json does not name: put that into a folder of its own, and name both."
                )
            pictures += [f"{place}/{name}" for name in names if picture_suffix(name)]
    if pictures:
        _passed_over(folder, min(pictures))
    return present


def _expanded(pattern: str) -> list[str]:
    """Expand braces and wildcards; a file that really has such a name goes first."""
    if Path(pattern).exists():
        return [pattern]
    found: list[str] = []
    for name in expand_braces(pattern):
        if any(mark in name for mark in "*?["):
            anchor = Path(name).anchor
            matches = Path(anchor or ".").glob(str(Path(name).relative_to(anchor)))
            hidden = Path(name).name.startswith(".")
            found.extend(sorted(str(one) for one in matches if hidden or one.name[:1] != "."))
        elif name != pattern:  # whether it exists shows when its folder is looked at
            found.append(name)
    return found


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


def _is_own(folder: Path) -> bool:
    if is_set_index(folder / INDEX_NAME):
        return True
    if (folder / UNFINISHED_NAME).exists():
        raise DataError(
            f"The packing of {folder} was not finished: run the same `python -m pretrain.pack` "
            "command again, and it goes on where it stopped."
        )
    if next(folder.glob(f"*{SAMPLES_SUFFIX}"), None) is not None:
        raise DataError(
            f"The shards of {folder} were packed here, and their {INDEX_NAME} is not there or "
            f"damaged: copy it again; see `{verify_command(folder)}`. (Without the files "
            f"*{SAMPLES_SUFFIX} they are read as anybody's tars, as many as there are.)"
        )
    return False


def _open_own(folder: Path, chosen: list[str] | None) -> ShardSet:
    """Open shards of ours: the whole folder, or the chosen ones in their order."""
    index = read_set_index(folder / INDEX_NAME)
    present = _tars_of_a_set(folder)
    advice = f"see `{verify_command(folder)}`"
    if chosen is None:
        rows = list(range(len(index)))
        extra = present - set(index.names)
        if extra:
            raise DataError(
                f"The folder {folder} has tar files that its index.json does not name, the first "
                f"of {len(extra)} being {min(extra)}: move them away; {advice}."
            )
    else:
        numbers = {name: row for row, name in enumerate(index.names)}
        unknown = [name for name in chosen if name not in numbers]
        if unknown:
            raise DataError(
                f"The shard {folder / unknown[0]} is not in its folder's index.json: {advice}."
            )
        rows = [numbers[name] for name in chosen]
    missing = [index.names[row] for row in rows if index.names[row] not in present]
    if missing:
        raise DataError(
            f"The folder {folder} lacks {len(missing)} shards that its index.json names, the first "
            f"being {missing[0]}: copy them again; {advice}."
        )
    fingerprint = index.fingerprint()
    if rows != list(range(len(index))):
        fingerprint = sha256_text([fingerprint, *rows])
    return ShardSet(folder, folder, index, np.array(rows, dtype=np.int64), fingerprint)


def read_set_index(path: Path) -> SetIndex:
    """Read an index.json. Raises DataError."""
    try:
        return SetIndex.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"The index {path} cannot be read: {error.strerror}.") from error
