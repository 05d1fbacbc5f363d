"""When a run ends, and what asks it to."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from groundwork.clock import Agreed, Clock, StopRequest, agree, host_group, meet
from groundwork.errors import UsageError
from groundwork.settings import Budget


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(steps=7), 7),
        (Budget(samples=65), 9),  # 65 / 8, rounded up
        (Budget(epochs=2), 6),  # 44 / 8, rounded up
        (Budget(epochs=0.5), 2),
    ],
)
def test_a_budget_is_a_number_of_steps(budget: Budget, steps: int) -> None:
    clock = Clock(budget, pictures=22, batch_size=8, seconds=0.0)
    assert clock.steps == steps
    assert clock.progress(0) == 0.0
    assert not clock.over(steps - 1)
    assert clock.over(steps)


def test_minutes_go_on_after_a_resume() -> None:
    clock = Clock(Budget(minutes=2), pictures=22, batch_size=8, seconds=90.0)
    assert clock.progress(10**6) == 0.75
    clock.set(120.0)
    assert clock.over(1)


def test_even_marks_are_crossed_once_each() -> None:
    clock = Clock(Budget(steps=10), pictures=22, batch_size=8, seconds=0.0)
    crossed = [
        step for step in range(1, 11) if clock.crossed(clock.progress(step - 1), step, times=4)
    ]
    assert crossed == [3, 5, 8, 10]
    assert not any(clock.crossed(step / 10, step + 1, times=0) for step in range(10))


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_handlers_are_given_back(first: signal.Signals) -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # by nohup, perhaps
    before = signal.getsignal(first)
    request = StopRequest()
    assert not request.asked
    os.kill(os.getpid(), first)
    assert request.asked
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    request.restore()
    assert signal.getsignal(first) == before
    signal.signal(signal.SIGHUP, ignored)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.asked
        request.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_process_agrees_with_itself() -> None:
    assert agree(None, True, 3.5, False, 2) == Agreed(True, 3.5, False, 2)


def test_one_process_waits_for_none_and_processes_that_do_not_meet_are_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert host_group() is None
    meet(None)

    def refuse(**_: object) -> None:
        raise RuntimeError("connect [127.0.1.1]:1234: refused")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", refuse)
    with pytest.raises(UsageError, match=r"127\.0\.1\.1.*GLOO_SOCKET_IFNAME"):
        host_group()
