"""The optimizers: what decays, what is adapted, and a state that comes back bit for bit."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from groundwork.errors import CheckpointError, UsageError
from groundwork.optim import (
    build_optimizer,
    set_learning_rate,
    state_from_tensors,
    state_to_tensors,
    undecayed,
)
from groundwork.settings import Optimiser

Name = Literal["adamw", "sgd", "lars", "lamb"]
NAMES: list[Name] = ["adamw", "sgd", "lars", "lamb"]


class Table(nn.Module):
    """A two-dimensional parameter that asks not to decay, as timm's transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 3))

    def no_weight_decay(self) -> set[str]:
        return {"table"}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        pictures = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        model(pictures.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_five_steps_and_five_after_a_restart_equal_ten(
    name: Name, memory_format: torch.memory_format
) -> None:
    config = Optimiser(name=name, lr=1e-2, weight_decay=0.1)
    whole = make_model().to(memory_format=memory_format)
    halves = copy.deepcopy(whole)
    train(whole, build_optimizer(config, whole), range(10))

    first = build_optimizer(config, halves)
    train(halves, first, range(5))
    tensors, info = state_to_tensors(first)
    # As a file would hold them: contiguous copies, and JSON.
    saved = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    second = build_optimizer(config, halves)
    state_from_tensors(second, saved, json.loads(json.dumps(info)))
    train(halves, second, range(5, 10))

    for (key, one), two in zip(
        whole.state_dict().items(), halves.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", NAMES)
def test_the_state_matters(name: Name) -> None:
    # Else the round trip above would say nothing.
    config = Optimiser(name=name, lr=1e-2)
    whole = make_model()
    halves = copy.deepcopy(whole)
    train(whole, build_optimizer(config, whole), range(10))
    train(halves, build_optimizer(config, halves), range(5))
    train(halves, build_optimizer(config, halves), range(5, 10))
    assert not torch.equal(next(whole.parameters()), next(halves.parameters()))


def test_norms_biases_and_named_tables_do_not_decay() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 1),
            "norm": nn.BatchNorm2d(4),
            "layer": nn.LayerNorm((4, 4)),
            "group": nn.GroupNorm(2, 4),
            "attention": nn.MultiheadAttention(4, 1),
            "inner": nn.Sequential(Table()),
        }
    )
    decaying = {name for name, _ in model.named_parameters()} - undecayed(model)
    assert decaying == {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


def test_frozen_parameters_are_left_out_and_order_is_the_model_s() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(Optimiser(weight_decay=0.1), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [[names[id(one)] for one in group["params"]] for group in optimizer.param_groups] == [
        ["3.weight"],
        ["1.weight", "1.bias", "3.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="no trainable parameter"):
        build_optimizer(Optimiser(), make_model().requires_grad_(False))


def one_step(config: Optimiser, weight: float, gradient: float, bias: bool = False) -> Tensor:
    """Step once on a layer whose weight (1 x 4) and gradient are constant."""
    layer = nn.Linear(4, 1, bias=bias)
    optimizer = build_optimizer(config, layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(weight)
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return layer.bias.detach() if bias else layer.weight.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_step_of_lars_by_hand(weight_decay: float) -> None:
    # Norms are 2 * 3 and 2 * 0.5; update = lr * eta * |w| / (|g| + wd |w|) * (g + wd w).
    config = Optimiser(name="lars", lr=0.1, trust=0.01, weight_decay=weight_decay)
    rate = 0.01 * 6 / (1 + weight_decay * 6)
    expected = 3 - 0.1 * rate * (0.5 + weight_decay * 3)
    assert one_step(config, 3.0, 0.5).flatten().tolist() == pytest.approx([expected] * 4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_step_of_lamb_by_hand(weight_decay: float) -> None:
    # The first update of Adam is sign(g), then + wd w; scaled to the norm of w, that is 3 * sign.
    config = Optimiser(name="lamb", lr=0.1, weight_decay=weight_decay)
    result = one_step(config, 3.0, 50.0).flatten().tolist()
    assert result == pytest.approx([3 - 0.1 * 3] * 4, abs=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("lars", 3 - 0.1 * 0.5), ("lamb", 3 - 0.1 * 1)])
def test_biases_neither_decay_nor_are_adapted(name: Name, expected: float) -> None:
    config = Optimiser(name=name, lr=0.1, weight_decay=0.5)
    assert one_step(config, 3.0, 0.5, bias=True).item() == pytest.approx(expected, abs=1e-5)


def test_a_step_of_sgd_has_no_nesterov_momentum_unless_asked() -> None:
    plain = Optimiser(name="sgd", lr=0.1, weight_decay=0.0)
    nesterov = Optimiser(name="sgd", lr=0.1, weight_decay=0.0, nesterov=True)
    assert one_step(plain, 1.0, 1.0)[0, 0].item() == pytest.approx(0.9)
    assert one_step(nesterov, 1.0, 1.0)[0, 0].item() == pytest.approx(1 - 0.1 * 1.9)


def test_a_step_of_adamw_by_hand() -> None:
    # lr * sign(g), and lr * wd * w on top.
    config = Optimiser(lr=0.1, weight_decay=0.5)
    assert one_step(config, 3.0, 7.0)[0, 0].item() == pytest.approx(3 - 0.1 - 0.1 * 0.5 * 3)


def test_learning_rates_keep_the_scale_of_their_group() -> None:
    optimizer = build_optimizer(Optimiser(), make_model())
    optimizer.param_groups[1]["lr_scale"] = 0.1
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])


def test_hyper_parameters_come_from_the_recipe_and_not_from_the_file() -> None:
    model = make_model()
    old = build_optimizer(Optimiser(weight_decay=0.1), model)
    train(model, old, range(1))
    new = build_optimizer(Optimiser(weight_decay=0.2), model)
    state_from_tensors(new, *state_to_tensors(old))
    assert new.param_groups[0]["weight_decay"] == 0.2


def test_a_loaded_state_shares_no_memory_with_what_it_came_from() -> None:
    model = make_model()
    old = build_optimizer(Optimiser(name="lamb"), model)
    train(model, old, range(1))
    tensors, info = state_to_tensors(old)
    new = build_optimizer(Optimiser(name="lamb"), model)
    state_from_tensors(new, tensors, info)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    train(model, new, range(1, 2))
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "SGD"}, "optimizer is SGD"),
        ({"shapes": [[[1]]]}, "other parameters"),
        ({"values": {"state.99.step": 1}}, "parameter 99"),
        ({"values": {"group.9.step": 1}}, "group 9"),
        ({"values": {"other": 1}}, "unknown meaning"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    model = make_model()
    optimizer = build_optimizer(Optimiser(), model)
    train(model, optimizer, range(1))
    tensors, info = state_to_tensors(optimizer)
    with pytest.raises(CheckpointError, match=message):
        state_from_tensors(build_optimizer(Optimiser(), model), tensors, info | change)


class Fast(nn.Module):
    """Asks ten times the rate for its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def lr_scales(self) -> dict[str, float]:
        return {"layer.weight": 10.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_may_ask_for_another_learning_rate(name: Name) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Fast())
    optimizer = build_optimizer(Optimiser(name=name, weight_decay=0.1), model)
    set_learning_rate(optimizer, 1e-3)
    asked = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rates = {key: asked[id(parameter)] for key, parameter in model.named_parameters()}
    assert rates == {
        "0.weight": (1e-3, 0.1),
        "0.bias": (1e-3, 0.0),
        "1.layer.weight": (1e-2, 0.1),
        "1.layer.bias": (1e-3, 0.0),
    }
