"""A folder in which another process trains is left to it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from groundwork.errors import UsageError
from groundwork.run_folder import LOCK
from groundwork.stages import go_on


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another process trains"):
            go_on("pretrain.run", run, [], [])
    assert (run / LOCK).is_file()  # nothing was removed


def test_a_disk_without_locks_and_one_that_locks_what_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = tmp_path / "run", []
    run.mkdir()
    (run / LOCK).touch()

    def none(file: object, how: int) -> None:
        asked.append(file.writable())  # type: ignore[attr-defined]
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr("groundwork.stages.run_command", lambda *_: 0)
    go_on("pretrain.run", run, [], [])
    assert asked == [True]
