"""What a run tells while it trains: metrics.jsonl always, other trackers through Accelerate.

metrics.jsonl holds one JSON object a line, each with `step`; it is written line by line, and on
resume the lines after the checkpoint's step are dropped, so that every step is there once. A line
that cannot be written (a full disk) is left out with a warning, and training goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from groundwork.errors import UsageError
from groundwork.files import Journal, write_file


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UsageError for a tracker that is unknown or not installed.

    Accelerate drops one that is not installed without a word.
    """
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UsageError(f"log.trackers={name} is not known; these are: {', '.join(known)}.")
        if name not in available:
            raise UsageError(f"log.trackers={name} is not installed: pip install {name}.")


class Window:
    """Sums since the last line of metrics, tensors among them, which are read once a line."""

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self._sums: dict[str, Any] = dict(sums or {})

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum; waits for no device."""
        self._sums[name] = self._sums.get(name, 0.0) + value

    def plain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the sums as numbers, for a checkpoint: their means over the ranks.

        Every rank goes on from the same sums, so that the next line's means are over all ranks.
        """
        names = sorted(self._sums)
        if accelerator.num_processes == 1 or not names:
            return {name: float(self._sums[name]) for name in names}
        sums = torch.stack(
            [torch.as_tensor(self._sums[n], dtype=torch.float32).cpu() for n in names]
        )
        means = accelerator.reduce(sums.to(accelerator.device), "mean").tolist()
        return dict(zip(names, means, strict=True))

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Turn the sums into means over their steps and over the ranks."""
        sums = self._sums
        steps, seconds = float(sums["steps"]), float(sums["seconds"])
        names = [name for name in sorted(sums) if name.startswith("train/")]
        totals = torch.stack([torch.as_tensor(sums[n], dtype=torch.float32).cpu() for n in names])
        means = accelerator.reduce((totals / steps).to(accelerator.device), "mean").tolist()
        metrics = dict(zip(names, means, strict=True))
        if sums.get("counted"):
            metrics["train/gradient_norm"] = float(sums["gradient_norm"]) / float(sums["counted"])
        metrics["speed/images_per_second"] = float(sums["images"]) / max(seconds, 1e-9)
        metrics["speed/data_wait"] = float(sums["wait"]) / max(seconds, 1e-9)
        metrics["speed/worker_seconds"] = float(sums["worker"]) / steps
        return metrics


class Tracking:
    """Writes metrics of the main process to metrics.jsonl and to Accelerate's trackers."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        trackers: tuple[str, ...],
        recipe: Mapping[str, Any],
        after_step: int | None,
    ) -> None:
        self.accelerator = accelerator
        self.trackers = bool(trackers)
        self._metrics = Journal(folder / "metrics.jsonl")
        self._samples = Journal(folder / f"samples-{accelerator.process_index}.jsonl")
        if accelerator.is_main_process:
            for path in [self._metrics.path, *folder.glob("samples-*.jsonl")]:
                kept = [] if after_step is None else _lines_until(path, after_step)
                write_file(path, "".join(kept))
        if trackers:
            accelerator.init_trackers("groundwork", config=_flat(recipe))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step (the main process alone does). NaN is written as null."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": step} | {
            key: value if math.isfinite(value) else None for key, value in metrics.items()
        }
        self._metrics.add([json.dumps(line)])
        if self.trackers:
            self.accelerator.log(dict(metrics), step=step)

    def write_samples(self, step: int, keys: Sequence[str]) -> None:
        """Record which samples this rank saw in one step, in samples-<rank>.jsonl."""
        self._samples.add([json.dumps({"step": step, "keys": list(keys)})])

    def close(self) -> None:
        """Finish the trackers."""
        if self.trackers:
            # And not end_training, which ends the process group, too.
            for tracker in self.accelerator.trackers:
                tracker.finish()


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the last line of a killed process may be cut
    return kept


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = (
                value if isinstance(value, int | float | str | bool) else str(value)
            )
    return flat
