"""Runs of a study: started as commands, gone on with after a stop, and read when they are done."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from groundwork.command import LAUNCHER
from groundwork.config import read_yaml
from groundwork.errors import DataError, StoppedError, UsageError
from groundwork.run_folder import LOCK

logger = logging.getLogger(__name__)

_STOPPED = 75  # exit code of a stage that was asked to stop, and saved


def noted(run: Path) -> str:
    """Return the command that a run was made by."""
    return (run.parent / f"{run.name}.command.txt").read_text().strip()


def curve(run: Path) -> list[list[float]]:
    """Return [step, minutes, AP on val] of a fine-tuning, minutes by its own speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    batch = read_yaml(run / "recipe.yaml")["batch_size"]
    seconds, before, points = 0.0, 0, []
    for line in lines:
        if speed := line.get("speed/images_per_second"):
            seconds += (line["step"] - before) * batch / speed
            before = line["step"]
        if "eval/ap" in line:
            points.append([float(line["step"]), seconds / 60, line["eval/ap"]])
    return points


def val_ap(run: Path) -> float:
    """Return what a fine-tuning reached on the validation split."""
    return float(json.loads((run / "results.json").read_text())["ap"])


def go_on(module: str, run: Path, flags: list[str], keys: list[str]) -> None:
    """Run a command to its end, from its last checkpoint where there is one.

    Raises StoppedError where it was asked to stop, UsageError where another process trains in its
    folder, DataError where it failed.
    """
    command = [sys.executable, "-m", module, "--out", str(run), *flags, *keys]
    _check_free(run)
    if any((run / "checkpoints").glob("*/manifest.json")):
        command = [sys.executable, "-m", module, "--resume", str(run)]
    elif run.is_dir():  # it was stopped before it had saved anything
        shutil.rmtree(run)
    logger.info("%s", " ".join(command[1:]))
    with (run.parent / f"{run.name}.txt").open("a") as log:
        code = _run(command, log)
    if code == _STOPPED:
        raise StoppedError(f"{module} was stopped and has saved: call the study again to go on.")
    if code:
        raise DataError(f"{module} ended with {code}: see {log.name}.")


def _run(command: list[str], log: TextIO) -> int:
    """Run a stage and return its exit code; what asks the study to stop is passed on to it.

    It stops, too, when the study is killed (groundwork/command.py).
    """
    child = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, LAUNCHER: "study"}
    )
    before = {
        number: signal.signal(number, lambda *_: child.terminate())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_free(run: Path) -> None:
    """Raise UsageError where a process trains in a run folder."""
    if not (run / LOCK).is_file():
        return
    with (run / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process trains in {run}: wait for it, or stop it."
            ) from error


def same_as_before(run: Path, command: Sequence[str]) -> None:
    """Note how a run is made. Raises UsageError where it was made in another way."""
    note, told = run.parent / f"{run.name}.command.txt", " ".join(["python", *command]) + "\n"
    if note.is_file() and note.read_text() != told:
        raise UsageError(
            f"{run} was made by another command ({note}): name another --work, or remove the run."
        )
    note.write_text(told)
