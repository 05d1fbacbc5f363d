"""When a run ends: the budget as progress, the request to stop, and one answer for all ranks."""

from __future__ import annotations

import math
import signal
import time
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed

from groundwork.errors import UsageError
from groundwork.settings import Budget


class Clock:
    """The budget as progress from 0 to 1: a function of the step, or of the time spent."""

    def __init__(self, budget: Budget, pictures: int, batch_size: float, seconds: float) -> None:
        self.limit = None if budget.minutes is None else budget.minutes * 60
        self.steps = budget.steps
        if budget.epochs is not None:
            self.steps = math.ceil(budget.epochs * pictures / batch_size)
        elif budget.samples is not None:
            self.steps = math.ceil(budget.samples / batch_size)
        self.spent = seconds  # before this process
        self.began: float | None = None
        self.agreed = seconds
        self.lap_began = 0.0

    def start(self) -> None:
        """Let the time run."""
        self.began = self.lap_began = time.perf_counter()

    @property
    def length(self) -> str:
        """The budget, for a person."""
        if self.limit is not None:
            return f"{self.limit / 60:g} minutes"
        return f"{self.steps} steps"

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the loop, those before a resume included."""
        return self.spent + (0.0 if self.began is None else time.perf_counter() - self.began)

    def set(self, seconds: float) -> None:
        """Take the time that the main process reads, so that all ranks see one progress."""
        self.agreed = seconds

    def progress(self, step: int) -> float:
        """Return the share of the budget that is used before `step` (0-based) is taken."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.limit is not None
        return min(1.0, self.agreed / self.limit)

    def over(self, step: int) -> bool:
        """Whether the budget is used up."""
        return self.progress(step) >= 1.0

    def crossed(self, before: float, step: int, times: int) -> bool:
        """Whether progress has passed one of `times` even marks since it was `before`."""
        return int(self.progress(step) * times) > int(before * times)

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.perf_counter()
        passed, self.lap_began = now - self.lap_began, now
        return passed


def stop_signals() -> list[signal.Signals]:
    """Return what asks a command to stop: SIGHUP, too, unless it is ignored (nohup)."""
    hung_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else []
    return [signal.SIGTERM, signal.SIGINT, *hung_up]


class StopRequest:
    """Whether one of `stop_signals` came. The loop looks at its next step; a second SIGINT ends."""

    def __init__(self) -> None:
        self.asked = False
        self.before = {number: signal.signal(number, self._note) for number in stop_signals()}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# One rank may have to look through a far store, or at many labels, while the others wait.
_PATIENCE = timedelta(hours=12)


def host_group() -> torch.distributed.ProcessGroup | None:
    """Return a gloo group of all ranks: what is agreed on the host waits for no device.

    None where there is one process. Raises UsageError where machines do not reach each other.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    try:
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise UsageError(
            f"The processes did not meet over gloo ({error}). If none of them failed, a hostname "
            "that stands for 127.0.1.1 is a usual reason: GLOO_SOCKET_IFNAME names the network "
            "interface to use."
        ) from error
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


def meet(group: torch.distributed.ProcessGroup | None) -> None:
    """Wait for all ranks, up to twelve hours: NCCL ends a run whose ranks wait for ten minutes."""
    if group is not None:
        torch.distributed.barrier(group=group)


class Agreed(NamedTuple):
    """What all ranks take for true."""

    stop: bool  # someone asked for it
    seconds: float  # the main process's clock
    news: bool  # someone has something to share
    total: int  # of all ranks


def agree(
    group: torch.distributed.ProcessGroup | None,
    stop: bool,
    seconds: float = 0.0,
    news: bool = False,
    total: int = 0,
) -> Agreed:
    """Give every rank the same answers. `group` is host_group's; None: there is one process."""
    if group is None:
        return Agreed(stop, seconds, news, total)
    # A sum is the main process's clock where the others put in nothing.
    mine = seconds if torch.distributed.get_rank() == 0 else 0.0
    shared = torch.tensor([float(stop), mine, float(news), float(total)], dtype=torch.float64)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.SUM, group=group)
    return Agreed(bool(shared[0]), float(shared[1]), bool(shared[2]), int(shared[3]))


def told_by_main(group: torch.distributed.ProcessGroup | None, value: float) -> float:
    """Give every rank the main process's value."""
    if group is None:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    torch.distributed.broadcast(shared, 0, group=group)
    return float(shared[0])
