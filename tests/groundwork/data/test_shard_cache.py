"""The cache of fetched shards: whole entries only, filled once, and nothing left by the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from groundwork.data.shard_cache import Incoming, ShardCache
from groundwork.errors import DataError


def fill(incoming: Incoming, size: int = 100) -> None:
    incoming.reserve(tar=size, samples=2)
    with incoming.open_tar() as file:
        file.write(b"x" * size)
    incoming.samples.write_bytes(b"{}")


def names(cache: ShardCache, folder: str = "entries") -> list[str]:
    return sorted(path.name for path in (cache.folder / folder).iterdir())


def fetched(cache: ShardCache, key: str, size: int = 100) -> bytes:
    descriptor, _ = cache.fetch(key, lambda incoming: fill(incoming, size))
    content = os.pread(descriptor, 1 << 20, 0)
    os.close(descriptor)
    return content


def test_an_entry_is_filled_once_however_many_want_it(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    filled = []

    def slowly(incoming: Incoming) -> None:
        filled.append(1)
        time.sleep(0.1)
        fill(incoming)

    def get() -> None:
        descriptor, samples = cache.fetch("one", slowly)
        assert samples == b"{}"
        os.close(descriptor)

    threads = [threading.Thread(target=get) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1
    assert names(cache, "incoming") == []


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)

    def fail(incoming: Incoming) -> None:
        fill(incoming)
        raise DataError("damaged")

    with pytest.raises(DataError, match="damaged"):
        cache.fetch("one", fail)
    assert names(cache) == names(cache, "incoming") == []
    assert cache.open("one") is None
    assert fetched(cache, "one") == b"x" * 100


def test_an_evicted_entry_can_be_read_to_the_end_by_who_has_it_open(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 250)
    descriptor, _ = cache.fetch("one", fill)
    fetched(cache, "two", 200)
    assert names(cache) == ["two"]
    assert os.pread(descriptor, 1000, 0) == b"x" * 100
    os.close(descriptor)


def hang(cache: ShardCache, ready: Path) -> None:
    def never(incoming: Incoming) -> None:
        incoming.reserve(tar=900)
        ready.touch()
        time.sleep(60)

    cache.fetch("one", never)


def test_a_killed_fetch_holds_neither_the_lock_nor_the_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("fork").Process(target=hang, args=(cache, ready))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(names(cache, "incoming")) == 1
    assert fetched(cache, "one", 900) == b"x" * 900
    assert names(cache, "incoming") == []


def test_who_finds_no_room_waits_for_the_others(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    may_end = threading.Event()
    began = threading.Event()

    def long(incoming: Incoming) -> None:
        incoming.reserve(tar=900)
        began.set()
        may_end.wait(10)
        fill(incoming, 900)

    first = threading.Thread(target=lambda: os.close(cache.fetch("a", long)[0]))
    first.start()
    began.wait(10)
    second = threading.Thread(target=lambda: fetched(cache, "b", 800))
    second.start()
    time.sleep(0.2)
    assert names(cache) == []
    may_end.set()
    first.join(10)
    second.join(10)
    assert names(cache) == ["b"]  # in the place of a


def test_wanted_entries_go_last_and_the_first_of_them_last_of_all(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 500)
    for key in ("a", "b", "c"):
        fetched(cache, key)
        time.sleep(0.01)
    cache.want(["a", "b"])
    fetched(cache, "d", 280)
    assert names(cache) == ["a", "b", "d"]
    fetched(cache, "e", 380)
    assert names(cache) == ["a", "e"]
    cache.want([])
    time.sleep(0.01)
    fetched(cache, "f", 490)
    assert names(cache) == ["f"]


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"set data\.cache"):
        ShardCache(tmp_path / "file" / "cache", 10)
