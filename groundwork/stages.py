"""Stages that a program of ours starts as commands, and goes on with after a stop."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from groundwork.clock import stop_signals
from groundwork.command import LAUNCHER, has_checkpoint, status_of
from groundwork.errors import DataError, StoppedError, UsageError
from groundwork.files import write_file
from groundwork.run_folder import LAST, LOCK

logger = logging.getLogger(__name__)

# Keys that say how a stage runs and not what it learns: they may be others when it goes on.
HARMLESS = (
    "data.workers=", "data.cache", "data.max_bad_fraction=", "data.on_error=", "threads=", "log.",
    "checkpoint.", "report=",
)  # fmt: skip


def go_on(
    module: str,
    run: Path,
    flags: Sequence[str],
    keys: Sequence[str],
    *,
    launch: str | None = None,
    log: Path | None = None,
) -> None:
    """Run a stage, pretrain.run or finetune.run, to its end; from its last checkpoint if it can.

    A stage that goes on has the keys that it began with, but for those of HARMLESS.
    `launch` is a launcher that takes `-m module`, such as "accelerate launch --num_processes 8";
    None is this Python. What the stage says goes to `log`, or where ours goes.

    Raises StoppedError where it, or this process, was asked to stop, UsageError where another
    process trains in its folder, DataError where it failed.
    """
    arguments = ["--out", str(run), *flags, *keys]
    if not _is_free(run):
        raise UsageError(f"Another process trains in {run}: wait for it, or stop it.")
    if has_checkpoint(run):
        # A teacher's file may have moved with the folder of the runs.
        free = (*HARMLESS, "task.weights=")
        arguments = ["--resume", str(run), *(key for key in keys if key.startswith(free))]
        (run / "status.json").unlink(missing_ok=True)  # which tells of the run before
    elif run.is_dir():  # it was stopped before it had saved anything
        if (file := _product(run)) is not None:  # the disk was full for checkpoints
            raise UsageError(
                f"{run} has no checkpoint to go on from, but {file.name}: keep that file (--init "
                "takes it), and remove the folder."
            )
        shutil.rmtree(run)
    command = [*([sys.executable] if launch is None else shlex.split(launch)), "-m", module]
    logger.info("%s", " ".join(["-m", module, *arguments]))
    try:
        code = run_command([*command, *arguments], log)
    except StoppedError:
        while not _is_free(run):  # a launcher may end before what it has launched
            time.sleep(0.5)
        raise
    said = status_of(run) if code else {}
    if code == StoppedError.exit_code or said.get("state") == "stopped":
        raise StoppedError(f"{module} was stopped and has saved: call this again to go on.")
    if code:
        more = "" if log is None else f" See {log}."
        why = f": {said['message']}" if said.get("message") else "."
        raise DataError(f"{module} in {run} ended with {code}{why}{more}")


def check(module: str, flags: Sequence[str], keys: Sequence[str]) -> None:
    """Raise UsageError where a stage would not take its recipe or keys; it is not run."""
    command = [sys.executable, "-m", module, *flags, *keys, "--print-recipe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{module} {' '.join([*flags, *keys])}: {done.stderr.strip()}")


def run_command(command: Sequence[str], log: Path | None = None) -> int:
    """Run a command and return its exit code; what asks this process to stop is passed on to it.

    A stage of ours stops, too, when this process is killed (groundwork/command.py); under a
    launcher it is the launcher that such a stage watches.
    Raises StoppedError when the command has ended, where this process was asked to stop.
    """
    output = None if log is None else log.open("a")
    child = subprocess.Popen(
        command,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env={**os.environ, LAUNCHER: "stages"},
    )
    asked = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        child.terminate()

    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if output is not None:
            output.close()
    if asked:
        raise StoppedError("Stopped, as it was asked to: call this again to go on.")
    return code


def _is_free(run: Path) -> bool:
    """Tell whether no process trains in a run folder."""
    if not (run / LOCK).is_file():
        return True
    try:
        with (run / LOCK).open("r+") as file:  # NFS locks only what can be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk that has no locks
        return True
    return True


def same_as_before(run: Path, command: Sequence[str], start: Path | None = None) -> None:
    """Note how a run is made, and from which file it starts, by its content.

    Raises UsageError where the run has learned something and was made in another way. Keys of
    HARMLESS may be others, and so may the folder that the runs are in.
    """
    note, told = run.parent / f"{run.name}.command.txt", " ".join(["python", *command]) + "\n"
    if start is not None:
        with start.open("rb") as opened:
            told += f"# from {hashlib.file_digest(opened, 'sha256').hexdigest()}\n"
    before = note.read_text() if note.is_file() else ""
    if not before.strip() or not _has_learned(run):
        write_file(note, told)
        return
    then, now = _what_matters(before), _what_matters(told)
    if then != now:
        gone, new = (
            " ".join(w for w in one if w not in two) for one, two in ((then, now), (now, then))
        )
        raise UsageError(
            f"{run} was made by another command, or from another start (then: {gone or 'as now'}; "
            f"now: {new or 'as then'}; {note}): name another folder, or remove the run, and those "
            "that came of it."
        )


def _has_learned(run: Path) -> bool:
    """Tell whether a run holds what would be lost with it, or is being trained."""
    done = status_of(run).get("state") == "done"
    return done or has_checkpoint(run) or _product(run) is not None or not _is_free(run)


def _product(run: Path) -> Path | None:
    """Return the file of what a stage has made, if it is there: at its end, or so far."""
    files = (run / name for name in ("pretrained.safetensors", "detector.safetensors", LAST))
    return next((file for file in files if file.is_file()), None)


def _what_matters(note: str) -> list[str]:
    """Return the words of a note but for HARMLESS keys, paths in the runs' folder told from it."""
    words = note.split()
    home = str(Path(words[words.index("--out") + 1]).parent) + os.sep
    kept = [word.rpartition("=") for word in words if not word.startswith(HARMLESS)]
    return [f"{key}{equals}{value.removeprefix(home)}" for key, equals, value in kept]
