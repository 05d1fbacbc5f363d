"""What changes while a detector trains, as a function of progress."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.plan import Plan
from finetune.recipe import build
from groundwork.errors import UsageError


def plan(**values: Any) -> Plan:
    return Plan(build({"budget": {"epochs": 10}, "batch_size": 8, **values}), 100, 0.0)


def test_mosaic_and_mixing_end_before_the_budget_does() -> None:
    found = plan(augment={"close": 0.2})
    assert [found.stretch(p).mixing for p in (0.0, 0.5, 0.79, 0.81, 1.0)] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert [one.mixing for one in plan(augment={"close": 0.0}).stretches] == [True]
    assert [one.mixing for one in plan(augment={"close": 1.0}).stretches] == [False]


def test_phases_change_batch_and_sizes_and_the_budget_counts_samples() -> None:
    found = plan(
        augment={"close": 0.0},
        phases=[{"until": 0.5, "batch_size": 4, "image_sizes": [128, 160]}],
    )
    first, second = found.stretches
    assert (first.batch_size, first.sizes) == (4, (128, 160))
    assert (second.batch_size, second.sizes) == (8, (640,))
    # 10 epochs of 100 samples, in steps of 4 in one half and 8 in the other: 6 on average.
    assert found.clock.steps == 167


def test_a_neck_is_not_frozen_without_its_backbone() -> None:
    with pytest.raises(UsageError, match=r"freeze\.neck"):
        plan(freeze={"neck": 0.2})
    plan(freeze={"neck": 0.2, "backbone": 0.2})


def test_phases_must_follow_each_other() -> None:
    with pytest.raises(UsageError, match="until"):
        plan(phases=[{"until": 0.5}, {"until": 0.4}])
