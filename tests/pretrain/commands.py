"""Small runs of the real command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

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


def environment() -> dict[str, str]:
    """The environment of a run: no other run's settings, and one thread to import with."""
    mine = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "TORCHELASTIC", "SLURM_"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        mine.pop(name, None)
    return mine | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launch(ranks: int, *arguments: str) -> list[str]:
    """The command line of a run: plain python for one rank, torchrun for several."""
    script = str(ROOT / "pretrain" / "run.py")
    if ranks == 1:
        return [sys.executable, script, *arguments]
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-port", str(free_port()), script, *arguments,
    ]  # fmt: skip


def run(ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run to the end in `folder`."""
    return subprocess.run(
        launch(ranks, *arguments),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, exactly as it was written."""
    return {line["step"]: line["train/loss"] for line in metrics(folder) if "train/loss" in line}


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found
