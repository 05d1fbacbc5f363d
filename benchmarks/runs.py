"""Runs of a study: started as commands, and read when they are done."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from groundwork import stages
from groundwork.config import read_yaml
from groundwork.data.labels import open_labeled
from groundwork.errors import GroundworkError


def noted(run: Path) -> str:
    """Return the command that a run was made by."""
    return (run.parent / f"{run.name}.command.txt").read_text().splitlines()[0]


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
    """Run a stage to its end; what it says is in a file beside its folder."""
    stages.go_on(module, run, flags, keys, log=run.parent / f"{run.name}.txt")


def drawn(root: Path, cache: Path, fraction: float, seed: int) -> list[str]:
    """Draw so many percent of a set's training pictures by a seed, one at least; sorted names."""
    samples = open_labeled(str(root), "train", cache=cache, cache_bytes=10**9)
    names = sorted(
        Path(samples.read(shard, index).source).name
        for shard, size in enumerate(samples.shard_sizes)
        for index in range(int(size))
    )
    samples.close()
    names.sort(key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return sorted(names[: max(1, math.floor(len(names) * fraction / 100))])


def told(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, with one sentence for what stopped it."""
    try:
        return command()
    except GroundworkError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
