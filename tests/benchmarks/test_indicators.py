"""Rank correlations worked by hand, and one small study from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.indicators import correlations, main, spearman, table


def test_spearman_is_that_of_hand_worked_ranks() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([3, 2, 1], [0.1, 0.2, 0.3]) == pytest.approx(-1)
    # A tie has the mean rank: 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman([5, 5, 6], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_the_table_is_sorted_by_ap_and_ends_with_the_correlations() -> None:
    rows: list[dict[str, Any]] = [
        {"dataset": "cells", "init": f"init{k}", "fraction": 5.0, "val_ap": ap, "indicators": seen}
        for k, (ap, seen) in enumerate(
            [
                (0.2, {"spread": 0.5, "ap": 0.1}),
                (0.4, {"spread": 0.4, "ap": 0.3}),
                (0.3, {"spread": 0.6, "ap": 0.2}),
                (0.1, {"spread": 0.3, "ap": 0.0}),
            ]
        )
    ]
    last = rows.pop()
    found = correlations(rows)
    assert list(found) == ["spread", "ap"] and all(number == 3 for _, number in found.values())
    assert [rho for rho, _ in found.values()] == pytest.approx([-0.5, 1.0])
    lines = table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| init1", "| init2", "| init0"]
    assert lines[5].startswith("| Spearman's rho with AP on val, of these 3 | | | -0.50 |")
    assert "+1.00" in lines[5] and len(lines) == 6
    # On test the order is another one; and of three of four alone, so is that on val.
    for one, ap in zip([*rows, last], (0.4, 0.2, 0.3, 0.1), strict=True):
        one["test_ap"] = ap
    lines = table([*rows, last], alone=["init0", "init1", "init2"]).splitlines()
    assert lines[2].startswith("| init1 | 0.400 | 0.200 | 0.4 |")
    assert [line[:70].partition("| | |")[0] for line in lines[6:]] == [
        "| Spearman's rho with AP on val, of these 4 ",
        "| Spearman's rho with AP on val, of init0, init1, init2 ",
        "| Spearman's rho with AP on test, of these 4 ",
        "| Spearman's rho with AP on test, of init0, init1, init2 ",
    ]
    # Ranks of spread 3 2 4 1: with val 2 4 3 1, with test 4 2 3 1; of the first three 2 1 3.
    rho = [float(line.partition("| | |")[2].split("|")[0]) for line in lines[6:]]
    assert rho == [0.4, -0.5, 0.8, 0.5]


@pytest.mark.slow
def test_every_init_is_fine_tuned_and_measured_once(
    labeled: Path, tmp_path: Path, forked_stages: None
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    keys = ["threads=1", "data.workers=0"]
    arguments = [
        "--data", str(labeled), "--work", str(work), "--results", str(work / "found.json"),
        "--inits", "scratch", "inpainting", "--fractions", "50", "--steps", "1",
        "--image-size", "64", "--batch-size", "2", "--pretrain-minutes", "0.02",
        "--pretrain", "image_size=64", "batch_size=2", "probe.times=0", "report=false",
        "task.neck=n", *keys, "--finetune", *keys,
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = json.loads((work / "found.json").read_text())
    assert [one["init"] for one in rows] == ["inpainting", "scratch"]
    for one in rows:
        assert 0 <= one["test_ap"] <= 1
        assert {"spread", "rankme", "rankme_centred", "ap", "ap_backbone"} <= set(one["indicators"])
    stamp = (work / "found.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (work / "found.json").stat().st_mtime_ns == stamp
