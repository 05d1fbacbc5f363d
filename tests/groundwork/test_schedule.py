"""The schedules: values worked by hand, continuity, bounds, and torch's own as a reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groundwork.config import validate
from groundwork.errors import UsageError
from groundwork.schedule import multiplier
from groundwork.settings import Schedule

SCHEDULES = [
    Schedule(),
    Schedule(warmup=0.0, final=0.1),
    Schedule(warmup=1.0),
    Schedule(name="one_cycle"),
    Schedule(name="one_cycle", rise=0.9, start=0.0, final=4e-6),
    Schedule(name="cyclical"),
    Schedule(name="cyclical", cycles=3, decay=0.5, final=0.25),
    Schedule(name="cyclical", form="cosine", warmup=0.1, cycles=2),
    Schedule(name="constant"),
    Schedule(name="constant", warmup=0.0),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # cos(pi / 3) = 1 / 2, so a third of the way down is (1 + 1 / 2) / 2 = 0.75.
        (
            Schedule(warmup=0.1),
            {0: 0, 0.05: 0.5, 0.1: 1, 0.4: 0.75, 0.55: 0.5, 0.7: 0.25, 1: 0},
        ),
        (Schedule(warmup=0.0, final=0.2), {0: 1, 0.5: 0.6, 1: 0.2}),
        (
            Schedule(name="one_cycle", rise=0.25, start=0.04, final=0.0),
            {0: 0.04, 0.125: 0.52, 0.25: 1, 0.5: 0.75, 0.625: 0.5, 0.75: 0.25, 1: 0},
        ),
        (
            Schedule(name="cyclical", cycles=2, decay=0.5),
            {0: 0, 0.125: 0.5, 0.25: 1, 0.375: 0.5, 0.5: 0, 0.75: 0.5, 1: 0},
        ),
        (
            Schedule(name="cyclical", form="cosine", cycles=2, warmup=0.5),
            {0: 0, 0.25: 0.5, 0.5: 1, 0.625: 0.5, 0.75: 1, 0.875: 0.5, 1: 0},
        ),
        (Schedule(name="constant", warmup=0.5), {0: 0, 0.25: 0.5, 0.5: 1, 1: 1}),
    ],
)
def test_values_worked_by_hand(schedule: Schedule, values: dict[float, float]) -> None:
    for progress, expected in values.items():
        assert multiplier(schedule, progress) == pytest.approx(expected, abs=1e-12), progress


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_multiplier_stays_between_zero_and_one_and_ends_at_final(schedule: Schedule) -> None:
    values = [multiplier(schedule, i / 1000) for i in range(1001)]
    assert min(values) >= 0
    assert max(values) == pytest.approx(1, abs=1e-2)
    assert max(values) <= 1
    if schedule.name != "constant" and schedule.warmup < 1:
        assert values[-1] == pytest.approx(schedule.final, abs=1e-12)
    assert multiplier(schedule, -1) == values[0]
    assert multiplier(schedule, 2) == values[-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_jumps_only_where_cosine_cycles_restart(schedule: Schedule) -> None:
    values = [multiplier(schedule, i / 10_000) for i in range(10_001)]
    jumps = sum(abs(a - b) > 0.01 for a, b in itertools.pairwise(values))
    assert jumps == (schedule.cycles - 1 if schedule.form == "cosine" else 0)


@pytest.mark.parametrize("share", [0.3, 0.45])
def test_one_cycle_equals_the_scheduler_of_torch(share: float) -> None:
    steps = 200
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=steps,
        pct_start=share,
        div_factor=25,
        final_div_factor=1e4,
    )
    # torch counts steps, not shares: its peak is at step share * steps - 1 of steps - 1.
    rise = (share * steps - 1) / (steps - 1)
    schedule = Schedule(name="one_cycle", rise=rise, start=1 / 25, final=1 / 25 / 1e4)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert multiplier(schedule, step / (steps - 1)) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        if step < steps - 1:
            reference.step()


def test_cosine_equals_the_scheduler_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    schedule = Schedule(warmup=0.0, final=0.1)
    for step in range(51):
        expected = optimizer.param_groups[0]["lr"]
        assert multiplier(schedule, step / 50) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    "values", [{"warmup": 1.5}, {"cycles": 0}, {"rise": 1.0}, {"name": "linear"}, {"final": -0.1}]
)
def test_an_impossible_schedule_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        validate(Schedule, values, "schedule.")


def test_settings_and_schedules_do_not_load_torch() -> None:
    program = (
        "import sys; import groundwork.settings, groundwork.schedule;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'numpy')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
