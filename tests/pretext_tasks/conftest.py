"""A backbone small enough for tests, and batches as the loader would make them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groundwork.backbones.contract import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Level,
    Pyramid,
    for_channels,
)
from groundwork.config import Section
from groundwork.data.decode import open_picture
from pretext_tasks import TASKS, load_task
from pretext_tasks.contract import PretextTask
from tests.record_golden import needed

MakeBatch = Callable[..., dict[str, Tensor]]


class TinyBackbone(Backbone):
    """Three strided convolutions with BatchNorm."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.name = "tiny"
        self.levels = (Level(8, 8), Level(16, 12), Level(32, 16))
        self.mean, self.std = (for_channels(x, channels) for x in (IMAGENET_MEAN, IMAGENET_STD))
        self.stage_3 = nn.Sequential(nn.Conv2d(channels, 8, 8, 8), nn.BatchNorm2d(8), nn.SiLU())
        self.stage_4 = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.BatchNorm2d(12), nn.SiLU())
        self.stage_5 = nn.Sequential(nn.Conv2d(12, 16, 2, 2), nn.BatchNorm2d(16), nn.SiLU())

    def forward(self, image: Tensor) -> Pyramid:
        c3 = self.stage_3(image)
        c4 = self.stage_4(c3)
        return Pyramid(c3, c4, self.stage_5(c4))


@pytest.fixture
def tiny_backbone() -> Callable[..., Backbone]:
    return TinyBackbone


@pytest.fixture
def make_batch(make_jpeg: Callable[..., bytes]) -> MakeBatch:
    """Make a batch of `count` pictures, of several sizes, through the task's own views."""

    def make(
        task: type[PretextTask],
        config: Section,
        image_size: int = 64,
        count: int = 4,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        views = task.views(config, image_size)
        samples = [
            views(
                open_picture(make_jpeg(seed + index, 160 + 16 * index, 120)),
                np.random.Generator(np.random.Philox(key=[seed, index])),
            )
            for index in range(count)
        ]
        return {
            name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
            for name in samples[0]
        }

    return make


@pytest.fixture(scope="session")
def default_config(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[type[PretextTask]], Section]:
    """Give a task's default configuration; a task that wants a file gets a small one."""

    def make(kind: type[PretextTask]) -> Section:
        [name] = [name for name in TASKS if load_task(name) is kind]
        return kind.Config.model_validate(needed(name, tmp_path_factory.mktemp("teacher")))

    return make
