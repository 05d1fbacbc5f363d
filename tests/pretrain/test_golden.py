"""A change that should not alter numerics leaves the first ten losses of every task alone."""

from __future__ import annotations

import json

import pytest

from pretext_tasks import TASKS
from tests.record_golden import GOLDEN, first_losses


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_first_ten_losses_are_golden(task: str) -> None:
    golden = json.loads((GOLDEN / f"losses_{task}.json").read_text())
    assert len(golden) == 10
    # Rounding differs between kinds of CPU and grows from step to step: on another kind than the
    # recorded one 1 % at the third loss and 10 % at the tenth (LOG.md). The first is of a forward
    # alone, the second of one update.
    found = first_losses(task)
    assert found[:2] == pytest.approx(golden[:2], rel=1e-3, abs=1e-4)
    assert found == pytest.approx(golden, rel=0.15, abs=1e-3)
