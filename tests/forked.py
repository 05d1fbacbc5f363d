"""Commands in processes forked from one that has imported torch: they start in milliseconds.

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
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import psutil

# What every run of a stage imports, itself or by what it imports.
PRELOADED = ["finetune.loop", "lightly.loss", "lightly.models.modules", "pretrain.loop", __name__]
_PATIENCE = 20.0  # seconds that a rank may go on without another that has failed


def _enter(
    command: Sequence[str], folder: Path, env: Mapping[str, str], told: Sequence[Path]
) -> None:
    """Become `python *command` in `folder`. Raises SystemExit, as the program does."""
    for stream, path in zip((1, 2), told, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own processes leave them out


def together(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], folder: Path, *, seconds: float
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python *command` of each in `folder`, with its environment, all at once to their end.

    When one has failed, the others are killed soon. Raises TimeoutExpired, when all are gone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ExitStack() as stack:
        told, processes = [], []
        for command, env in commands:
            name = stack.enter_context(tempfile.TemporaryDirectory())
            told.append([Path(name, "out"), Path(name, "err")])
            for path in told[-1]:
                path.touch()
            process = context.Process(target=_enter, args=(command, folder, env, told[-1]))
            with mock.patch.dict(os.environ, env, clear=True):  # of the first one: the server's
                process.start()
            processes.append(process)
            stack.callback(_end, process)
        end, failed = time.monotonic() + seconds, False
        while (codes := [process.exitcode for process in processes]).count(None):
            if any(codes) and not failed:
                end, failed = min(end, time.monotonic() + _PATIENCE), True
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        if None in codes and not failed:
            raise subprocess.TimeoutExpired(list(commands[0][0]), seconds)
        for process in processes:
            _end(process)
        return [
            subprocess.CompletedProcess(
                list(command),
                -signal.SIGKILL if code is None else code,
                out.read_text(),
                err.read_text(),
            )
            for (command, _), code, (out, err) in zip(commands, codes, told, strict=True)
        ]


def finished(
    command: Sequence[str], folder: Path, env: Mapping[str, str], *, seconds: float, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run `python *command` to its end, on several ranks as torchrun has them, of a machine.

    What it says is that of all ranks, one after the other; its exit code that of the first that
    failed. Raises TimeoutExpired.
    """
    if ranks == 1:
        return together([(command, env)], folder, seconds=seconds)[0]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    world = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip
    own = [{**env, **world, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(ranks)]
    done = together([(command, one) for one in own], folder, seconds=seconds)
    return subprocess.CompletedProcess(
        list(command),
        next((one.returncode for one in done if one.returncode), 0),
        "".join(one.stdout for one in done),
        "".join(one.stderr for one in done),
    )


def _end(process: ForkServerProcess) -> None:
    """Kill a process with what it has started, unless it has ended."""
    if process.exitcode is None:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
    process.join()
