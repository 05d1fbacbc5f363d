"""Inpainting of features: the slow copy that gives the targets begins and follows as it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.backbones.contract import Backbone
from pretext_tasks.inpainting import Inpainting, InpaintingConfig

MakeBatch = Callable[..., dict[str, Tensor]]
MakeTask = Callable[..., Inpainting]


@pytest.fixture
def make_task(tiny_backbone: Callable[[], Backbone]) -> MakeTask:
    def make(**changes: Any) -> Inpainting:
        torch.manual_seed(0)
        return Inpainting(tiny_backbone(), InpaintingConfig(**{"width": 16} | changes))

    return make


def test_the_copy_that_says_the_features_follows_slowly_and_is_not_kept(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    task = make_task(target="features", neck="n", momentum=0.9)
    assert set(task.product()) == {"backbone", "neck"}
    assert not any("target" in name for name in make_task().state_dict())
    with torch.no_grad():
        for parameter in (*task.backbone.parameters(), *task.product()["neck"].parameters()):
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.after_step(1.0)  # at the end it stands still
    assert task.target_begun and not before["target_begun"]
    before["target_begun"] += 1
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name])
    task.after_step(0.0)
    moved = [name for name, value in task.state_dict().items() if (value != before[name]).any()]
    assert {name.split(".")[0] for name in moved} == {"target_backbone", "target_neck"}
    for name, value in task.named_parameters():
        if name.startswith("target_"):
            assert torch.allclose(value, before[name] + 0.1, atol=1e-5), name


def test_the_copy_of_a_neck_begins_with_the_weights_that_the_neck_got(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    """--init loads a neck after the task is made; a resumed run has its copy in the checkpoint."""
    task = make_task(target="features", neck="n")
    neck = task.product()["neck"]
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.add_(1.0)
    batch = make_batch(Inpainting, task.config)
    task.eval()(batch)
    task.after_step(0.0)
    assert task.target_neck is not None
    begun = {name: value.clone() for name, value in task.target_neck.state_dict().items()}
    assert all(torch.equal(value, neck.state_dict()[name]) for name, value in begun.items())
    state = {name: value.clone() for name, value in task.state_dict().items()}
    twin = make_task(target="features", neck="n").eval()
    state = {
        name: value + 1 if name.startswith("neck.") else value for name, value in state.items()
    }
    twin.load_state_dict(state)
    twin(batch)
    assert twin.target_neck is not None
    for name, value in twin.target_neck.state_dict().items():
        assert torch.equal(value, begun[name]), name


def test_pictures_before_the_first_step_do_not_begin_the_copy_of_a_neck(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    """The main process alone draws them, and hands its buffers to all others."""
    task = make_task(target="features", neck="n")
    batch = make_batch(Inpainting, task.config)
    task.eval().pictures(batch)
    assert not task.target_begun
    other = make_task(target="features", neck="n").eval()
    other.target_begun.copy_(task.target_begun)
    neck = other.product()["neck"]
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.add_(1.0)
    other(batch)
    assert other.target_neck is not None
    for name, value in other.target_neck.state_dict().items():
        assert torch.equal(value, neck.state_dict()[name]), name
    other.after_step(0.0)
    assert other.target_begun
