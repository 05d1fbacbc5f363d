"""What both stages' pages have in common: whose run a folder is, and what a failing page ends."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import finetune.report
import pretrain.report
from groundwork.command import tell_page

COMMANDS = {"finetune": finetune.report.main, "pretrain": pretrain.report.main}
RECIPES = {"finetune": "detector: {}\n", "pretrain": "task:\n  name: byol\n"}


@pytest.mark.parametrize(("stage", "other"), [("finetune", "pretrain"), ("pretrain", "finetune")])
def test_a_folder_that_is_no_run_or_the_other_stages_is_told(
    stage: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[stage]([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPES[other])
    (tmp_path / "metrics.jsonl").write_text("")
    assert COMMANDS[stage]([str(tmp_path)]) == 2
    told = f"is a run of {other}/run.py: `python -m {other}.report {tmp_path}`"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("fails", [ValueError("no backend"), ImportError("no matplotlib")])
def test_a_page_that_fails_ends_no_run(
    fails: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(folder: Path) -> Path:
        raise fails

    with caplog.at_level(logging.WARNING):
        tell_page("finetune", tmp_path, write)
    assert f"Try `python -m finetune.report {tmp_path}`" in caplog.text
