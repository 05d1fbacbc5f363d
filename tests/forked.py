"""Commands in processes that are forked from one that has imported torch: a start takes milliseconds.

A command of a stage imports for seconds before it does anything, and tests start hundreds. Here it
has a process of its own all the same, with its own environment, folder, output, signals and exit
code. What is of starting itself, such as what a command imports and how launchers call it, is
tested with the real command line (tests/commands.py).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from unittest import mock

import psutil

# What every run of a stage imports, itself or by what it imports.
PRELOADED = ["finetune.loop", "lightly.loss", "lightly.models.modules", "pretrain.loop", __name__]


def _enter(
    command: Sequence[str], folder: Path, env: Mapping[str, str], told: Sequence[Path]
) -> None:
    """Become `python *command` in `folder`. Raises SystemExit, as the script does."""
    for stream, path in zip((1, 2), told, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(command)
    sys.path.insert(0, os.path.dirname(command[0]))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own processes leave them out


def finished(
    command: Sequence[str], folder: Path, env: Mapping[str, str], *, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run `python *command` in `folder` to its end. Raises TimeoutExpired, when it is gone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        told = [Path(name, "out"), Path(name, "err")]
        for path in told:
            path.touch()
        process = context.Process(target=_enter, args=(command, folder, env, told))
        with mock.patch.dict(os.environ, env, clear=True):  # for the first: what it is forked from
            process.start()
        try:
            process.join(seconds)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(list(command), seconds)
        finally:
            with suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
        out, err = (path.read_text() for path in told)
    return subprocess.CompletedProcess(list(command), process.exitcode, out, err)
