"""What is told at the start and at the end of a run."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest

from groundwork.command import find_run
from groundwork.errors import UsageError
from pretrain.console import held_out_in, tell_probe


def test_held_out_pictures_beside_the_training_ones_are_found(tmp_path: Path) -> None:
    for folder in ("set/images/train", "set/images/val", "set/images/test", "plain/a"):
        (tmp_path / folder).mkdir(parents=True)
    assert held_out_in(tmp_path / "set") == held_out_in(tmp_path / "set" / "images")
    assert held_out_in(tmp_path / "set") == ["val", "test"]
    assert held_out_in(tmp_path / "set" / "images" / "train") == []
    assert held_out_in(tmp_path / "plain") == held_out_in(tmp_path / "nothing") == []


def test_a_start_that_failed_is_not_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, state in (("good", "stopped"), ("mistyped", "failed")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("task: {name: byol}\n")
        (folder / "status.json").write_text(json.dumps({"state": state}))
        (folder / "metrics.jsonl").write_text("{}\n" if name == "good" else "")
    assert find_run("", "pretrain")[1] == Path("runs/good")
    (tmp_path / "runs" / "good" / "recipe.yaml").unlink()
    with pytest.raises(UsageError, match="there is no run in"):
        find_run("", "pretrain")


def test_a_terminal_that_is_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    tell_probe(3, {"probe/ap": 0.5}, "")
