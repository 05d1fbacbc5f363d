"""What is kept of pictures: found by every process, never half, and done without where it fails."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from groundwork.data.memory import Memory


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "not" / "there")
    assert memory.get(b"a") is None
    memory.put(b"a", b"one")
    memory.put(b"a", b"two")
    memory.put(b"empty", b"")
    assert memory.get(b"a") == b"two" and memory.get(b"empty") == b""
    memory.close()
    assert memory.get(b"a") == b"two"
    assert Memory(tmp_path / "not" / "there").get(b"a") == b"two"
    assert pickle.loads(pickle.dumps(memory)).get(b"a") == b"two"


def _fill(memory: Memory, worker: int) -> None:
    for number in range(50):
        memory.put(f"{worker} {number}".encode(), bytes([worker] * number))
        memory.put(b"shared", bytes([worker]) * 1000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_write_at_once(tmp_path: Path, method: str) -> None:
    memory = Memory(tmp_path)
    memory.put(b"before", b"here")
    memory.close()
    context: Any = multiprocessing.get_context(method)
    workers = [context.Process(target=_fill, args=(memory, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert memory.get(b"before") == b"here"
    for worker in range(3):
        for number in range(50):
            assert memory.get(f"{worker} {number}".encode()) == bytes([worker] * number)
    shared = memory.get(b"shared")
    assert shared is not None and len(shared) == 1000 and len(set(shared)) == 1


def test_a_file_that_cannot_be_used_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = Memory(tmp_path)
    damaged.file.write_bytes(b"no database " * 1000)
    blocked = Memory(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("in the way")
    for memory in (damaged, blocked):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert memory.get(b"a") is None
            memory.put(b"a", b"one")
            assert memory.get(b"a") is None
        assert len(caplog.records) == 1 and str(memory.file) in caplog.text  # said once


def test_a_lock_that_is_not_let_go_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("groundwork.data.memory._WAIT", 0.1)
    memory = Memory(tmp_path)
    memory.put(b"a", b"one")
    with caplog.at_level(logging.WARNING), sqlite3.connect(memory.file) as other:
        other.execute("BEGIN EXCLUSIVE")
        memory.put(b"b", b"two")
        memory.put(b"b", b"three")
        other.rollback()
    assert len(caplog.records) == 1
    assert memory.get(b"a") == b"one" and memory.get(b"b") is None
    memory.put(b"b", b"four")  # it is used again once the lock is gone
    assert Memory(tmp_path).get(b"b") == b"four"


def _used_after_a_fork(memory: Memory, answer: Any) -> None:
    try:
        memory.get(b"a")
    except RuntimeError as error:
        answer.send(str(error))


def test_what_is_open_must_not_go_through_a_fork(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.put(b"a", b"one")
    context: Any = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_used_after_a_fork, args=(memory, there))
    child.start()
    child.join(60)
    assert here.poll(0) and "went through a fork" in here.recv()
