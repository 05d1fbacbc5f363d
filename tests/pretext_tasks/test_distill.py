"""Distill: the teacher stays as it is, sees what the student sees, and is matched cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.backbones.contract import Backbone
from groundwork.backbones.from_timm import TimmTeacher
from groundwork.errors import CheckpointError, UsageError
from pretext_tasks.distill import Distill, DistillConfig
from tests.record_golden import TEACHER, write_teacher

MakeBatch = Callable[..., dict[str, Tensor]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "teacher.safetensors"
    write_teacher(file)
    return file


@pytest.fixture
def make_task(weights: Path, tiny_backbone: Callable[[], Backbone]) -> Callable[..., Distill]:
    def make(**changes: Any) -> Distill:
        torch.manual_seed(0)
        keys = {"teacher": TEACHER, "weights": str(weights), "hidden_width": 16}
        return Distill(tiny_backbone(), DistillConfig.model_validate(keys | changes))

    return make


def test_the_teacher_has_the_files_weights_and_keeps_them(
    make_task: Callable[..., Distill], make_batch: MakeBatch, weights: Path
) -> None:
    task = make_task().train()
    wanted = load_file(weights)
    state = task.teacher.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())
    assert not any(module.training for module in task.teacher.modules())
    task(make_batch(Distill, DistillConfig(weights="named"))).loss.backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    own = [p for name, p in task.named_parameters() if not name.startswith("teacher.")]
    assert all(parameter.grad is not None for parameter in own)


def test_a_student_that_gives_the_teachers_map_has_no_loss(
    make_task: Callable[..., Distill], make_batch: MakeBatch
) -> None:
    task = make_task()
    batch = make_batch(Distill, DistillConfig(weights="named"))
    wanted = task._taught(batch)  # N C 4 4: cells of 16 px
    assert wanted.shape[1:] == (64, 4, 4)
    for projection, side in zip(task.projections, (8, 4, 2), strict=True):
        target = torch.nn.functional.interpolate(
            wanted, size=(side, side), mode="bilinear", antialias=True
        )
        projection.register_forward_hook(lambda *_, target=target: 3 * target)
    output = task(batch)
    assert output.loss.item() == pytest.approx(0, abs=1e-5)
    assert output.metrics["cosine_stride_8"].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "stride"),
    [("timm/test_vit", 16), ("timm/test_resnet", 32), ("timm/test_convnext2", 32)],
)
def test_transformers_and_convolutions_give_maps(name: str, stride: int) -> None:
    teacher = TimmTeacher(name)
    assert teacher.stride == stride
    found = teacher(torch.rand(2, 3, 96, 64))
    assert found.shape == (2, teacher.channels, 96 // stride, 64 // stride)
    assert not found.requires_grad


def test_a_file_of_another_model_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Set task\.teacher to the file's model"):
        TimmTeacher("timm/test_resnet").load(weights)
    # What a classifier needs is not asked for; prefixes of training scripts are taken off.
    wrapped = {f"module.{name}": value for name, value in load_file(weights).items()}
    other = tmp_path / "wrapped.safetensors"
    save_file({k: v for k, v in wrapped.items() if "head." not in k}, other)
    TimmTeacher(TEACHER).load(other)
    # One tensor that stayed random would be taught.
    save_file({k: v for k, v in wrapped.items() if "blocks.3.mlp.fc1.weight" not in k}, other)
    with pytest.raises(CheckpointError, match=r"and 100 % are needed.*blocks\.3\.mlp\.fc1"):
        TimmTeacher(TEACHER).load(other)


def test_a_teacher_without_a_file_is_refused(tiny_backbone: Callable[[], Backbone]) -> None:
    with pytest.raises(UsageError, match=r"task\.weights is not set.*Nothing is downloaded"):
        Distill.views(DistillConfig(), 64)
    with pytest.raises(UsageError, match=r"task\.weights"):
        Distill(tiny_backbone(), DistillConfig(teacher=TEACHER))


def test_a_neck_is_trained_and_kept(
    make_task: Callable[..., Distill], make_batch: MakeBatch
) -> None:
    task = make_task(neck="n")
    task(make_batch(Distill, DistillConfig(weights="named"))).loss.backward()
    neck = task.product()["neck"]
    assert all(parameter.grad is not None for parameter in neck.parameters())
