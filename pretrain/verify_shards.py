"""Every damage in a folder of shards, with what to do about it.

What: shards of ours are compared with their index by size and sha256, so that no changed bit goes
unnoticed; where they differ, a scan of the headers says how. Shards without an index of ours are
checked for what can be seen from the tar alone: header checksums, members that lie within the
file, the end-of-archive mark, keys that occur twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from groundwork.data.folders import files_below, walk
from groundwork.data.foreign_shards import read_member
from groundwork.data.shard_index import (
    INDEX_NAME,
    SAMPLES_SUFFIX,
    SampleIndex,
    index_shard,
    is_set_index,
    samples_name,
    sha256_bytes,
)
from groundwork.data.shard_sets import UNFINISHED_NAME, read_set_index
from groundwork.data.tar_format import scan
from groundwork.data.write_shards import Row
from groundwork.errors import DataError, UsageError

_AGAIN = (
    "copy it again from where it came from; or, where the pictures still are, remove it and run "
    "the same pack command again, which makes only what is missing"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One damage: the file, what is wrong with it, and what to do."""

    file: Path
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}\n    What to do: {self.advice}."


@dataclass(slots=True)
class Verdict:
    """What a check found. `by_hash` tells whether every byte was compared, or the structure."""

    shards: int = 0
    pictures: int = 0
    bytes_read: int = 0
    by_hash: bool = True
    problems: list[Problem] = field(default_factory=list)


def verify(folder: Path, *, threads: int, progress: Callable[[int], object]) -> Verdict:
    """Check a folder of shards, or a single tar without an index; `progress` hears of shards.

    Raises UsageError when there is nothing to check.
    """
    single = folder.is_file()
    tars = [folder] if single else [Path(tar) for tar in files_below(folder, ".tar")]
    folders = [folder.parent] if single else [Path(place) for place, _ in walk(folder)]
    own = [place for place in folders if _is_indexed(place)]
    if not tars and not own:
        raise UsageError(f"There are no shards (*.tar) in {folder}.")
    verdict = Verdict(by_hash=True)
    checks: list[Callable[[], _Finding]] = []
    for place in own:
        rows = _expected(place, verdict.problems)
        verdict.problems.extend(_extra(place, rows))
        checks += [partial(_check_own, place, row) for row in rows]
    for tar in tars:
        if tar.parent not in own:
            verdict.by_hash = False
            checks.append(partial(_check_structure, tar))
    with ThreadPoolExecutor(threads) as pool:  # hashing leaves the interpreter lock alone
        for finding in pool.map(lambda check: check(), checks):
            verdict.shards += 1
            verdict.pictures += finding.pictures
            verdict.bytes_read += finding.tar_bytes
            verdict.problems.extend(finding.problems)
            progress(1)
    return verdict


def _is_indexed(folder: Path) -> bool:
    return is_set_index(folder / INDEX_NAME) or any(folder.glob(f"*{SAMPLES_SUFFIX}"))


@dataclass(slots=True)
class _Finding:
    pictures: int = 0
    tar_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


# ---- shards of ours ----------------------------------------------------------------------------


def _expected(folder: Path, problems: list[Problem]) -> list[Row]:
    """Say what should be there: by index.json, or where that is lost, by the sample indices."""
    path = folder / INDEX_NAME
    unfinished = (folder / UNFINISHED_NAME).exists()
    again = "run the same pack command again, which goes on where it stopped"
    if path.exists():
        try:
            index = read_set_index(path)
        except DataError as error:
            problems.append(Problem(path, str(error), again))
        else:
            columns = (
                index.names,
                index.pictures.tolist(),
                index.tar_bytes.tolist(),
                index.sha256,
                index.samples_sha256,
            )
            return [Row(*values) for values in zip(*columns, strict=True)]
    elif unfinished:
        problems.append(Problem(folder, "its packing was not finished", again))
    else:
        problems.append(Problem(path, "the index of the set is missing", again))
    rows = []
    for samples in sorted(folder.glob(f"*{SAMPLES_SUFFIX}")):
        name = samples.name.removesuffix(SAMPLES_SUFFIX) + ".tar"
        try:
            row = Row.of(name, SampleIndex.parse(samples.read_bytes(), str(samples)))
        except (OSError, DataError) as error:
            problems.append(Problem(samples, str(error), _AGAIN))
            row = Row(name, 0, 0, "", "")
        if row.pictures or (folder / name).exists():
            rows.append(row)
    return rows


def _extra(folder: Path, rows: Sequence[Row]) -> list[Problem]:
    names = {row.name for row in rows}
    return [
        Problem(
            tar,
            "no index names this shard, so that its pictures are not used",
            "move it away; or pack its pictures into a folder of their own",
        )
        for tar in sorted(folder.glob("*.tar"))
        if tar.name not in names
    ]


def _check_own(folder: Path, row: Row) -> _Finding:
    finding = _Finding(row.pictures)
    tar, samples = folder / row.name, folder / samples_name(row.name)
    if row.samples_sha256:
        try:
            if sha256_bytes(samples.read_bytes()) != row.samples_sha256:
                finding.problems.append(
                    Problem(samples, "this sample index is not the one packed", _AGAIN)
                )
        except OSError as error:
            what = f"the sample index cannot be read ({error.strerror})"
            finding.problems.append(Problem(samples, what, _AGAIN))
    try:
        with tar.open("rb") as file:
            finding.tar_bytes = tar.stat().st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        what = f"the shard cannot be read ({error.strerror})"
        finding.problems.append(Problem(tar, what, _AGAIN))
        return finding
    if not row.sha256:  # its index is lost, which has been told
        finding.problems.extend(_check_structure(tar).problems)
    elif (finding.tar_bytes, digest) != (row.tar_bytes, row.sha256):
        finding.problems.append(Problem(tar, _how_it_differs(tar, finding.tar_bytes, row), _AGAIN))
    return finding


def _how_it_differs(tar: Path, found: int, row: Row) -> str:
    size = f"it has {found} bytes, and its index says {row.tar_bytes}"
    try:
        members = sum(1 for _ in scan(tar))
    except DataError as error:
        return f"{size}. {error}" if found != row.tar_bytes else str(error)
    if found != row.tar_bytes:
        return f"{size}; another shard of the same name, perhaps"
    if members < row.pictures:
        return f"it holds {members} members, and its index names {row.pictures} pictures"
    return "its headers are sound, but the bytes of a picture have changed (sha256)"


# ---- shards of others --------------------------------------------------------------------------


def _check_structure(tar: Path) -> _Finding:
    advice = "copy it again from where it came from, or write it again"
    try:
        samples, _ = index_shard(tar, partial(read_member, tar))
    except DataError as error:
        return _Finding(problems=[Problem(tar, str(error), advice)])
    if not len(samples):
        return _Finding(problems=[Problem(tar, "it holds no pictures", advice)])
    return _Finding(len(samples), samples.tar_bytes)
