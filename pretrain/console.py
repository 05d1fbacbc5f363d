"""What a person reads while a run goes on: what begins, a bar or lines, what was learned."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from groundwork.data.shards import Samples
from pretrain.clock import Clock
from pretrain.recipe import Recipe

logger = logging.getLogger(__name__)

LEARNED = {
    "probe/knn": "Class-balanced accuracy of nearest neighbours on frozen features",
    "probe/linear": "Class-balanced accuracy of a linear probe on frozen features",
    "probe/rankme": "Effective number of feature dimensions (RankMe)",
    "probe/spread": "Spread of the features (0 collapsed, 1 everywhere)",
}
QUIET_SECONDS = 30.0  # between lines where there is no terminal for a progress bar


class Display:
    """What a person sees while it trains: a bar on a terminal, else a line now and then."""

    def __init__(self, clock: Clock, active: bool) -> None:
        self.clock = clock
        self.active = active
        self.told = 0.0
        total = clock.steps if clock.limit is None else clock.limit
        shown = active and sys.stderr.isatty()
        layout = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]{postfix}"
        self.bar = tqdm(total=total, disable=not shown, bar_format=layout, dynamic_ncols=True)
        self.quiet = active and not shown

    def step(self, step: int) -> None:
        """Move the bar."""
        self.bar.n = step if self.clock.limit is None else min(self.clock.seconds, self.clock.limit)
        self.bar.set_description_str(f"step {step}", refresh=False)
        self.bar.update(0)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Show the loss, the speed and the share of time spent waiting for data."""
        if not self.active:
            return
        text = (
            f"loss {metrics['train/loss']:.4f}  {metrics['speed/images_per_second']:.1f} images/s  "
            f"data wait {metrics['speed/data_wait']:.0%}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        over = self.clock.over(step)
        if self.quiet and (over or time.perf_counter() - self.told > QUIET_SECONDS):
            self.told = time.perf_counter()
            done = self.clock.progress(step)
            left = self.clock.seconds * (1 - done) / done if done else math.nan
            logger.info("step %d  %3.0f%%  %s  %s left", step, 100 * done, text, minutes(left))

    def probe(self, step: int, metrics: Mapping[str, float], alarm: str) -> None:
        """Say what a probe found, and raise the alarm where it has to be."""
        if self.active and metrics:
            tqdm.write(f"probe at step {step}: {_values(metrics)}", file=sys.stdout)
        if alarm:
            logger.warning("COLLAPSE ALARM at step %d. %s", step, alarm)

    def ended(self, step: int, pictures: int, probe: Mapping[str, Any]) -> None:
        """Say what was learned."""
        spent = minutes(self.clock.seconds)
        logger.info("Saw %d pictures in %d steps and %s.", pictures, step, spent)
        if not probe:
            return
        first, last = probe["first"], probe["last"]
        for name, title in LEARNED.items():
            if name in last:
                logger.info("%s: %.3f before, %.3f after.", title, first[name], last[name])

    def close(self) -> None:
        """Leave the terminal clean."""
        self.bar.close()


def announce(
    recipe: Recipe,
    parameters: int,
    samples: Samples,
    clock: Clock,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Say what is about to happen."""
    length = (
        f"{clock.steps} steps" if clock.steps is not None else f"{recipe.budget.minutes} minutes"
    )
    logger.info(
        "%s on %s (%.2f M parameters), %d pictures of %s, %d px, batch %d, %s, %d process(es), %s.",
        recipe.task_name, recipe.backbone.name, parameters / 1e6, len(samples), samples.name,
        recipe.image_size, recipe.batch_size, length, accelerator.num_processes,
        accelerator.device.type,
    )  # fmt: skip
    logger.info("Run folder: %s", folder)


def minutes(seconds: float) -> str:
    """Write a time as minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _values(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{key.removeprefix('probe/')} {value:.4g}" for key, value in metrics.items())
