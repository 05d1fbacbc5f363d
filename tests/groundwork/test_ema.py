"""The moving average: worked by hand, buffers and all, and saved as plain tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from groundwork import settings
from groundwork.ema import Ema
from groundwork.errors import CheckpointError


def make_product() -> dict[str, nn.Module]:
    return {"backbone": nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), "neck": nn.Identity()}


def fill(product: dict[str, nn.Module], value: float) -> None:
    with torch.no_grad():
        for module in product.values():
            for tensor in module.state_dict().values():
                tensor.fill_(value)


def test_an_average_by_hand_over_parameters_and_buffers() -> None:
    product = make_product()
    ema = Ema(settings.Ema(decay=0.75, warmup=False), product)
    for step, value in [(1, 4.0), (2, 8.0), (3, 0.0)]:
        fill(product, value)
        ema.update(step)
    # 4, then 0.75 * 4 + 0.25 * 8 = 5, then 0.75 * 5 = 3.75; the count of batches is copied.
    for name, tensor in ema.state().items():
        expected = 0 if name.endswith("num_batches_tracked") else 3.75
        assert torch.equal(tensor, torch.full_like(tensor, expected)), name


def test_warmup_grows_the_decay_up_to_its_limit() -> None:
    def left(step: int) -> float:
        """How much of an average of zeros is left when a one comes in."""
        live = nn.Linear(1, 1)
        nn.init.zeros_(live.weight)
        ema = Ema(settings.Ema(decay=0.9), {"live": live})
        nn.init.ones_(live.weight)
        ema.update(step)
        return 1 - float(ema.state()["live.weight"])

    assert left(1) == 0
    assert left(2) == pytest.approx(1 - 2 ** (-2 / 3))
    assert left(8) == pytest.approx(0.75)
    assert left(1000) == pytest.approx(0.9)


def test_the_average_is_apart_from_the_modules_that_train() -> None:
    product = make_product()
    keys = list(product["backbone"].state_dict())
    ema = Ema(settings.Ema(), product)
    before = copy.deepcopy(ema.state())
    fill(product, 7.0)
    assert all(torch.equal(before[key], tensor) for key, tensor in ema.state().items())
    assert list(ema.product()["backbone"].state_dict()) == keys
    assert not any(one.requires_grad for one in ema.product()["backbone"].parameters())
    assert all(one.requires_grad for one in product["backbone"].parameters())
    assert product["backbone"].training
    assert not ema.product()["backbone"].training


def test_a_loaded_average_goes_on_as_if_never_stopped() -> None:
    product = make_product()
    config = settings.Ema(decay=0.9)
    whole = Ema(config, product)
    for step in range(1, 4):
        fill(product, step / 3)
        whole.update(step)
    saved = {name: tensor.clone() for name, tensor in whole.state().items()}
    resumed = Ema(config, copy.deepcopy(product))
    resumed.load(saved)
    again = Ema(config, product)
    again.load(saved)
    fill(product, 0.123)
    whole.update(4)
    again.update(4)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, again.state()[name]), name
        assert torch.equal(saved[name], resumed.state()[name]), name


def test_an_average_of_another_model_is_refused() -> None:
    ema = Ema(settings.Ema(), make_product())
    with pytest.raises(CheckpointError, match="do not fit"):
        ema.load({})
    wrong = {name: tensor.reshape(-1, 1) for name, tensor in ema.state().items()}
    with pytest.raises(CheckpointError, match="here"):
        ema.load(wrong)
