"""What both commands share: here, the backbone that --init's file names."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune import recipe as finetuning
from finetune import run as finetune_run
from groundwork.backbones import METADATA_KEY
from groundwork.command import resume_after_restart, tell_failure, with_backbone_of_init
from groundwork.errors import CheckpointError
from pretrain import run as pretrain_run
from tests.full_disk import full_disk


@pytest.fixture
def product(tmp_path: Path) -> Path:
    path = tmp_path / "pretrained.safetensors"
    about = {"format": 1, "backbone": "timm/resnet18.a1_in1k"}
    save_file({"a": np.zeros(1)}, path, metadata={METADATA_KEY: json.dumps(about)})
    return path


def _options(init: Path | None, print_recipe: bool = False) -> argparse.Namespace:
    return argparse.Namespace(init=init, print_recipe=print_recipe)


def test_a_file_names_the_backbone(product: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "groundwork.command"):
        found = with_backbone_of_init(finetuning.resolve(None, []), _options(product))
    assert found.backbone.name == "timm/resnet18.a1_in1k"
    assert f"backbone.name=timm/resnet18.a1_in1k, as {product} says." in caplog.text


def test_a_key_wins_over_the_file(product: Path) -> None:
    recipe = finetuning.resolve(None, ["backbone.name=yolo12s"])
    assert with_backbone_of_init(recipe, _options(product)).backbone.name == "yolo12s"
    recipe = finetuning.resolve(None, ["backbone.name=yolo12n"])  # the default, by name
    assert with_backbone_of_init(recipe, _options(product)).backbone.name == "yolo12n"


def test_files_that_name_none_change_nothing(tmp_path: Path) -> None:
    plain, damaged = tmp_path / "plain.safetensors", tmp_path / "damaged.safetensors"
    save_file({"a": np.zeros(1)}, plain)
    damaged.write_bytes(b"no such thing")
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    for init in (None, plain, damaged, tmp_path / "none.safetensors", tmp_path / "checkpoint.pt"):
        recipe = finetuning.resolve(None, [])
        assert with_backbone_of_init(recipe, _options(init)).backbone.name == "yolo12n"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(finetune_run.main, []), (pretrain_run.main, ["--task", "simclr"])],
)
def test_the_printed_recipe_has_it_and_nothing_else_is_printed(
    main: Callable[[list[str]], int],
    arguments: list[str],
    product: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, "--init", str(product), "--print-recipe"]) == 0
    printed = capsys.readouterr().out
    assert "name: timm/resnet18.a1_in1k" in printed
    assert "says" not in printed


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_command_that_a_launcher_repeats_goes_on(
    count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options() -> argparse.Namespace:
        return argparse.Namespace(
            resume=None, out=tmp_path, recipe="aerial", init=None, task=None, overrides=["seed=1"]
        )

    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for first in (None, "", "0"):  # a first start
        if first is not None:
            monkeypatch.setenv(count, first)
        resume_after_restart(found := options())
        assert found == options()
    monkeypatch.setenv(count, "1")
    resume_after_restart(found := options())
    assert (found.resume, found.out, found.recipe, found.overrides) == (
        str(tmp_path),
        None,
        None,
        [],
    )
    (tmp_path / "recipe.yaml").unlink()  # it ended before it had begun
    resume_after_restart(found := options())
    assert found == options()


def test_a_status_that_has_no_room_hides_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(10):
        tell_failure(tmp_path, CheckpointError("There is no room."))
    assert "There is no room." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
