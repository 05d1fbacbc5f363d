"""Files are there whole or not at all; what a run can do without never ends it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from groundwork.files import Journal, copy_file, optional, replacing, write_file
from tests.full_disk import full_disk


def test_a_small_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_file(path, "one")
    write_file(path, "zw\u00f6lf")
    assert path.read_text(encoding="utf-8") == "zw\u00f6lf"
    write_file(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(tmp_path) == ["status.json"]  # noqa: PTH208


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path, large = tmp_path / "kept", tmp_path / "large"
    path.write_text("old")
    large.write_bytes(bytes(100_000))
    with full_disk(10_000):
        with pytest.raises(OSError, match="large"):
            write_file(path, bytes(100_000))
        with pytest.raises(OSError, match="large"):
            copy_file(large, path)
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "large"]
    copy_file(large, path)
    assert path.read_bytes() == bytes(100_000)


def test_a_line_that_has_no_room_is_left_out_whole_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.add(["one", "two"])
    with full_disk(20):
        for _ in range(3):
            journal.add(["a line that is longer than what is left"])
        assert journal.path.read_text() == "one\ntwo\n"
        journal.add(["three"])
    journal.add(["four"])
    assert journal.path.read_text() == "one\ntwo\nthree\nfour\n"
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "metrics.jsonl could not be written" in told[0]
    with full_disk(20):
        journal.add(["once more without room"])
    assert len(caplog.records) == 2


def test_a_picture_that_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with optional(tmp_path / "sheet.png"):
        (tmp_path / "nowhere" / "sheet.png").write_bytes(b"")
    assert "sheet.png could not be written (No such file or directory)" in caplog.text
