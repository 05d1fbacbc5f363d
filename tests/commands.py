"""Programs that tests start: real commands on small data, which end with the test at the latest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = str(ROOT / "pretrain" / "run.py")
FINETUNE = str(ROOT / "finetune" / "run.py")
LAUNCHER = [str(Path(sys.executable).with_name("accelerate")), "launch"]

# Small enough for seconds, large enough for every part of the loop.
TINY = [
    "image_size=64",
    "batch_size=8",
    "log.every_steps=1",
    "data.workers=0",
    "threads=1",
    "probe.labeled=null",
    "probe.times=1",
    "probe.pictures=32",
    "report=false",
]


def environment(*, root: bool = False) -> dict[str, str]:
    """The environment of a run: no other run's settings, no network, one thread to import with.

    With `root` it finds the project's packages, as a script of a test's own needs it.
    """
    mine = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "TORCHELASTIC", "SLURM_"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        mine.pop(name, None)
    return mine | {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "no_network"), *([str(ROOT)] * root)]),
    }


def on_ranks(ranks: int, script: str, *arguments: str) -> list[str]:
    """The command line of a script on several ranks of this machine."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), script, *arguments,
    ]  # fmt: skip


def launch(ranks: int, *arguments: str, script: str = PRETRAIN) -> list[str]:
    """The command line of a run: plain python for one rank, torchrun for several."""
    if ranks > 1:
        return on_ranks(ranks, script, *arguments)
    return [sys.executable, script, *arguments]


@contextmanager
def started(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str] | None = None,
    *,
    output: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[str]]:
    """Start a command in `folder`; at the end it is killed with all that it has started.

    A launcher may have ended before its processes: they are known by their environment.
    """
    mark = uuid.uuid4().hex
    marked = {**(env or environment()), "STARTED_BY_TEST": mark}
    with subprocess.Popen(
        command, cwd=folder, env=marked, text=True, stdout=output, stderr=output
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for one in psutil.process_iter():
                with suppress(psutil.Error):
                    if one.environ().get("STARTED_BY_TEST") == mark:
                        one.kill()


def finished(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str] | None = None,
    *,
    seconds: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` to its end. Raises TimeoutExpired, when nothing of it is left."""
    with started(command, folder, env, output=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run(
    ranks: int, folder: Path, *arguments: str, script: str = PRETRAIN
) -> subprocess.CompletedProcess[str]:
    """Run a stage, or another script, to its end in `folder`, in processes that are forked."""
    env = environment(root=True)
    return forked.finished([script, *arguments], folder, env, seconds=240, ranks=ranks)


def in_folders_of_ranks(folder: Path, script: str) -> str:
    """Write a script that is `script`, each rank in a folder of its own: folder/0, folder/1."""
    path = folder / "in_folders.py"
    path.write_text(
        "import os, runpy, sys\n"
        f"os.chdir(os.path.join({str(folder)!r}, os.environ['RANK']))\n"
        f"sys.path.insert(0, {str(Path(script).parent)!r})\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    return str(path)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until metrics.jsonl has a line of this step."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, "the run ended before it was to be stopped"
        time.sleep(0.05)
    pytest.fail("the run did not get so far in two minutes")


def wait_for_state(folder: Path, state: str) -> None:
    """Wait until status.json says so: `accelerate launch` may end before its process does."""
    end = time.monotonic() + 60
    while status(folder)["state"] != state and time.monotonic() < end:
        time.sleep(0.1)
    assert status(folder)["state"] == state


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, exactly as it was written."""
    return {line["step"]: line["train/loss"] for line in metrics(folder) if "train/loss" in line}


def seen(folder: Path) -> dict[int, list[str]]:
    """Step -> the keys of the whole global batch, ranks in order."""
    batches: dict[int, list[str]] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            batches.setdefault(one["step"], []).extend(one["keys"])
    return batches


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def same_tensors(one: Path, other: Path) -> None:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
