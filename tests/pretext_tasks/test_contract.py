"""What every pretext task promises, held against every entry of TASKS."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from groundwork.backbones.contract import Backbone
from groundwork.config import Section
from groundwork.data.decode import open_picture
from pretext_tasks import TASKS, load_task
from pretext_tasks.contract import PretextTask, Views, backbone_of

IMAGE_SIZE = 64

MakeBatch = Callable[..., dict[str, Tensor]]
MakeTask = Callable[..., PretextTask]
Entries = dict[str, npt.NDArray[np.generic]]


@pytest.fixture(params=sorted(TASKS))
def kind(request: pytest.FixtureRequest) -> type[PretextTask]:
    return load_task(request.param)


@pytest.fixture
def config(
    kind: type[PretextTask], default_config: Callable[[type[PretextTask]], Section]
) -> Section:
    return default_config(kind)


@pytest.fixture
def views(kind: type[PretextTask], config: Section) -> Views:
    return kind.views(config, IMAGE_SIZE)


@pytest.fixture
def make_task(
    kind: type[PretextTask], config: Section, tiny_backbone: Callable[[], Backbone]
) -> MakeTask:
    def make(seed: int = 0) -> PretextTask:
        torch.manual_seed(seed)
        return kind(tiny_backbone(), config)

    return make


@pytest.fixture
def batch(kind: type[PretextTask], config: Section, make_batch: MakeBatch) -> dict[str, Tensor]:
    return make_batch(kind, config, IMAGE_SIZE)


def _generator(position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[0, position]))


def _same(left: Entries, right: Entries) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


def _steps(task: PretextTask, batch: dict[str, Tensor], count: int) -> list[float]:
    """Train by plain gradient descent, which has no state of its own, and return the losses."""
    losses = []
    for step in range(count):
        task.zero_grad()
        loss = task(batch).loss
        loss.backward()
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-0.01)
        task.after_step(step / count)
        losses.append(loss.item())
    return losses


def test_views_are_a_function_of_the_generator_alone(
    views: Views, make_jpeg: Callable[..., bytes]
) -> None:
    data = make_jpeg(1, 200, 150)
    np.random.seed(1)
    torch.manual_seed(1)
    first = views(open_picture(data), _generator(5))
    np.random.seed(2)
    torch.manual_seed(2)
    state = str(np.random.get_state())
    assert _same(first, views(open_picture(data), _generator(5)))
    assert str(np.random.get_state()) == state
    assert not _same(first, views(open_picture(data), _generator(6)))


def test_views_survive_the_way_to_a_worker(views: Views, make_jpeg: Callable[..., bytes]) -> None:
    data = make_jpeg(1, 200, 150)
    sent: Views = pickle.loads(pickle.dumps(views))
    assert _same(views(open_picture(data), _generator(5)), sent(open_picture(data), _generator(5)))


def test_views_have_one_shape_whatever_the_picture(
    views: Views, make_jpeg: Callable[..., bytes]
) -> None:
    forms = set()
    for position, (width, height) in enumerate([(200, 150), (40, 300), (300, 24), (16, 16)]):
        entries = views(open_picture(make_jpeg(1, width, height)), _generator(position))
        forms.add(tuple((name, entry.shape, str(entry.dtype)) for name, entry in entries.items()))
    assert len(forms) == 1


def test_views_hold_pictures_as_bytes_with_three_channels(
    views: Views, make_jpeg: Callable[..., bytes]
) -> None:
    entries = views(open_picture(make_jpeg(1, 200, 150)), _generator(0))
    pictures = [entry for entry in entries.values() if entry.dtype == np.uint8 and entry.ndim >= 3]
    assert pictures
    for picture in pictures:
        assert picture.shape[-1] == 3
        assert picture.flags.c_contiguous
    # Nothing but the pictures is large: floats of a whole picture would cost four times the bytes.
    assert all(
        entry.nbytes <= IMAGE_SIZE * IMAGE_SIZE for entry in entries.values() if entry.ndim < 3
    )
    for entry in entries.values():
        torch.from_numpy(np.asarray(entry))


def test_forward_gives_a_finite_float32_scalar_and_detached_metrics(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    output = make_task()(batch)
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    assert output.loss.requires_grad
    for metric in output.metrics.values():
        assert metric.shape == ()
        assert not metric.requires_grad
        assert metric.isfinite()


def test_backward_reaches_every_trainable_parameter(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    task = make_task()
    task(batch).loss.backward()
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"DDP would wait for {name}"
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


def test_the_device_draws_nothing(make_task: MakeTask, batch: dict[str, Tensor]) -> None:
    losses = []
    for seed in (1, 2):
        task = make_task()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append(task(batch).loss.item())
        assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1]


def test_state_dict_is_the_whole_truth(make_task: MakeTask, batch: dict[str, Tensor]) -> None:
    trained, fresh = make_task(seed=0), make_task(seed=1)
    _steps(trained, batch, 2)
    keys = set(fresh.state_dict())
    fresh.load_state_dict({name: value.clone() for name, value in trained.state_dict().items()})
    assert _steps(fresh, batch, 3) == pytest.approx(_steps(trained, batch, 3), abs=1e-6)
    assert set(fresh.state_dict()) == keys


def test_a_few_steps_lower_the_loss(make_task: MakeTask, batch: dict[str, Tensor]) -> None:
    losses = _steps(make_task(), batch, 12)
    assert losses[-1] < losses[0]


def test_the_product_is_the_backbone_it_was_given(
    kind: type[PretextTask], config: Section, tiny_backbone: Callable[[], Backbone]
) -> None:
    backbone = tiny_backbone()
    task = kind(backbone, config)
    assert backbone_of(task) is backbone
    assert set(task.product()) <= {"backbone", "neck", "head"}


def test_pictures_can_be_looked_at_and_move_nothing(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    task = make_task()
    before = copy.deepcopy(task.state_dict())
    pictures = task.pictures(batch)
    assert pictures
    for name, picture in pictures.items():
        assert picture.dtype == torch.uint8, name
        assert picture.ndim == 4, name
        assert picture.shape[:2] == (4, 3), name
        assert picture.device.type == "cpu", name
        assert picture.float().std() > 1, name  # not blank
    assert task.training
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_after_step_moves_nothing_that_the_optimiser_moves(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    task = make_task()
    _steps(task, batch, 2)
    before = copy.deepcopy(task.state_dict())
    for progress in (0.0, 0.5, 1.0):
        task.after_step(progress)
    trained = {name for name, value in task.named_parameters() if value.requires_grad}
    kept = {id(value) for value in backbone_of(task).state_dict(keep_vars=True).values()}
    for name, value in task.state_dict(keep_vars=True).items():
        if name in trained or id(value) in kept:
            assert torch.equal(value, before[name]), name


def test_a_deep_copy_is_equal_and_independent(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    task = make_task()
    twin = copy.deepcopy(task)
    weights = {name: value.clone() for name, value in twin.state_dict().items()}
    losses = _steps(task, batch, 2)
    assert all(torch.equal(value, weights[name]) for name, value in twin.state_dict().items())
    assert _steps(twin, batch, 2) == pytest.approx(losses, abs=1e-6)


def test_autocast_leaves_the_loss_float32(make_task: MakeTask, batch: dict[str, Tensor]) -> None:
    exact = make_task()(batch).loss.item()
    task = make_task()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.1)
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in task.parameters()
        if parameter.requires_grad
    )
