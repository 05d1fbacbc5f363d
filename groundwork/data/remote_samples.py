"""Samples of remote shards: fetched whole into the cache, checked, then read by offset.

What: `RemoteSamples` reads any sample of a set whose index is known. A shard is fetched, with its
sample index, when a sample of it is first asked for, or before that by `prefetch`. Whole shards,
because one large request is what object stores serve quickly. Sizes and sha256 are those of the
index, so what is read is never another shard's, nor an older one's.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from groundwork.data.foreign_shards import read_member
from groundwork.data.remote_stores import RemoteError, Stopped, Store, fetch, read
from groundwork.data.shard_cache import Incoming, ShardCache
from groundwork.data.shard_index import (
    SampleIndex,
    SetIndex,
    index_shard,
    samples_name,
    sha256_bytes,
    sha256_text,
)
from groundwork.data.shards import Sample
from groundwork.errors import DataError, UnavailableError, not_read

_LOGGER = logging.getLogger(__name__)
_STREAMS = 4  # shards fetched at once by one process
_FORGIVE = 300.0  # seconds until a shard that could not be fetched is asked for again
_INDICES = 40  # sample indices held in memory: more than this window's and the next one's


class RemoteSamples:
    """Shards of one remote folder; the Samples protocol.

    `read` waits for a shard that is not there yet, `prefetch` fetches in threads of this process,
    `close` stops them. A copy in a worker process fetches by itself what is not there, and finds
    what others have fetched. One thread at a time, prefetching apart.
    """

    def __init__(self, name: str, store: Store, index: SetIndex, cache: ShardCache) -> None:
        self.name = name
        self.shard_sizes = index.pictures
        self.fingerprint = index.fingerprint()
        self._store = store
        self._index = index
        self._cache = cache
        self._length = int(index.pictures.sum())
        self._samples: OrderedDict[int, SampleIndex] = OrderedDict()
        self._failed: dict[int, tuple[float, str]] = {}
        self._warned = False
        self._begin()

    def _begin(self) -> None:
        """Have no threads yet: in a new object, in a copy, and in a forked process."""
        self._process = os.getpid()
        self._todo: deque[int] = deque()
        self._threads: list[threading.Thread] = []
        self._news = threading.Condition()
        self._stop = threading.Event()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        of_this_process = ("_todo", "_threads", "_news", "_stop")
        kept = {name: value for name, value in self.__dict__.items() if name not in of_this_process}
        return {**kept, "_samples": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample, and fetch its shard first if need be.

        Raises DataError for a shard that cannot be fetched or is not what the index says.
        """
        descriptor, samples = self._open(shard)
        try:
            if not 0 <= index < len(samples):
                raise IndexError(f"shard {shard} has {len(samples)} samples, not one at {index}")
            offset, size = int(samples.offsets[index]), int(samples.sizes[index])
            key = samples.keys[index]
            image = self._bytes(descriptor, shard, key, offset, size)
        finally:
            os.close(descriptor)
        return Sample(key, image, samples.labels[index], self._url(shard), offset)

    def read_json(self, shard: int, index: int) -> bytes | None:
        """Read the `.json` member of a sample; None where it has none. Raises as `read` does."""
        descriptor, samples = self._open(shard)
        try:
            if samples.json_offsets is None or samples.json_sizes is None:
                return None
            offset, size = int(samples.json_offsets[index]), int(samples.json_sizes[index])
            key = f"{samples.keys[index]}.json"
            return self._bytes(descriptor, shard, key, offset, size) if offset else None
        finally:
            os.close(descriptor)

    def _bytes(self, descriptor: int, shard: int, key: str, offset: int, size: int) -> bytes:
        try:
            content = os.pread(descriptor, size, offset)
        except OSError as error:
            raise self._unusable(shard, error) from error
        if len(content) != size:
            raise DataError(
                f"The cached copy of {self._url(shard)} ends inside the sample {key!r}: delete"
                f" {self._cache.folder} and start again."
            )
        return content

    def samples(self, shard: int) -> SampleIndex:
        """Return a shard's sample index; fetches the shard."""
        descriptor, samples = self._open(shard)
        os.close(descriptor)
        return samples

    def classes(self) -> list[str]:
        """Return the names that the set's index keeps."""
        return self._index.classes

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, the first first, as far as the cache has room."""
        taken = list(itertools.accumulate(int(self._index.tar_bytes[shard]) for shard in shards))
        fitting = [
            shard for shard, so_far in zip(shards, taken, strict=True) if so_far <= self._room()
        ]
        if len(fitting) < len(shards) and not self._warned:
            self._warned = True
            _LOGGER.warning(
                "The cache has room for %d of the %d shards that come next, so some will be fetched"
                " more than once: set data.cache_gb to %.3g or more.",
                len(fitting),
                len(shards),
                taken[-1] * 5 / 4 / 1e9,
            )
        self._cache.want([self._key(shard) for shard in fitting])
        with self._news:
            self._stop.clear()
            self._todo = deque(fitting)
            self._news.notify_all()
        if fitting and not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
                for number in range(_STREAMS)
            ]
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Stop fetching and wait until nothing of it runs. Reading still works."""
        with self._news:
            self._todo.clear()
            self._stop.set()
            self._news.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._stop.clear()

    def _room(self) -> int:
        """Return how much of the cache is for what comes next; the rest is for what is read."""
        return self._cache.limit * 4 // 5

    def _work(self) -> None:
        """Fetch what is to be done until told to stop (a thread)."""
        while True:
            with self._news:
                while not self._todo and not self._stop.is_set():
                    self._news.wait()
                if self._stop.is_set():
                    return
                shard = self._todo.popleft()
            try:
                os.close(self._fetch(shard)[0])
            except Stopped:
                return
            except (DataError, OSError) as error:
                # Whoever reads the shard tries again, and is told.
                _LOGGER.debug("Fetching ahead: %s", error)

    def _open(self, shard: int) -> tuple[int, SampleIndex]:
        """Return a descriptor of a shard's tar, for the caller to close, and its sample index."""
        try:
            return self._cached_or_fetched(shard)
        except OSError as error:
            raise self._unusable(shard, error) from error

    def _unusable(self, shard: int, error: OSError) -> DataError:
        sentence = f"The cached copy of {self._url(shard)} cannot be used ({error.strerror})"
        return not_read(
            error, f"{sentence}: look after {self._cache.folder}, or set another data.cache."
        )

    def _cached_or_fetched(self, shard: int) -> tuple[int, SampleIndex]:
        key = self._key(shard)
        samples = self._samples.get(shard)
        descriptor = self._cache.open(key)
        content = None
        if samples is None and descriptor is not None:
            content = self._cache.samples(key)
        if descriptor is not None and samples is None and content is None:
            os.close(descriptor)  # evicted between the two
            descriptor = None
        if descriptor is None:
            self._raise_if_it_failed(shard)
            try:
                descriptor, content = self._fetch(shard)
            except UnavailableError:
                raise  # it may be there a moment later
            except DataError as error:
                self._failed[shard] = time.monotonic() + _FORGIVE, str(error)
                raise
        if samples is None:
            assert content is not None
            try:
                samples = self._parsed(shard, content)
            except DataError:
                os.close(descriptor)
                raise
            self._samples[shard] = samples
            if len(self._samples) > _INDICES:
                self._samples.popitem(last=False)
        else:
            self._samples.move_to_end(shard)
        return descriptor, samples

    def _parsed(self, shard: int, content: bytes) -> SampleIndex:
        samples = SampleIndex.parse(content, f"of {self._url(shard)}")
        if len(samples) != self.shard_sizes[shard]:
            raise DataError(
                f"The shard {self._url(shard)} has {len(samples)} pictures, and the index of its"
                f" set says {self.shard_sizes[shard]}: copy the set again, or delete"
                f" {self._cache.folder} if its shards were replaced."
            )
        return samples

    def _raise_if_it_failed(self, shard: int) -> None:
        """Do not wait for a thousand samples of one shard, each as long as for the first."""
        until, message = self._failed.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise DataError(message)

    def _fetch(self, shard: int) -> tuple[int, bytes]:
        if os.getpid() != self._process:
            self._begin()  # a lock may have been held by a thread that the fork left behind
        return self._cache.fetch(self._key(shard), partial(self._fill, shard))

    def _fill(self, shard: int, incoming: Incoming) -> None:
        """Fetch a shard and its sample index, and check both against the index of the set."""
        name = self._index.names[shard]
        expected = int(self._index.tar_bytes[shard]), self._index.sha256[shard]
        samples = b""
        if self._is_own(shard):
            url = self._store.base + samples_name(name)
            try:
                samples = read(self._store, samples_name(name))
            except RemoteError as error:
                raise told(url, error) from error
            if sha256_bytes(samples) != self._index.samples_sha256[shard]:
                raise DataError(f"{url} is not the file that index.json means: copy it again.")
        found = fetch_tar(self._store, name, incoming, len(samples), self._stop, expected[0])
        if found != expected:
            raise DataError(
                f"{self._url(shard)} is not the shard that its index means (size or sha256 differ):"
                f" it was damaged or replaced. Copy it again; if it was replaced on purpose, delete"
                f" {self._cache.folder}."
            )
        if not self._is_own(shard):
            samples = samples_of(incoming.tar, self._url(shard)).dump()
        incoming.samples.write_bytes(samples)

    def _is_own(self, shard: int) -> bool:
        """Tell whether the shard has a sample index of ours beside it."""
        return bool(self._index.samples_sha256[shard])

    def _key(self, shard: int) -> str:
        return entry_key(self._url(shard), self._index.sha256[shard] if self._is_own(shard) else "")

    def _url(self, shard: int) -> str:
        return self._store.base + self._index.names[shard]


def entry_key(url: str, sha256: str) -> str:
    """Name a cache entry: where it is from, and what is in it where that is known beforehand."""
    return sha256_text([url, sha256])[:40]


def fetch_tar(
    store: Store,
    name: str,
    incoming: Incoming,
    samples_bytes: int,
    stop: threading.Event,
    expected: int | None = None,
) -> tuple[int, str]:
    """Fetch a tar into the cache, its room reserved first; return its size and sha256."""

    def begin(length: int | None) -> Any:
        if None not in (length, expected) and length != expected:
            raise DataError(
                f"{store.base}{name} has {length} bytes, and its index says {expected}: it was"
                " damaged or replaced. Copy it again."
            )
        incoming.reserve(tar=length or expected or 0, samples=samples_bytes)
        return incoming.open_tar()

    try:
        return fetch(store, name, begin, stop)
    except RemoteError as error:
        raise told(store.base + name, error) from error


def samples_of(tar: Path, url: str) -> SampleIndex:
    """Index a shard of someone else's from its headers."""
    try:
        return index_shard(tar, partial(read_member, tar))[0]
    except DataError as error:
        raise DataError(str(error).replace(str(tar), url)) from error


def told(url: str, error: RemoteError) -> DataError:
    """Say what could not be fetched, and what to do."""
    what = f"{url} cannot be fetched: {error}."
    if error.transport:
        return UnavailableError(f"{what} Check the connection and the server, then resume.")
    return DataError(f"{what} Check that it is there and that the credentials allow to read it.")
