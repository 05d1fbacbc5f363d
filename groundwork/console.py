"""What a person reads while a run goes on: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import math
import sys
import time

from tqdm import tqdm

from groundwork.clock import Clock

logger = logging.getLogger(__name__)

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

    def close(self) -> None:
        """Leave the terminal clean."""
        self.bar.close()


def minutes(seconds: float) -> str:
    """Write a time as minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
