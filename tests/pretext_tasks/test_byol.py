"""BYOL: the loss by hand, what moves the target and when, and whose statistics are whose."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.config import validate
from groundwork.data.decode import open_picture
from groundwork.errors import UsageError
from pretext_tasks.byol import BYOL, BYOLConfig

MakeBatch = Callable[..., dict[str, Tensor]]

SMALL = BYOLConfig(hidden_width=32, projection_width=8)


@pytest.fixture
def task(tiny_backbone: Callable[[], Backbone]) -> BYOL:
    torch.manual_seed(0)
    return BYOL(tiny_backbone(), SMALL)


@pytest.fixture
def batch(make_batch: MakeBatch) -> dict[str, Tensor]:
    return make_batch(BYOL, SMALL)


class InTurn(nn.Module):
    """A projector that answers with what it was given, one after the other."""

    def __init__(self, *projections: Tensor) -> None:
        super().__init__()
        self.projections = list(projections)

    def forward(self, _: Tensor) -> Tensor:
        return self.projections.pop(0)


def _pairs(task: BYOL) -> list[tuple[Tensor, Tensor]]:
    online = [*task.backbone.parameters(), *task.projector.parameters()]
    target = [*task.target_backbone.parameters(), *task.target_projector.parameters()]
    return list(zip(online, target, strict=True))


@pytest.mark.parametrize(("degrees", "loss"), [(0, 0.0), (60, 2.0), (90, 4.0), (180, 8.0)])
def test_loss_is_two_less_two_cosines_in_both_directions(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch, degrees: int, loss: float
) -> None:
    """Equal views make equal projections; the predictor turns them by a known angle."""
    config = BYOLConfig(hidden_width=32, projection_width=2)
    task = BYOL(tiny_backbone(), config)
    angle = math.radians(degrees)
    turn = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        cos, sin = math.cos(angle), math.sin(angle)
        turn.weight.copy_(torch.tensor([[cos, -sin], [sin, cos]]))
    task.predictor = turn
    batch = make_batch(BYOL, config)
    batch["view_2"], batch["colour_2"] = batch["view_1"], batch["colour_1"]
    output = task(batch)
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    assert output.metrics["cosine"].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_each_view_predicts_the_targets_answer_to_the_other(
    task: BYOL, batch: dict[str, Tensor]
) -> None:
    right, up = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    task.predictor = nn.Identity()
    task.projector, task.target_projector = InTurn(right, up), InTurn(up, right)
    assert task(batch).loss.item() == pytest.approx(0.0, abs=1e-5)
    task.projector, task.target_projector = InTurn(right, up), InTurn(right, up)
    assert task(batch).loss.item() == pytest.approx(4.0, abs=1e-5)


def test_the_target_starts_as_a_copy_heads_included(task: BYOL) -> None:
    for online, target in _pairs(task):
        assert torch.equal(online, target)
        assert online.data_ptr() != target.data_ptr()
        assert not target.requires_grad


def test_no_gradient_reaches_the_target(task: BYOL, batch: dict[str, Tensor]) -> None:
    task(batch).loss.backward()
    assert all(target.grad is None for _, target in _pairs(task))
    assert all(online.grad is not None for online, _ in _pairs(task))


@pytest.mark.parametrize(("progress", "momentum"), [(0.0, 0.9), (0.5, 0.95), (1.0, 1.0)])
def test_momentum_rises_to_one_by_a_cosine(
    tiny_backbone: Callable[[], Backbone], progress: float, momentum: float
) -> None:
    task = BYOL(tiny_backbone(), SMALL.model_copy(update={"momentum": 0.9}))
    with torch.no_grad():
        for online, target in _pairs(task):
            online.fill_(1.0)
            target.fill_(3.0)
    task.after_step(progress)
    for online, target in _pairs(task):
        assert torch.allclose(target, torch.full_like(target, 3 * momentum + 1 - momentum))
        assert torch.equal(online, torch.ones_like(online))


def test_after_step_leaves_running_statistics_alone(task: BYOL, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        task(batch)
        next(task.backbone.buffers()).add_(1.0)
    before = {name: value.clone() for name, value in task.named_buffers()}
    task.after_step(0.0)
    assert all(torch.equal(value, before[name]) for name, value in task.named_buffers())


def test_the_target_keeps_moving_averages_of_what_it_saw_itself(
    task: BYOL, batch: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        for _, target in _pairs(task):
            target.mul_(2.0)  # other statistics than the online network has
    fresh = {name: value.clone() for name, value in task.target_backbone.named_buffers()}
    task(batch)
    online = dict(task.backbone.named_buffers())
    for name, value in task.target_backbone.named_buffers():
        assert not torch.equal(value, fresh[name]), name
        if "running" in name:
            assert not torch.equal(value, online[name]), name


def test_no_loss_depends_on_running_statistics(task: BYOL, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = task(batch).loss
        for module in (task.target_backbone, task.target_projector, task.backbone):
            for name, value in module.named_buffers():
                if "running" in name:
                    value.fill_(7.0)
        assert torch.equal(task(batch).loss, expected)


def test_one_view_does_not_enter_the_statistics_of_the_other(
    task: BYOL, batch: dict[str, Tensor]
) -> None:
    seen: list[Tensor] = []
    task.backbone.register_forward_hook(lambda _, __, output: seen.append(output.c5.detach()))
    task(batch)
    task(batch | {"view_2": 255 - batch["view_2"]})
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


def test_spread_is_zero_when_all_projections_agree(task: BYOL, batch: dict[str, Tensor]) -> None:
    assert task(batch).metrics["projection_spread"].item() > 0.2
    one = {name: value[:1].expand(4, *value.shape[1:]) for name, value in batch.items()}
    assert task(one).metrics["projection_spread"].item() < 1e-3


def test_only_view_one_is_always_blurred_and_only_view_two_solarised() -> None:
    config = BYOLConfig()
    assert (config.colour_1.blur, config.colour_1.solarise) == (1.0, 0.0)
    assert (config.colour_2.blur, config.colour_2.solarise) == (0.1, 0.2)


def test_a_recipe_that_sets_one_key_of_a_colour_keeps_the_others() -> None:
    config = validate(BYOLConfig, {"colour_1": {"hue": 0.02, "blur_sigma": [0.1, 1.0]}})
    assert config.colour_1.hue == 0.02
    assert config.colour_1.blur == 1.0
    assert config.colour_1.grayscale == 0.2
    with pytest.raises(UsageError, match=r"colour_1\.huh"):
        validate(BYOLConfig, {"colour_1": {"huh": 0.02}})


@pytest.mark.parametrize("image_size", [0, 100])
def test_an_image_size_that_no_backbone_takes_is_refused(image_size: int) -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        BYOL.views(SMALL, image_size)


def test_a_single_picture_is_refused(task: BYOL, batch: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match="at least two"):
        task({name: value[:1] for name, value in batch.items()})


def test_views_are_turned_and_flipped_as_often_as_asked(make_jpeg: Callable[..., bytes]) -> None:
    """The whole picture is the crop, so that only the eight directions remain."""
    plain = Colour(probability=0.0, grayscale=0.0, blur=0.0, solarise=0.0)
    config = BYOLConfig(
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        rotate=0.75,
        colour_1=plain,
        colour_2=plain,
    )
    views = BYOL.views(config, 32)
    data = make_jpeg(3, 32, 32)
    counts: dict[bytes, int] = {}
    for position in range(400):
        generator = np.random.Generator(np.random.Philox(key=[0, position]))
        entries = views(open_picture(data), generator)
        for name in ("view_1", "view_2"):
            key = entries[name].tobytes()
            counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 8
    assert all(60 <= count <= 140 for count in counts.values())  # 100 expected, 4 deviations


def test_pictures_show_the_views_before_and_after_colour(task: BYOL, make_batch: MakeBatch) -> None:
    plain = Colour(probability=0.0, grayscale=0.0, blur=0.0, solarise=0.0)
    config = SMALL.model_copy(update={"colour_1": plain, "colour_2": VIEW_SOLARISED})
    batch = make_batch(BYOL, config)
    shown = task.pictures(batch)
    cut = batch["view_1"].permute(0, 3, 1, 2)
    assert torch.equal(shown["view_1"], cut)
    assert torch.equal(shown["view_1_seen"], cut)  # colour that draws nothing changes no byte
    assert not torch.equal(shown["view_2_seen"], shown["view_2"])


VIEW_SOLARISED = Colour(probability=0.0, grayscale=0.0, blur=0.0, solarise=1.0)


def test_colour_of_both_views_is_drawn_apart(make_batch: MakeBatch) -> None:
    batch = make_batch(BYOL, SMALL)
    assert batch["colour_1"].shape == (4, colour.PARAMETERS)
    assert not torch.equal(batch["colour_1"], batch["colour_2"])
