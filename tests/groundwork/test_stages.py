"""How stages go on, when their folder is left alone, and what makes another run."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from groundwork.command import begun_with
from groundwork.errors import UsageError
from groundwork.run_folder import LOCK
from groundwork.stages import go_on, same_as_before


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


def test_what_a_killed_first_save_has_left_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run_command(command: list[str], log: Path | None) -> int:
        ran.append(command[3:])
        return 0

    monkeypatch.setattr("groundwork.stages.run_command", run_command)
    run, half = tmp_path / "run", tmp_path / "run" / "checkpoints" / ".tmp-500"
    half.mkdir(parents=True)
    (half / "manifest.json").touch()
    keys = ["data.workers=3", "optim.lr=0.1"]
    (run / "init.txt").write_text(f"{tmp_path / 'weights'}\n")
    (tmp_path / "weights").touch()
    assert begun_with(run) == tmp_path / "weights"
    go_on("pretrain.run", run, ["--recipe", "aerial"], keys)
    assert ran.pop() == ["--out", str(run), "--recipe", "aerial", *keys] and not run.exists()
    whole = run / "checkpoints" / "step-500"
    whole.mkdir(parents=True)
    (whole / "manifest.json").touch()
    go_on("pretrain.run", run, ["--recipe", "aerial"], keys)
    assert ran.pop() == ["--resume", str(run), "data.workers=3"]
    # What has been learned without any checkpoint is not thrown away.
    shutil.rmtree(whole)
    (run / "best.safetensors").touch()  # of a run that was killed before its first checkpoint
    (run / "pretrained.safetensors").touch()
    with pytest.raises(UsageError, match=r"pretrained\.safetensors: keep that file"):
        go_on("pretrain.run", run, [], [])
    (run / "pretrained.safetensors").rename(run / "last.safetensors")
    with pytest.raises(UsageError, match=r"last\.safetensors: keep that file"):
        go_on("pretrain.run", run, [], [])
    (run / "last.safetensors").unlink()
    go_on("pretrain.run", run, [], [])
    assert not run.exists()


def test_only_what_changes_what_is_learned_makes_another_run(tmp_path: Path) -> None:
    def note(folder: Path, *keys: str, start: Path | None = None) -> None:
        same_as_before(folder / "run", ["--out", str(folder / "run"), *keys], start)

    start = tmp_path / "start"
    start.write_text("weights")
    (tmp_path / "a" / "run").mkdir(parents=True)
    # What came to nothing, here since it was asked for too much, is begun anew with other keys.
    note(tmp_path / "a", "seed=1", "batch_size=999", start=start)
    note(tmp_path / "a", "seed=1", start=start)
    (tmp_path / "a" / "run" / "detector.safetensors").touch()
    note(tmp_path / "a", "seed=1", "data.workers=2", start=start)
    note(
        tmp_path / "a",
        "seed=1",
        "data.workers=4",
        "checkpoint.keep=1",
        "log.samples=true",
        start=start,
    )
    (tmp_path / "a").rename(tmp_path / "b")
    note(tmp_path / "b", "seed=1", start=start)
    with pytest.raises(UsageError, match=r"then: seed=1; now: seed=2 task\.rotate=0"):
        note(tmp_path / "b", "seed=2", "task.rotate=0", start=start)
    start.write_text("others")
    with pytest.raises(UsageError, match=r"then: [0-9a-f]{64}; now: [0-9a-f]{64}"):
        note(tmp_path / "b", "seed=1", start=start)
