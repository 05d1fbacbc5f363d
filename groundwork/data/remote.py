"""Opening shards far away: http, https, s3, gs.

What: `open_remote` reads the index.json of a set of ours, or indexes tars that have none. To index
a tar means to fetch it whole, once; what was learnt is kept. The samples are then read through a
bounded cache on this machine (remote_samples, shard_cache), which survives the run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from groundwork.data.remote_samples import (
    RemoteSamples,
    entry_key,
    fetch_tar,
    samples_of,
    told,
)
from groundwork.data.remote_stores import RemoteError, Store, open_store, read
from groundwork.data.shard_cache import Incoming, ShardCache, locked
from groundwork.data.shard_index import INDEX_NAME, SampleIndex, SetIndex, sha256_text
from groundwork.data.shards import expand_braces
from groundwork.errors import DataError, UsageError

_LOGGER = logging.getLogger(__name__)
_STREAMS = 4  # shards fetched at once to be indexed
Facts = tuple[int, int, str]  # of a shard: pictures, bytes, sha256


def is_remote(train: str) -> bool:
    """Tell whether this names something that is read from far away."""
    return bool(re.match(r"(https?|s3|gs|gcs)://", train, re.IGNORECASE))


def open_remote(
    urls: Sequence[str], *, cache: Path, cache_bytes: int, key: str = "data.train"
) -> RemoteSamples:
    """Open remote shards: a folder's URL or that of its index.json, or tars of one folder.

    Tars are named by URLs with braces (`{000..127}`), or by a glob where the store can list its
    files. Raises DataError where nothing is found, UsageError where a package is missing.
    """
    shard_cache = ShardCache(cache / "remote", cache_bytes)
    name = " ".join(urls)
    if len(urls) == 1 and not urls[0].endswith(".tar"):
        store = open_store(urls[0].removesuffix(INDEX_NAME))
        content = _content_of_index(store)
        if content is not None:
            return RemoteSamples(
                name, store, SetIndex.parse(content, store.base + INDEX_NAME), shard_cache
            )
        return _open_tars(name, store, _listed(store, "*.tar"), shard_cache, key)
    expanded = [url for pattern in urls for url in expand_braces(pattern)]
    strays = [url for url in expanded if not url.endswith(".tar")]
    if strays:
        raise UsageError(f"{key}: {strays[0]} is no tar shard: name folders one by one.")
    # What stands before the first wildcard, cut to whole folders.
    folders = [url.partition("*")[0].rpartition("/")[0] + "/" for url in expanded]
    base = os.path.commonprefix(folders).rpartition("/")[0]  # noqa: RUF071 (cut just here)
    if base.count("/") < 2:
        raise UsageError(f"{key}={name}: shards of several servers are to be named one by one.")
    store = open_store(base)
    names = []
    for url in expanded:
        tail = url[len(store.base) :]
        names += _listed(store, tail) if "*" in tail else [store.name_of(tail)]
    return _open_tars(name, store, names, shard_cache, key)


def _content_of_index(store: Store) -> bytes | None:
    """Read the set's index.json; None where there is none."""
    try:
        return read(store, INDEX_NAME)
    except RemoteError as error:
        if error.missing:
            return None
        raise told(store.base + INDEX_NAME, error) from error


def _listed(store: Store, pattern: str) -> list[str]:
    try:
        found = store.list_tars(pattern)
    except RemoteError as error:
        raise told(store.base + pattern, error) from error
    if found is None:
        raise DataError(
            f"There is no {INDEX_NAME} at {store.base} (or no leave to read it), and a web server"
            " does not list its files: name the shards, such as"
            f" {store.base}shard-{{000000..000127}}.tar, or pack with `python -m pretrain.pack`."
        )
    if not found:
        raise DataError(f"There is no {INDEX_NAME} and no tar file {pattern} at {store.base}.")
    return found


def _open_tars(
    name: str, store: Store, names: Sequence[str], shard_cache: ShardCache, key: str
) -> RemoteSamples:
    """Open these tars, by the index.json in their folder if it is ours and has them all."""
    if len(set(names)) != len(names):
        raise DataError(f"{key}={name} names the same shard twice: name each of them once.")
    content = _content_of_index(store)
    if content is not None and b"groundwork-shards" in content[:64]:
        whole = SetIndex.parse(content, store.base + INDEX_NAME)
        rows = {shard: row for row, shard in enumerate(whole.names)}
        if all(shard in rows for shard in names):
            return RemoteSamples(
                name, store, _chosen(whole, [rows[shard] for shard in names]), shard_cache
            )
    return RemoteSamples(name, store, _index_of_foreign(store, names, shard_cache), shard_cache)


def _chosen(index: SetIndex, rows: list[int]) -> SetIndex:
    return SetIndex(
        names=[index.names[row] for row in rows],
        pictures=index.pictures[rows],
        tar_bytes=index.tar_bytes[rows],
        sha256=[index.sha256[row] for row in rows],
        samples_sha256=[index.samples_sha256[row] for row in rows],
        classes=index.classes,
    )


def _index_of_foreign(store: Store, names: Sequence[str], shard_cache: ShardCache) -> SetIndex:
    """Fetch each shard once to learn what is in it; what is learnt is kept beside the cache.

    A line is written for each shard as soon as it is known, so that a start that was interrupted
    goes on where it stopped. One process of a machine does this, and the others wait for it.
    """
    home = shard_cache.folder / "foreign"
    home.mkdir(parents=True, exist_ok=True)
    lines = home / f"{sha256_text([store.base, *names])[:40]}.jsonl"
    with locked(lines.with_suffix(".lock")):
        known = _read_lines(lines)
        missing = [shard for shard in names if shard not in known]
        if missing:
            _LOGGER.info(
                "%s has no index.json: %d shards are fetched once to be indexed. (Packing them with"
                " `python -m pretrain.pack` saves this.)",
                store.base,
                len(missing),
            )
            with lines.open("w", encoding="utf-8") as file:
                for shard, facts in itertools.chain(
                    list(known.items()), _learn_all(store, shard_cache, missing)
                ):
                    known[shard] = facts
                    file.write(json.dumps([shard, *facts]) + "\n")
                    file.flush()
    return SetIndex(
        names=list(names),
        pictures=np.array([known[shard][0] for shard in names], np.int64),
        tar_bytes=np.array([known[shard][1] for shard in names], np.int64),
        sha256=[known[shard][2] for shard in names],
        samples_sha256=[""] * len(names),
    )


def _read_lines(path: Path) -> dict[str, Facts]:
    known: dict[str, Facts] = {}
    if path.exists():
        # What was being written when the process died has no end of line, and is not known.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            shard, pictures, size, sha256 = json.loads(line)
            known[shard] = pictures, size, sha256
    return known


def _learn_all(
    store: Store, shard_cache: ShardCache, names: Sequence[str]
) -> Iterator[tuple[str, Facts]]:
    """Fetch several shards at once, and yield what is in them in the order of the names."""
    pool = ThreadPoolExecutor(_STREAMS)
    try:
        yield from zip(names, pool.map(partial(_learn, store, shard_cache), names), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _learn(store: Store, shard_cache: ShardCache, name: str) -> Facts:
    """Fetch one shard into the cache, where it stays, and say what is in it."""
    url = store.base + name

    def fill(incoming: Incoming) -> None:
        fetch_tar(store, name, incoming, 0, threading.Event())
        incoming.samples.write_bytes(samples_of(incoming.tar, url).dump())

    descriptor, samples = shard_cache.fetch(entry_key(url, ""), fill)
    with os.fdopen(descriptor, "rb") as tar:
        sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        size = os.fstat(tar.fileno()).st_size
    return len(SampleIndex.parse(samples, f"of {url}")), size, sha256
