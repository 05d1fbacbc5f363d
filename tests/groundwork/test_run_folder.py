"""Which of the best weights so far are those of the run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from finetune.recipe import Recipe
from groundwork.backbones import build_backbone
from groundwork.backbones.product import read_product, save_product
from groundwork.checkpoint import Checkpoint
from groundwork.errors import UsageError
from groundwork.run_folder import BEST, Run, bring_best, prepare_run
from groundwork.settings import Guard


def _run(folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, Accelerator(cpu=True), Guard(), resumed=True)


def _best(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    save_product(folder / BEST, {"backbone": build_backbone("timm/test_resnet")}, {"step": step})


def _saved(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / f"step-{step}", step, {}, {})


@pytest.mark.parametrize("step", [30, 40])
def test_the_best_weights_stay_or_come_along(tmp_path: Path, step: int) -> None:
    _best(tmp_path / "a", step)
    saved = _saved(tmp_path / "a", 40)
    assert bring_best(saved, _run(tmp_path / "a"), 0.5) == 0.5
    assert bring_best(saved, _run(tmp_path / "b"), 0.5) == 0.5
    assert read_product(tmp_path / "b" / BEST)[1]["step"] == step


def test_weights_that_another_measure_chose_are_not_the_best(tmp_path: Path) -> None:
    _best(tmp_path / "a", 30)
    saved = _saved(tmp_path / "a", 40)
    assert bring_best(saved, _run(tmp_path / "a"), 0.5, "probe/knn") == -1
    _, about = read_product(tmp_path / "a" / BEST)
    known = next(key for key in about if key != "step")
    assert bring_best(saved, _run(tmp_path / "a"), 0.5, known) == 0.5


def test_weights_of_a_later_step_are_of_a_course_that_is_left(tmp_path: Path) -> None:
    _best(tmp_path / "a", 41)
    saved = _saved(tmp_path / "a", 40)
    assert bring_best(saved, _run(tmp_path / "a"), 0.5) == -1
    assert bring_best(saved, _run(tmp_path / "b"), 0.5) == -1
    assert not (tmp_path / "b" / BEST).exists()


def test_without_readable_weights_any_score_is_better(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    saved = _saved(tmp_path / "a", 40)
    assert bring_best(saved, _run(tmp_path / "a"), 0.5) == -1
    (tmp_path / "a" / BEST).write_bytes(b"half a file")
    assert bring_best(saved, _run(tmp_path / "b"), 0.5) == -1


def test_before_the_first_score_there_is_nothing_to_bring(tmp_path: Path) -> None:
    _best(tmp_path / "a", 3)
    assert bring_best(_saved(tmp_path / "a", 40), _run(tmp_path / "b"), -1.0) == -1
    assert not (tmp_path / "b" / BEST).exists()


@pytest.mark.parametrize(("precision", "compiled"), [("bf16", True), ("fp16", False)])
def test_what_a_cpu_cannot_do_is_refused(precision: str, compiled: bool, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = Recipe.model_validate(
        {
            "data": {"train": "here"},
            "budget": {"steps": 1},
            "precision": precision,
            "compile": compiled,
        }
    )
    with pytest.raises(UsageError, match=r"precision=.* on a CPU"):
        prepare_run(recipe, "test", tmp_path / "run", resumed=False)
    assert not (tmp_path / "run").exists()
