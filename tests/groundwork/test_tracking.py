"""metrics.jsonl has every step once, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from groundwork.errors import UsageError
from groundwork.tracking import Tracking, check_trackers


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_go_when_a_run_goes_on(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    first = Tracking(tmp_path, accelerator, (), {}, None)
    for step in range(5):
        first.write(step, {"train/loss": float("nan") if step == 2 else 0.5})
        first.write_samples(step, [f"{step}.jpg"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[2])["train/loss"] is None
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed while it wrote
    second = Tracking(tmp_path, accelerator, (), {}, 3)
    second.write(4, {"train/loss": 0.4})
    assert steps(tmp_path / "metrics.jsonl") == [0, 1, 2, 3, 4]
    assert steps(tmp_path / "samples-0.jsonl") == [0, 1, 2, 3]
    Tracking(tmp_path, accelerator, (), {}, None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_tracker_that_is_unknown_or_missing_is_an_error() -> None:
    with pytest.raises(UsageError, match="not known"):
        check_trackers(("tensorbord",))
    with pytest.raises(UsageError, match="pip install aim"):
        check_trackers(("aim",))
    check_trackers(("tensorboard",))
