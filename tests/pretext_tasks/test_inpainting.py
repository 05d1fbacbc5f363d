"""Inpainting: what is hidden stays hidden, and the loss is on it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.config import validate
from groundwork.data.decode import open_picture
from groundwork.errors import UsageError
from pretext_tasks.inpainting import Inpainting, InpaintingConfig, hidden_loss
from pretext_tasks.inpainting_decoder import Hierarchical
from pretext_tasks.inpainting_targets import (
    normalise_patches,
    spread,
)

MakeBatch = Callable[..., dict[str, Tensor]]
MakeTask = Callable[..., Inpainting]

SMALL: dict[str, Any] = {"width": 16}
EVERY_COLOUR = Colour(probability=1.0, grayscale=0.5, blur=1.0, solarise=0.5)


@pytest.fixture
def make_task(tiny_backbone: Callable[[], Backbone]) -> MakeTask:
    def make(**changes: Any) -> Inpainting:
        torch.manual_seed(0)
        return Inpainting(tiny_backbone(), InpaintingConfig(**SMALL | changes))

    return make


def _generator(position: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[0, position]))


def _predictions(task: Inpainting, batch: dict[str, Tensor]) -> dict[int, Tensor]:
    found: list[dict[int, Tensor]] = []
    hook = task.decoder.register_forward_hook(lambda _, __, output: found.append(output))
    task(batch)
    hook.remove()
    return found[0]


def _predicting(task: Inpainting, pixels: dict[int, Tensor]) -> Any:
    """Let the decoder predict these pixels, by stride, whatever it sees."""
    cells = {stride: pixel_unshuffle(map_, 8) for stride, map_ in pixels.items()}
    return task.decoder.register_forward_hook(lambda *_: cells)


def _other_pixels_hidden(batch: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """The same batch, with every hidden byte changed, and by different amounts."""
    pixels = spread(batch["hidden"], block).permute(0, 2, 3, 1)
    generator = torch.Generator().manual_seed(1)
    change = torch.randint(1, 256, batch["image"].shape, generator=generator, dtype=torch.uint8)
    changed = torch.where(pixels, batch["image"] + change, batch["image"])  # bytes wrap around
    assert ((changed != batch["image"]) == pixels).all()
    return batch | {"image": changed}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "holes",
    [
        {"filling": "token"},
        {"filling": "mean"},
        {"encoder": "sparse"},
        {"neck": "n"},
        {"target": "features"},
    ],
)
@pytest.mark.parametrize("jitter", [None, EVERY_COLOUR])
def test_not_one_bit_of_the_prediction_depends_on_a_hidden_pixel(
    make_task: MakeTask,
    make_batch: MakeBatch,
    training: bool,
    holes: dict[str, str],
    jitter: Colour | None,
) -> None:
    task = make_task(**holes, colour=jitter, scales=(8, 16, 32)).train(training)
    batch = make_batch(Inpainting, task.config)
    other = _other_pixels_hidden(batch, 32)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    first = _predictions(task, batch)
    task.load_state_dict(state)
    second = _predictions(task, other)
    for scale in (8, 16, 32):
        assert torch.equal(first[scale], second[scale])
    # The test can fail: what is seen does move the prediction, and what is hidden moves the loss.
    third = _predictions(task, batch | {"image": 255 - batch["image"]})
    assert not torch.equal(first[8], third[8])
    assert not torch.equal(task(batch).loss, task(other).loss)


def test_running_statistics_do_not_depend_on_a_hidden_pixel(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    batch = make_batch(Inpainting, InpaintingConfig())
    task, twin = make_task(), make_task()
    task(batch)
    twin(_other_pixels_hidden(batch, 32))
    for name, value in task.named_buffers():
        assert torch.equal(value, dict(twin.named_buffers())[name]), name


def test_visible_pixels_have_no_part_in_the_loss(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    """With the prediction held fast, changing what can be seen changes no loss."""
    task = make_task(scales=(8, 16, 32))
    batch = make_batch(Inpainting, task.config)
    fixed = {s: torch.randn(4, 3, 512 // s, 512 // s) for s in (8, 16, 32)}
    _predicting(task, fixed)
    flipped = {"hidden": ~batch["hidden"]}
    other = _other_pixels_hidden(batch | flipped, 32) | {"hidden": batch["hidden"]}
    assert task(other).loss.item() == pytest.approx(task(batch).loss.item(), abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("l2", 3.0), ("l1", 5 / 3)])
def test_the_loss_by_hand(kind: str, expected: float) -> None:
    """Two hidden pixels of three channels: errors 1, 1, 2 and 2, 2, 2; others would be 100."""
    target = torch.zeros(1, 3, 2, 2)
    prediction = torch.full((1, 3, 2, 2), 100.0)
    hidden = torch.tensor([[[[True, False], [False, True]]]])
    prediction[0, :, 0, 0] = torch.tensor([1.0, -1.0, 2.0])
    prediction[0, :, 1, 1] = torch.tensor([-2.0, 2.0, 2.0])
    assert hidden_loss(prediction, target, hidden, kind).item() == pytest.approx(expected)


def test_predicting_each_patchs_mean_costs_one(make_task: MakeTask, make_batch: MakeBatch) -> None:
    task = make_task()
    batch = make_batch(Inpainting, task.config)
    batch["image"] = torch.randint(0, 256, batch["image"].shape, dtype=torch.uint8)
    _predicting(task, {8: torch.zeros(4, 3, 64, 64)})
    output = task(batch)
    # The unbiased variance of 16 x 16 x 3 values is larger than their mean square by 768 / 767.
    assert output.loss.item() == pytest.approx(767 / 768, rel=1e-3)
    # Uniform bytes are 64 from their mean on average.
    assert output.metrics["hidden_error"].item() == pytest.approx(64, abs=1)


def test_hidden_error_is_in_grey_levels(make_task: MakeTask, make_batch: MakeBatch) -> None:
    task = make_task(patch=None)
    batch = make_batch(Inpainting, task.config)
    batch["image"] = torch.full_like(batch["image"], 51)
    _predicting(task, {8: torch.full((4, 3, 64, 64), 0.3)})
    output = task(batch)
    assert output.metrics["hidden_error"].item() == pytest.approx(0.3 * 255 - 51, abs=1e-4)
    assert output.loss.item() == pytest.approx(0.01, abs=1e-6)


def test_deeper_levels_predict_the_pooled_target(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    task = make_task(scales=(8, 16, 32), patch=None)
    batch = make_batch(Inpainting, task.config)
    assert {s: pixel_shuffle(p, 8).shape[-1] for s, p in _predictions(task, batch).items()} == {
        8: 64,
        16: 32,
        32: 16,
    }
    colours = (batch["image"] / 255).permute(0, 3, 1, 2)
    right = {
        scale: colours.view(4, 3, 64 // side, side, 64 // side, side).mean(dim=(3, 5))
        for scale, side in ((8, 1), (16, 2), (32, 4))
    }
    _predicting(task, right)
    assert task(batch).loss.item() < 1e-10
    wrong = right | {32: right[32] + 3}
    _predicting(task, wrong)
    assert task(batch).loss.item() == pytest.approx(9 / 3, rel=1e-4)  # the mean of three scales


@pytest.mark.parametrize("scales", [(8,), (8, 16, 32)])
def test_backward_reaches_every_parameter(
    make_task: MakeTask, make_batch: MakeBatch, scales: tuple[int, ...]
) -> None:
    for way in (
        {"filling": "token"},
        {"filling": "mean"},
        {"encoder": "sparse"},
        {"neck": "n"},
        {"target": "features"},
        {"target": "features", "neck": "n"},
    ):
        task = make_task(scales=scales, colour=EVERY_COLOUR, loss="l1", **way)
        task(make_batch(Inpainting, task.config)).loss.backward()
        for name, parameter in task.named_parameters():
            assert (parameter.grad is None) == name.startswith("target_"), name


def _seen(task: Inpainting, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    hook = task.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task(batch)
    hook.remove()
    return seen[0].detach()


def test_the_network_sees_the_picture_and_the_token_in_its_holes(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    task = make_task()
    with torch.no_grad():
        task.token.copy_(torch.tensor([7.0, 8.0, 9.0]))
    batch = make_batch(Inpainting, task.config)
    mean, std = torch.tensor(task.backbone.mean), torch.tensor(task.backbone.std)
    picture = ((batch["image"] / 255 - mean) / std).permute(0, 3, 1, 2)
    hidden = spread(batch["hidden"], 32)
    expected = torch.where(hidden, torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1), picture)
    assert torch.allclose(_seen(task, batch), expected, atol=1e-5)


def test_holes_filled_with_the_mean_leave_the_mean_as_it_is(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    task = make_task(filling="mean")
    batch = make_batch(Inpainting, task.config)
    seen, visible = _seen(task, batch), ~spread(batch["hidden"], 32)
    mean = (seen * visible).sum(dim=(2, 3)) / visible.sum(dim=(2, 3))
    assert torch.allclose(seen.mean(dim=(2, 3)), mean, atol=1e-5)


def test_the_number_of_hidden_blocks_is_exact_and_their_places_are_not(
    make_jpeg: Callable[..., bytes],
) -> None:
    views = Inpainting.views(InpaintingConfig(), 192)
    picture = open_picture(make_jpeg(0, 200, 200))
    masks = [views(picture, _generator(position))["hidden"] for position in range(200)]
    assert all(mask.shape == (6, 6) and mask.sum() == 22 for mask in masks)  # 0.6 * 36 = 21.6
    often = np.mean(masks, axis=0)
    assert often.min() > 0.45 and often.max() < 0.75  # 22 / 36, four deviations


def test_pictures_are_restored_with_each_patchs_own_mean_and_deviation(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    """A prediction that is right gives the picture back; what is visible is shown as it is."""
    task = make_task()
    batch = make_batch(Inpainting, task.config)
    colours = (batch["image"] / 255).permute(0, 3, 1, 2)
    right = normalise_patches(colours, 16, task.config.eps).value
    hook = _predicting(task, {8: right})
    shown = task.pictures(batch)
    assert torch.equal(shown["truth"], batch["image"].permute(0, 3, 1, 2))
    assert torch.equal(shown["reconstruction"], shown["truth"])
    hook.remove()
    shown = task.pictures(batch)
    hidden = spread(batch["hidden"], 32).expand(-1, 3, -1, -1)
    assert torch.equal(shown["reconstruction"][~hidden], shown["truth"][~hidden])
    assert not torch.equal(shown["reconstruction"][hidden], shown["truth"][hidden])
    assert torch.equal(shown["masked"][~hidden], shown["truth"][~hidden])
    assert torch.unique(shown["masked"][hidden]).numel() <= 3  # one filling


@pytest.mark.parametrize(
    ("image_size", "values", "message"),
    [
        (100, {}, "multiple of 32"),
        (0, {}, "multiple of 32"),
        (96, {"block": 64}, r"task\.block=64"),
        (32, {}, "leaves nothing to see"),
        (64, {"ratio": 0.1}, "leaves nothing to see or nothing to predict"),
    ],
)
def test_a_size_that_blocks_do_not_fill_is_refused(
    image_size: int, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Inpainting.views(InpaintingConfig(**values), image_size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch": 24}, "patch=24 does not divide block=32"),
        ({"scales": [16]}, "must hold 8"),
        ({"scales": [8, 8]}, "must hold 8"),
        ({"scales": [8, 64]}, r"task\.scales"),
        ({"ratio": 1.0}, r"task\.ratio"),
        ({"block": 20}, r"task\.block"),
        ({"block": 16, "encoder": "sparse"}, "whole cells of 32 px in a block, not 16"),
        ({"loss": "l3"}, r"task\.loss"),
        ({"target": "sift"}, r"task\.target"),
        (
            {"target": "features", "block": 16, "scales": [8, 32]},
            "target=features needs whole cells of every stride in a block: block=16 is not",
        ),
        ({"crop_scale": [0.5, 2.0]}, "crop_scale"),
    ],
)
def test_an_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(InpaintingConfig, values, prefix="task.")


def test_a_neck_is_trained_and_kept(make_task: MakeTask, make_batch: MakeBatch) -> None:
    task = make_task(neck="n")
    assert set(task.product()) == {"backbone", "neck"}
    assert set(make_task().product()) == {"backbone"}
    task(make_batch(Inpainting, task.config)).loss.backward()
    neck = task.product()["neck"]
    assert all(parameter.grad is not None for parameter in neck.parameters())


def test_a_decoder_sees_a_token_for_every_cell_that_a_sparse_encoder_left_empty(
    make_task: MakeTask, make_batch: MakeBatch
) -> None:
    task = make_task(encoder="sparse")
    found: list[Any] = []
    task.decoder.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    batch = make_batch(Inpainting, task.config)
    task(batch)
    for level, token, cells in zip(found[0], task.tokens, (4, 2, 1), strict=True):
        hidden = spread(batch["hidden"], cells).expand_as(level)
        wanted = token.view(1, -1, 1, 1).expand_as(level)
        assert torch.equal(level[hidden], wanted[hidden])
        assert not torch.equal(level[~hidden], wanted[~hidden])


@pytest.mark.parametrize("target", ["pixels", "features"])
def test_a_hierarchical_decoder_of_a_sparse_encoder_learns_whole(
    target: str, make_task: MakeTask, make_batch: MakeBatch
) -> None:
    task = make_task(
        encoder="sparse", decoder="hierarchical", target=target, scales=(8, 16, 32), neck="n"
    )
    task(make_batch(Inpainting, task.config)).loss.backward()
    unlearned = [
        n for n, p in task.decoder.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert not unlearned
    assert isinstance(task.decoder, Hierarchical)


@pytest.mark.parametrize("neck", [None, "n"])
def test_features_that_are_predicted_rightly_cost_nothing(
    make_task: MakeTask, make_batch: MakeBatch, neck: str | None
) -> None:
    task = make_task(target="features", scales=(8, 16, 32), neck=neck)
    batch = make_batch(Inpainting, task.config)
    image = (batch["image"] / 255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (task.backbone.mean, task.backbone.std))
    with torch.no_grad():  # the copy is the network still, and sees the whole picture
        levels = task.through(task.backbone((image - mean) / std))
    right = {}
    for scale, level in zip((8, 16, 32), levels, strict=True):
        middle, spread_ = level.mean((0, 2, 3), keepdim=True), level.var((0, 2, 3), keepdim=True)
        right[scale] = (level - middle) / spread_.sqrt()
    hook = task.decoder.register_forward_hook(lambda *_: right)
    output = task(batch)
    assert output.loss.item() < 0.01  # the unbiased variance of 4 cells here, the biased one there
    assert output.metrics["hidden_cosine"].item() > 0.999
    shown = task.pictures(batch)
    assert set(shown) == {"masked", "reconstruction", "features", "truth"}
    assert torch.equal(shown["truth"], batch["image"].permute(0, 3, 1, 2))
    hook.remove()
    nothing = {scale: torch.zeros_like(map_) for scale, map_ in right.items()}
    task.decoder.register_forward_hook(lambda *_: nothing)
    assert 0.5 < task(batch).loss.item() < 1.5
