"""Which of the best weights so far are those of the run that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from finetune.recipe import Recipe
from groundwork import checkpoint as checkpoints
from groundwork.backbones import build_backbone
from groundwork.backbones.product import read_product, save_product
from groundwork.checkpoint import Checkpoint
from groundwork.command import note_init, noted_init
from groundwork.errors import DataError, UsageError
from groundwork.run_folder import (
    BEST,
    Run,
    bring_best,
    calm_checkpoint,
    check_same_everywhere,
    find_checkpoint,
    prepare_run,
    refuse_sharded_networks,
)
from groundwork.settings import RunKeys
from groundwork.training_state import Position


def _run(folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, Accelerator(cpu=True), RunKeys(), resumed=True)


def _best(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    save_product(folder / BEST, {"backbone": build_backbone("timm/test_resnet")}, {"step": step})


def _saved(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / f"step-{step}", step, {}, {})


def _to_beat(saved: Checkpoint, run: Run, best: float, measure: str | None = None) -> float:
    position = Position(best=best, worse=2, measured_on="these")
    bring_best(saved, run, position, "these", measure)
    assert position.worse == (2 if position.best >= 0 else 0)
    return position.best


@pytest.mark.parametrize("step", [30, 40])
def test_the_best_weights_stay_or_come_along(tmp_path: Path, step: int) -> None:
    _best(tmp_path / "a", step)
    saved = _saved(tmp_path / "a", 40)
    assert _to_beat(saved, _run(tmp_path / "a"), 0.5) == 0.5
    assert _to_beat(saved, _run(tmp_path / "b"), 0.5) == 0.5
    assert read_product(tmp_path / "b" / BEST)[1]["step"] == step


def test_weights_that_another_measure_chose_are_not_the_best(tmp_path: Path) -> None:
    _best(tmp_path / "a", 30)
    saved = _saved(tmp_path / "a", 40)
    assert _to_beat(saved, _run(tmp_path / "a"), 0.5, "probe/knn") == -1
    _, about = read_product(tmp_path / "a" / BEST)
    known = next(key for key in about if key != "step")
    assert _to_beat(saved, _run(tmp_path / "a"), 0.5, known) == 0.5


def test_weights_of_a_later_step_are_of_a_course_that_is_left(tmp_path: Path) -> None:
    _best(tmp_path / "a", 41)
    saved = _saved(tmp_path / "a", 40)
    assert _to_beat(saved, _run(tmp_path / "a"), 0.5) == -1
    assert _to_beat(saved, _run(tmp_path / "b"), 0.5) == -1
    assert not (tmp_path / "b" / BEST).exists()


def test_without_readable_weights_any_score_is_better(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    saved = _saved(tmp_path / "a", 40)
    assert _to_beat(saved, _run(tmp_path / "a"), 0.5) == -1
    (tmp_path / "a" / BEST).write_bytes(b"half a file")
    assert _to_beat(saved, _run(tmp_path / "b"), 0.5) == -1


def test_a_score_on_other_pictures_is_not_to_be_beaten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _best(tmp_path / "a", 30)
    saved, run = _saved(tmp_path / "a", 40), _run(tmp_path / "a")
    position = Position(best=0.9, worse=2, measured_on="their labels before they were corrected")
    bring_best(saved, run, position, "these")
    assert (position.best, position.worse) == (-1, 0)
    assert "the best is looked for anew" in caplog.text
    # A checkpoint of an older version does not say on what.
    position = Position(best=0.9, worse=2)
    bring_best(saved, run, position, "these")
    assert (position.best, position.worse) == (0.9, 2)


def _save(folder: Path, step: int, skipped_in_a_row: int) -> Path:
    documents = {"state": {"skipped_in_a_row": skipped_in_a_row}}
    return checkpoints.save(folder / "checkpoints", step, {}, documents, keep=9)


def test_a_run_is_rolled_back_to_what_was_saved_between_good_steps(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    assert calm_checkpoint(run) is None
    in_a_streak = _save(tmp_path / "a", 12, 3)
    found = calm_checkpoint(run)
    assert found is not None and found.path == in_a_streak
    calm = _save(tmp_path / "a", 10, 0)
    found = calm_checkpoint(run)
    assert found is not None and found.path == calm


def test_a_run_that_goes_on_in_another_folder_has_all_it_needs_there(tmp_path: Path) -> None:
    init = tmp_path / "init.safetensors"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    note_init(tmp_path / "a", init, resumed=False)
    saved = checkpoints.load(_save(tmp_path / "a", 8, 0))
    run = _run(tmp_path / "b")
    run.begin(saved)
    found = checkpoints.latest(run.checkpoints)
    assert found is not None and found.path == run.checkpoints / "step-8"
    assert noted_init(run.folder) == init
    shutil.rmtree(tmp_path / "a")
    assert calm_checkpoint(run) is not None
    found = find_checkpoint(run, run.checkpoints)
    assert found is not None and found.step == 8


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_network_in_shards_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=kind):
        refuse_sharded_networks(DistributedType(kind))
    refuse_sharded_networks(DistributedType.MULTI_GPU)


def test_before_the_first_score_there_is_nothing_to_bring(tmp_path: Path) -> None:
    _best(tmp_path / "a", 3)
    assert _to_beat(_saved(tmp_path / "a", 40), _run(tmp_path / "b"), -1.0) == -1
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


class _Seen:
    """Samples, as far as ranks compare them."""

    def __init__(self, name: str, pictures: int) -> None:
        self.name, self.fingerprint, self.pictures = name, f"{name}-{pictures}", pictures

    def __len__(self) -> int:
        return self.pictures


def test_ranks_that_see_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[_Seen] = []

    def gather(seen: list[Any], own: Any, group: object) -> None:
        told = [(f"{len(one):,} pictures of {one.name}", one.fingerprint) for one in others]
        seen[:] = [own, *told]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 1 + len(others))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    group: Any = object()
    samples: Any = _Seen("data", 1200)
    check_same_everywhere(None, samples)
    others[:] = [_Seen("data", 1200)]
    check_same_everywhere(group, samples)
    others.append(_Seen("data", 1100))
    with pytest.raises(DataError, match="Process 2 sees 1,100 pictures of data, process 0 1,200"):
        check_same_everywhere(group, samples)
    with pytest.raises(DataError, match=r"of data, process 0 no pictures: data\.test must"):
        check_same_everywhere(group, None, "data.test")
