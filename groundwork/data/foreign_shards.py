"""An index for shards that someone else's webdataset wrote: made once, from the headers.

What: `index_foreign` gives the folder of an index of the same form as our own, either the one made
earlier or a new one. It lies in `.groundwork-index` beside the shards, so that every machine that
sees them shares it, or in the cache where that folder cannot be written to.

An index is known by the names, sizes and times of change of the shards it was made from: change a
shard, and a new one is made.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from groundwork.data.shard_index import (
    INDEX_NAME,
    SetIndex,
    index_shard,
    is_set_index,
    samples_name,
    sha256_bytes,
    sha256_text,
)
from groundwork.data.tar_format import Member
from groundwork.errors import DataError

_LOGGER = logging.getLogger(__name__)
FOLDER_NAME = ".groundwork-index"
# Enters the name of every index; raise it when an index has more in it than before.
_FORM = "2: offsets of json members"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def index_foreign(tars: Sequence[Path], cache: Path) -> tuple[Path, Path]:
    """Return the folder that the shards' names are relative to, and the folder of their index.

    Raises DataError for shards that cannot be read or indexed (`shard_index.index_shard`).
    """
    places = [Path(os.path.abspath(tar)) for tar in tars]  # noqa: PTH100 (pathlib keeps `..`)
    root = Path(os.path.commonpath([place.parent for place in places]))
    names = [place.relative_to(root).as_posix() for place in places]
    signature = _signature(tars, names)
    beside = root / FOLDER_NAME / signature
    # The same names, sizes and times may occur in two places; the cache serves them all.
    cached = cache / "shard-index" / sha256_text([root, signature])
    for home in (beside, cached):
        if is_set_index(home / INDEX_NAME):
            return root, home
    try:
        return root, _build(tars, names, beside)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
    return root, _build(tars, names, cached)


def _signature(tars: Sequence[Path], names: Sequence[str]) -> str:
    lines = [_FORM]
    for tar, name in zip(tars, names, strict=True):
        try:
            status = tar.stat()
        except OSError as error:
            raise DataError(f"The shard {tar} cannot be read: {error.strerror}.") from error
        lines.append(f"{name}\t{status.st_size}\t{status.st_mtime_ns}")
    return sha256_text(lines)


def _build(tars: Sequence[Path], names: Sequence[str], home: Path) -> Path:
    """Index every shard into a temporary folder, then give the whole its final name."""
    home.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=home.parent))
    try:
        _LOGGER.info("Indexing %d shards once, into %s", len(tars), home.parent)
        _index_all(tars, names, building)
        building.chmod(0o755)
        try:
            building.rename(home)
        except OSError:
            # Another process (rank) was quicker: its index is as good.
            if not is_set_index(home / INDEX_NAME):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return home


def _index_all(tars: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    hashes, counts, sizes = [], [], []
    passed_over = 0
    for tar, name in zip(tars, names, strict=True):
        samples, others = index_shard(tar, partial(read_member, tar))
        passed_over += others
        content = samples.dump()
        target = folder / samples_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        hashes.append(sha256_bytes(content))
        counts.append(len(samples))
        sizes.append(samples.tar_bytes)
    if passed_over:
        _LOGGER.warning(
            "%d members of the shards in %s belong to no picture and are passed over",
            passed_over,
            tars[0].parent,
        )
    index = SetIndex(
        names=list(names),
        pictures=np.array(counts, dtype=np.int64),
        tar_bytes=np.array(sizes, dtype=np.int64),
        sha256=[""] * len(names),
        samples_sha256=hashes,
    )
    (folder / INDEX_NAME).write_bytes(index.dump())


def read_member(tar: Path, member: Member) -> bytes:
    """Read the bytes of one small member."""
    with tar.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
