"""Several tasks at once: each sees its own, and their losses add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.backbones.contract import Backbone
from groundwork.config import validate
from groundwork.errors import UsageError
from pretext_tasks import load_task, parts_of
from pretext_tasks.contract import PretextTask

MakeBatch = Callable[..., dict[str, Tensor]]
NAME = "byol+inpainting"
SMALL: dict[str, Any] = {
    "byol": {"hidden_width": 16, "projection_width": 8, "predictor_lr": 3.0},
    "inpainting": {"width": 16},
    "weights": {"inpainting": 0.5},
    "image_sizes": {"byol": 32},
}


@pytest.fixture
def kind() -> type[PretextTask]:
    return load_task(NAME)


@pytest.fixture
def task(kind: type[PretextTask], tiny_backbone: Callable[[], Backbone]) -> PretextTask:
    torch.manual_seed(0)
    return kind(tiny_backbone(), validate(kind.Config, SMALL, prefix="task."))


@pytest.fixture
def batch(kind: type[PretextTask], make_batch: MakeBatch) -> dict[str, Tensor]:
    return make_batch(kind, validate(kind.Config, SMALL, prefix="task."), 64)


def test_every_task_has_its_own_views_at_its_own_size(batch: dict[str, Tensor]) -> None:
    assert batch["byol/view_1"].shape[1:] == (32, 32, 3)
    assert batch["inpainting/image"].shape[1:] == (64, 64, 3)


def test_the_loss_is_the_weighted_sum(task: PretextTask, batch: dict[str, Tensor]) -> None:
    output = task(batch)
    parts = output.metrics
    expected = parts["byol_loss"] + 0.5 * parts["inpainting_loss"]
    torch.testing.assert_close(output.loss.detach(), expected)
    assert {"byol_cosine", "inpainting_hidden_error"} <= set(parts)


def test_the_backbone_is_one_and_every_part_learns(
    task: PretextTask, batch: dict[str, Tensor]
) -> None:
    task(batch).loss.backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert set(task.product()) == {"backbone"}
    inner = [module for module in task.modules() if isinstance(module, PretextTask)]
    assert len({id(one.product()["backbone"]) for one in inner}) == 1


def test_targets_move_and_pictures_are_of_both(task: PretextTask, batch: dict[str, Tensor]) -> None:
    before = {name: value.clone() for name, value in task.state_dict().items() if "target" in name}
    with torch.no_grad():
        for parameter in task.product()["backbone"].parameters():
            parameter.add_(1.0)
    task.after_step(0.0)
    after = task.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert {"byol-view_1", "inpainting-reconstruction"} <= set(task.pictures(batch))


def test_tasks_share_one_neck(make_batch: MakeBatch, tiny_backbone: Callable[[], Backbone]) -> None:
    kind = load_task("dense+inpainting+byol")
    keys: dict[str, Any] = {
        "dense": {"neck": "n", "hidden_width": 16, "projection_width": 8},
        "inpainting": {"neck": "n", "width": 16},
        "byol": SMALL["byol"],
    }
    config = validate(kind.Config, keys, prefix="task.")
    task = kind(tiny_backbone(), config)
    neck = task.product()["neck"]
    inner = [one for one in task.modules() if isinstance(one, PretextTask) and one is not task]
    assert [one.product().get("neck") is neck for one in inner] == [True, True, False]
    task(make_batch(kind, config, 64)).loss.backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    keys["inpainting"]["neck"] = "s"
    with pytest.raises(UsageError, match=r"task\.inpainting\.neck=s, and another task's is n"):
        kind(tiny_backbone(), validate(kind.Config, keys, prefix="task."))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"simclr": 1.0}}, "simclr is none of byol, inpainting"),
        ({"weights": {"byol": 0.0}}, "must be above 0"),
        ({"byol": {"momentm": 1}}, r"task\.byol\.momentm"),
    ],
)
def test_impossible_keys_are_refused(
    kind: type[PretextTask], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        validate(kind.Config, values, prefix="task.")


@pytest.mark.parametrize(("name", "part"), [("byol+simclir", "simclir"), ("byol+byol", "byol")])
def test_parts_that_are_not_tasks_are_named(name: str, part: str) -> None:
    with pytest.raises(KeyError, match=part):
        parts_of(name)
