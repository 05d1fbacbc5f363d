"""Jigsaw: permutations that are far apart, tiles that fit, and no way around looking at them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from groundwork.backbones.contract import IMAGENET_MEAN, IMAGENET_STD, Backbone
from groundwork.colour import Colour
from groundwork.config import validate
from groundwork.data.decode import Picture, open_picture
from groundwork.errors import UsageError
from pretext_tasks.jigsaw import (
    Jigsaw,
    JigsawConfig,
    JigsawViews,
    choose_permutations,
    normalise_each,
    put_together,
)

MakeBatch = Callable[..., dict[str, Tensor]]

SMALL = JigsawConfig(grid=2, tile_width=8, hidden_width=16)
# Nothing but the cut and the shuffle.
BARE: dict[str, Any] = {
    "gap": 0.0,
    "crop_side": (1.0, 1.0),
    "flip": 0.0,
    "grayscale": 0.0,
    "channel_shift": 0,
}


def _generator(position: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[0, position]))


def _distances(permutations: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Hamming distances of all pairs, each once."""
    pairs = itertools.combinations(permutations, 2)
    return np.array([np.count_nonzero(left != right) for left, right in pairs])


@pytest.mark.parametrize(
    ("grid", "number", "least"),
    [
        # Rows of a Latin square differ in every place: n permutations of n tiles, and no more,
        # because two of n + 1 would have the same tile in the first place.
        (2, 4, 4),
        (3, 9, 9),
        # All of them: the nearest differ by one transposition.
        (2, 24, 2),
    ],
)
def test_chosen_permutations_are_as_far_apart_as_can_be(grid: int, number: int, least: int) -> None:
    for seed in range(5):
        permutations = choose_permutations(grid, number, seed)
        assert _distances(permutations).min() == least


def test_a_hundred_permutations_of_nine_tiles_differ_in_six_places_or_more() -> None:
    permutations = choose_permutations(3, None, 0)
    assert permutations.shape == (100, 9)
    assert (np.sort(permutations, axis=1) == np.arange(9)).all()
    distances = _distances(permutations)
    assert distances.min() == 6
    # Random permutations agree in one place on average, so that some pairs agree in five.
    assert distances.mean() >= 8


def test_each_permutation_is_the_farthest_from_those_before_it() -> None:
    """The greedy rule by brute force: smallest distance first, sum of distances second."""
    chosen = choose_permutations(2, 10, 3)
    everything = np.array(list(itertools.permutations(range(4))), np.uint8)
    for number in range(1, 10):
        before = chosen[:number]
        distance = (everything[:, None] != before[None]).sum(axis=2)
        ranks = sorted(zip(distance.min(axis=1), distance.sum(axis=1), strict=True))
        own = (chosen[number] != before).sum(axis=1)
        assert (own.min(), own.sum()) == ranks[-1]


def test_permutations_depend_on_the_seed_alone() -> None:
    first = choose_permutations(3, 20, 5)
    assert np.array_equal(first, choose_permutations(3, 20, 5))
    assert not np.array_equal(first, choose_permutations(3, 20, 6))
    # Fewer are the first of more: the greedy choice never looks ahead.
    assert np.array_equal(first[:8], choose_permutations(3, 8, 5))


def test_permutations_are_these_on_every_machine() -> None:
    """Golden: a checkpoint's classes must keep their meaning."""
    assert choose_permutations(2, 4, 0).tolist() == GOLDEN_2X2
    assert choose_permutations(3, 3, 0).tolist() == GOLDEN_3X3


GOLDEN_2X2 = [[0, 1, 2, 3], [2, 3, 1, 0], [3, 2, 0, 1], [1, 0, 3, 2]]
GOLDEN_3X3 = [[5, 3, 6, 8, 4, 0, 7, 1, 2], [7, 8, 4, 2, 6, 1, 3, 0, 5], [4, 6, 7, 5, 1, 8, 2, 3, 0]]


def test_choosing_a_hundred_takes_under_two_seconds() -> None:
    start = time.process_time()
    choose_permutations(3, 100, 0)
    assert time.process_time() - start < 2


@pytest.mark.slow
def test_a_thousand_permutations_differ_in_five_places_or_more() -> None:
    permutations = choose_permutations(3, 1000, 0)
    assert len(np.unique(permutations, axis=0)) == 1000
    assert _distances(permutations).min() >= 5


@pytest.mark.parametrize("grid", [2, 3])
def test_without_gaps_the_solved_puzzle_is_the_picture(
    make_jpeg: Callable[..., bytes], grid: int
) -> None:
    config = JigsawConfig(**BARE | {"grid": grid})
    data = make_jpeg(1, grid * 32, grid * 32)
    entries = Jigsaw.views(config, 32)(open_picture(data), _generator())
    permutation = choose_permutations(grid, None, 0)[entries["target"]].astype(np.int64)
    assert not np.array_equal(permutation, np.arange(grid * grid))
    tiles = torch.from_numpy(entries["tiles"])[None]
    solved = put_together(tiles, torch.from_numpy(permutation)[None], gap=0)
    truth = open_picture(data).pixels()
    assert np.array_equal(solved[0].permute(1, 2, 0).numpy(), truth)
    shown = put_together(tiles, torch.arange(grid * grid)[None], gap=0)
    assert not np.array_equal(shown[0].permute(1, 2, 0).numpy(), truth)


def test_tiles_are_laid_out_row_by_row_with_white_between() -> None:
    tiles = torch.arange(4, dtype=torch.uint8).view(1, 4, 1, 1, 1).expand(1, 4, 1, 1, 3)
    sheet = put_together(tiles, torch.tensor([[2, 0, 1, 3]]), gap=1)
    # Tile 0 belongs into place 2, tile 1 into place 0, tile 2 into place 1.
    expected = [[1, 255, 2], [255, 255, 255], [0, 255, 3]]
    assert sheet.shape == (1, 3, 3, 3)
    assert all(channel.tolist() == expected for channel in sheet[0])


class _Coordinates(Picture):
    """A picture whose red is its column and whose green and blue are its row."""

    def __init__(self, side: int) -> None:
        self.width = self.height = side

    def cut(self, boxes: Any, size: Any) -> list[npt.NDArray[np.uint8]]:
        assert size == self.width
        rows, columns = np.mgrid[:size, :size].astype(np.uint8)
        return [np.stack([columns, rows, rows], axis=2)]


def _corners(config: JigsawConfig, tile: int, samples: int = 60) -> npt.NDArray[np.int64]:
    """Corners of tiles within their cells: samples, tiles in order, (red x, green y, blue y)."""
    views = Jigsaw.views(config, tile)
    assert isinstance(views, JigsawViews)
    cell = tile + views.slack
    picture = _Coordinates(config.grid * cell)
    found = []
    for position in range(samples):
        entries = views(picture, _generator(position))
        ordered = np.empty_like(entries["tiles"])
        ordered[views.permutations[entries["target"]]] = entries["tiles"]
        corner = ordered[:, 0, 0].astype(np.int64)
        row, column = np.divmod(np.arange(config.grid**2), config.grid)
        found.append(corner - cell * np.stack([column, row, row], axis=1))
        assert (ordered[:, -1, -1] - ordered[:, 0, 0] == tile - 1).all()
    return np.array(found)


def test_a_tile_lies_anywhere_in_its_cell_and_never_outside() -> None:
    """64 px tiles would come from 75 px cells, as in the paper; here 32 px from 38 px."""
    config = JigsawConfig(**BARE | {"gap": 6 / 32, "crop_side": (1.0, 1.0)})
    corners = _corners(config, 32)
    assert set(corners.flatten()) == set(range(7))
    assert np.array_equal(corners[..., 1], corners[..., 2])  # channels stay together
    assert len({tuple(corner) for corner in corners[0]}) > 1  # tiles move apart from one another


def test_channels_are_shifted_by_two_pixels_at_most_and_stay_in_their_cell() -> None:
    config = JigsawConfig(**BARE | {"gap": 6 / 32, "channel_shift": 2})
    corners = _corners(config, 32)
    assert corners.min() == 0 and corners.max() == 6
    between = np.abs(corners[..., 1] - corners[..., 2])
    assert between.max() == 4 and between.min() == 0


def test_the_papers_canvas_is_225_pixels() -> None:
    views = Jigsaw.views(JigsawConfig(), 64)
    assert isinstance(views, JigsawViews)
    assert 3 * (64 + views.slack) == 225


def test_every_permutation_is_drawn(make_jpeg: Callable[..., bytes]) -> None:
    views = Jigsaw.views(SMALL, 32)
    picture = open_picture(make_jpeg(1, 80, 80))
    targets = [int(views(picture, _generator(i))["target"]) for i in range(300)]
    assert set(targets) == set(range(24))


def test_the_crop_is_a_square_of_the_side_asked_for(make_jpeg: Callable[..., bytes]) -> None:
    boxes: list[Any] = []

    class Spy(Picture):
        def __init__(self) -> None:
            self.width, self.height = 300, 100

        def cut(self, given: Any, size: Any) -> list[npt.NDArray[np.uint8]]:
            boxes.extend(given)
            return [np.zeros((size, size, 3), np.uint8)]

    views = Jigsaw.views(SMALL.model_copy(update={"crop_side": (0.5, 0.9)}), 32)
    for position in range(100):
        views(Spy(), _generator(position))
    left, top, right, bottom = np.array(boxes).T
    assert right - left == pytest.approx(bottom - top)
    assert (right - left).min() >= 50 and (right - left).max() <= 90
    assert left.min() >= 0 and right.max() <= 300 and top.min() >= 0 and bottom.max() <= 100
    assert left.min() < 30 and right.max() > 270  # the whole length of a long picture


def test_each_tile_loses_its_own_mean_and_deviation() -> None:
    tile = torch.tensor([[0.1, 0.3], [0.1, 0.3]]).expand(1, 3, 2, 2)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]).expand(1, 3, 2, 2)  # mean 0.2, std 0.1
    assert torch.allclose(normalise_each(tile), expected, atol=1e-6)
    brighter = normalise_each(torch.cat([tile, tile * 2 + 0.3]))
    assert torch.allclose(brighter[0], brighter[1], atol=1e-6)


def test_normalised_tiles_look_to_any_backbone_like_pictures_of_imagenet(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    for mean, std in (((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), (IMAGENET_MEAN, IMAGENET_STD)):
        backbone = tiny_backbone()
        backbone.mean, backbone.std = mean, std
        task = _task(backbone, grayscale=0.0)
        seen = _seen(task, make_batch(Jigsaw, task.config, 32))
        colours = seen * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        deviation, average = torch.std_mean(colours, dim=(2, 3), correction=0)
        assert torch.allclose(average, torch.tensor(IMAGENET_MEAN).expand(16, 3), atol=1e-4)
        assert torch.allclose(deviation, torch.tensor(IMAGENET_STD).expand(16, 3), atol=1e-2)


def test_a_blank_tile_is_not_blown_up() -> None:
    blank = torch.full((1, 3, 8, 8), 0.5)
    blank[:, :, 0, 0] += 1 / 255  # one pixel, one grey level
    assert normalise_each(blank).abs().max() <= 1


def _seen(task: Jigsaw, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    hook = task.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task(batch)
    hook.remove()
    return seen[0].detach()


def _task(backbone: Backbone, **changes: Any) -> Jigsaw:
    torch.manual_seed(0)
    return Jigsaw(backbone, SMALL.model_copy(update=changes))


def test_grey_puzzles_are_grey_and_the_others_are_not(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    for normalise_tiles in (True, False):
        task = _task(tiny_backbone(), normalise_tiles=normalise_tiles)
        batch = make_batch(Jigsaw, task.config, 32)
        batch["grey"] = torch.tensor([True, False, True, False])
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        colours = (_seen(task, batch) * std + mean).view(4, 4, 3, 32, 32)
        if normalise_tiles:  # every tile has been given ImageNet's mean and deviation
            colours = (colours - mean) / std
        between = (colours[:, :, 0] - colours[:, :, 1]).abs().amax(dim=(1, 2, 3))
        assert between[[0, 2]].max() < 1e-5
        assert between[[1, 3]].min() > 1e-2


def test_without_tile_normalisation_the_backbone_sees_its_own(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    task = _task(tiny_backbone(), normalise_tiles=False, grayscale=0.0)
    batch = make_batch(Jigsaw, task.config, 32)
    mean, std = torch.tensor(task.backbone.mean), torch.tensor(task.backbone.std)
    expected = (batch["tiles"].flatten(0, 1) / 255 - mean) / std
    assert torch.allclose(_seen(task, batch), expected.permute(0, 3, 1, 2), atol=1e-5)


def test_colour_is_drawn_for_each_tile_by_itself(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    jitter = Colour(probability=1.0, grayscale=0.0, blur=0.0)
    task = _task(tiny_backbone(), colour=jitter, normalise_tiles=False, grayscale=0.0)
    batch = make_batch(Jigsaw, task.config, 32)
    assert batch["colour"].shape[:2] == (4, 4)
    batch["tiles"] = torch.full_like(batch["tiles"], 128)
    batch["tiles"][..., 0] = 180
    colours = _seen(task, batch)[:, :, 0, 0]
    assert len(torch.unique(colours, dim=0)) == 16


def test_the_loss_is_the_cross_entropy_of_the_permutation(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    task = _task(tiny_backbone())
    batch = make_batch(Jigsaw, SMALL, 32)
    last = task.classifier[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        # Every class alike: log 24.
        assert task(batch).loss.item() == pytest.approx(math.log(24), abs=1e-6)
        # Class 5 has the odds 23 to 23 others: half of the probability.
        last.bias[5] = math.log(23)
        batch["target"] = torch.tensor([5, 5, 5, 0])
        output = task(batch)
    assert output.loss.item() == pytest.approx((3 * math.log(2) + math.log(46)) / 4, abs=1e-6)
    assert output.metrics["accuracy"].item() == 0.75
    agreeing = (task.permutations[5] == task.permutations[0]).float().mean().item()
    assert output.metrics["tiles_placed"].item() == pytest.approx((3 + agreeing) / 4)


def test_tiles_reach_the_head_in_their_order(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    """In eval mode no tile depends on another: shuffling tiles shuffles their features."""
    task = _task(tiny_backbone()).eval()
    batch = make_batch(Jigsaw, SMALL, 32)
    seen: list[Tensor] = []
    task.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task(batch)
    task(batch | {"tiles": batch["tiles"][:, [2, 0, 3, 1]]})
    first, second = (features.view(-1, 4, SMALL.tile_width) for features in seen)
    assert torch.allclose(first[:, [2, 0, 3, 1]], second, atol=1e-6)


def test_the_permutations_are_kept_in_the_state(tiny_backbone: Callable[[], Backbone]) -> None:
    task = _task(tiny_backbone())
    kept = task.state_dict()["permutations"]
    assert np.array_equal(kept.numpy(), choose_permutations(2, None, 0))


def test_pictures_show_puzzle_solution_and_truth(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    task = _task(tiny_backbone())
    batch = make_batch(Jigsaw, SMALL, 32)
    last = task.classifier[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():  # the network always says class 7
        last.weight.zero_()
        last.bias.zero_()
        last.bias[7] = 1
    batch["target"] = torch.tensor([7, 7, 0, 1])
    shown = task.pictures(batch)
    assert {picture.shape for picture in shown.values()} == {(4, 3, 66, 66)}
    right = [torch.equal(*pair) for pair in zip(shown["solved"], shown["truth"], strict=True)]
    assert right == [True, True, False, False]
    assert not torch.equal(shown["puzzle"], shown["truth"])


@pytest.mark.parametrize("image_size", [0, 16, 75])
def test_a_tile_that_no_backbone_takes_is_refused(image_size: int) -> None:
    with pytest.raises(UsageError, match=r"tile must be a multiple of 32"):
        Jigsaw.views(SMALL, image_size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": 2, "permutations": 25}, "4 tiles have only 24"),
        ({"grid": 4}, "task.grid"),
        ({"crop_side": [0.9, 0.5]}, "least"),
        ({"permutation": 10}, "permutations"),
    ],
)
def test_an_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(JigsawConfig, values, prefix="task.")
