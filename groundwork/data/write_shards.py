"""Pictures into tar shards, atomically: a shard has its final name only when it is whole.

What: `write_shard` writes one tar and its sample index; `finish_set` writes index.json, last;
`write_shards` does both for a sequence of samples that a program makes (drawn scenes, tests).
`pretrain.pack` builds on the first two.

Why atomic: webdataset's own writer works under the final name, and a killed one leaves a truncated
shard that reads without an error (a shorter data set, silently). Here a file is written under a
temporary name in the same folder, synchronised, and renamed.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from groundwork.data.shard_index import (
    INDEX_NAME,
    SampleIndex,
    SetIndex,
    is_set_index,
    json_columns,
    samples_name,
    sha256_bytes,
)
from groundwork.data.tar_format import (
    END_OF_ARCHIVE,
    PICTURE_SUFFIXES,
    escape_key,
    member_header,
    padding,
)
from groundwork.errors import DataError
from groundwork.files import replacing, sync, write_file


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample to be written: its unescaped key, its members' bytes by extension, its label.

    `path` is where the picture came from (the key and its extension unless given). Exactly one
    member is a picture. `label` is a class's name; unless given, it is the text of a `cls` member.
    """

    key: str
    members: Mapping[str, bytes]
    path: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What index.json says of a shard."""

    name: str
    pictures: int
    tar_bytes: int
    sha256: str
    samples_sha256: str

    @classmethod
    def of(cls, name: str, samples: SampleIndex) -> Row:
        """Sum up a shard's sample index."""
        digest = sha256_bytes(samples.dump())
        return cls(name, len(samples), samples.tar_bytes, samples.tar_sha256, digest)


@dataclass(slots=True)
class _Columns:
    keys: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    jsons: list[tuple[int, int] | None] = field(default_factory=list)


def shard_name(prefix: str, number: int) -> str:
    """Return the file name of a shard: six digits, which sort up to a million shards."""
    return f"{prefix}-{number:06d}.tar"


def write_shard(
    folder: Path,
    name: str,
    entries: Iterable[Entry],
    *,
    plan: str = "",
    quarantined: list[list[str]] | None = None,
    mended: list[list[str]] | None = None,
) -> SampleIndex:
    """Write one tar and, after it, its sample index; return the index.

    `quarantined` ([path, reason] each) and `mended` ([path, reason, where]: defects of labels) may
    still grow while `entries` is being consumed. A shard
    that turns out to have no samples gets an index, and no tar. Raises DataError for a sample
    without exactly one picture, for a key that occurs twice, and for names that lead out of a
    folder.
    """
    columns = _Columns()
    with replacing(folder / name) as temporary:
        digest = hashlib.sha256()
        with temporary.open("wb") as file:
            position = 0
            seen: set[str] = set()
            for entry in entries:
                for blocks in _blocks(entry, columns, position, seen):
                    file.write(blocks)
                    digest.update(blocks)
                    position += len(blocks)
            file.write(END_OF_ARCHIVE)
            digest.update(END_OF_ARCHIVE)
        if not columns.keys:
            temporary.unlink()
    json_offsets, json_sizes = json_columns(columns.jsons)
    index = SampleIndex(
        keys=columns.keys,
        paths=columns.paths,
        offsets=np.array(columns.offsets, dtype=np.int64),
        sizes=np.array(columns.sizes, dtype=np.int64),
        labels=columns.labels,
        tar_bytes=position + len(END_OF_ARCHIVE) if columns.keys else 0,
        tar_sha256=digest.hexdigest() if columns.keys else "",
        plan=plan,
        quarantined=quarantined or [],
        json_offsets=json_offsets,
        json_sizes=json_sizes,
        mended=mended or [],
    )
    write_file(folder / samples_name(name), index.dump())
    return index


def _blocks(entry: Entry, columns: _Columns, position: int, seen: set[str]) -> Iterable[bytes]:
    """Give the bytes of a sample's members, and note its picture in the columns."""
    pictures = [suffix for suffix in entry.members if suffix.lower() in PICTURE_SUFFIXES]
    if len(pictures) != 1:
        raise DataError(
            f"The sample {entry.key!r} has {len(pictures)} pictures among its members "
            f"{sorted(entry.members)}, and needs exactly one."
        )
    escaped = escape_key(entry.key)
    if entry.key in seen:
        raise DataError(f"The key {entry.key!r} occurs twice in one shard: give it another name.")
    seen.add(entry.key)
    label = entry.label
    if label is None and "cls" in entry.members:
        label = entry.members["cls"].decode().strip()
    json: tuple[int, int] | None = None
    for suffix, content in entry.members.items():
        header = member_header(f"{escaped}.{suffix}", len(content))
        if suffix == pictures[0]:
            columns.keys.append(entry.key)
            columns.paths.append(entry.path or f"{entry.key}.{suffix}")
            columns.offsets.append(position + len(header))
            columns.sizes.append(len(content))
            columns.labels.append(label)
        elif suffix == "json":
            json = position + len(header), len(content)
        for blocks in (header, content, padding(len(content))):
            position += len(blocks)
            yield blocks
    columns.jsons.append(json)


def finish_set(
    folder: Path, shards: Iterable[Row], *, plan: str = "", classes: Sequence[str] = ()
) -> SetIndex:
    """Write index.json, which makes a folder of shards a finished set; leave out empty shards."""
    rows = [row for row in shards if row.pictures]
    index = SetIndex(
        names=[row.name for row in rows],
        pictures=np.array([row.pictures for row in rows], dtype=np.int64),
        tar_bytes=np.array([row.tar_bytes for row in rows], dtype=np.int64),
        sha256=[row.sha256 for row in rows],
        samples_sha256=[row.samples_sha256 for row in rows],
        plan=plan,
        classes=list(classes),
    )
    write_file(folder / INDEX_NAME, index.dump())
    sync(folder)
    return index


def write_shards(
    folder: Path,
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    *,
    prefix: str = "shard",
    shard_size: int = 1000,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write (key, members) pairs as a finished set; the folder appears whole or not at all.

    `classes` are the names that index.json keeps: those of the labels unless given.

    Members are bytes by extension (`{"jpg": ..., "cls": b"airplane"}`), exactly one of them a
    picture. Raises DataError where `folder` exists already. If another process writes the same
    folder at the same time, the first one to finish stays.
    """
    if folder.exists():
        raise DataError(f"The folder {folder} exists already: remove it, or name another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        entries = (Entry(key, members) for key, members in samples)
        written: list[Row] = []
        labels: set[str] = set()
        while group := list(itertools.islice(entries, shard_size)):
            name = shard_name(prefix, len(written))
            index = write_shard(temporary, name, group)
            written.append(Row.of(name, index))
            labels.update(label for label in index.labels if label is not None)
        finish_set(temporary, written, classes=sorted(labels) if classes is None else classes)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not is_set_index(folder / INDEX_NAME):
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
