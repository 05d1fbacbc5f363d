"""Every task on pictures of one and of five channels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch

from groundwork.backbones.contract import Backbone
from groundwork.config import Section
from groundwork.data.bands import write_bands
from groundwork.data.decode import open_picture
from groundwork.data.reading import Reading
from groundwork.errors import UsageError
from pretext_tasks import TASKS, load_task
from pretext_tasks.contract import PretextTask
from pretext_tasks.inpainting import Inpainting, InpaintingConfig

IMAGE_SIZE = 64


def _tiff(seed: int, channels: int) -> bytes:
    """Blocks of 16 pixels, in every channel others."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 10, channels), dtype=np.uint8)
    file = io.BytesIO()
    write_bands(file, blocks.repeat(16, 0).repeat(16, 1))
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"distill", "self_training"}))
def test_a_task_learns_from_any_number_of_channels(
    name: str, channels: int, tiny_backbone: Callable[..., Backbone]
) -> None:
    kind = load_task(name)
    config = kind.Config()
    if name == "regions":  # its smaller view is OpenCV's, which knows four channels
        config = kind.Config.model_validate({"regions": {"resolutions": (45,)}})
    reading = Reading(bands=tuple(range(1, channels + 1)))
    views = kind.views(config, IMAGE_SIZE)
    samples = [
        views(open_picture(_tiff(n, channels), reading), np.random.default_rng(n)) for n in range(4)
    ]
    for entry in samples[0].values():
        assert entry.ndim < 3 or entry.dtype != np.uint8 or entry.shape[-1] == channels
    batch = {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]}
    torch.manual_seed(0)
    task = kind(tiny_backbone(channels), config)
    losses = []
    for _ in range(6):
        task.zero_grad()
        loss = task(batch).loss
        loss.backward()
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    assert parameter.grad.isfinite().all()
                    parameter.add_(parameter.grad, alpha=-0.01)
        task.after_step(0.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for shown in task.pictures(batch).values():
        assert shown.shape[:2] == (4, 3)
        assert shown.dtype == torch.uint8


def test_the_other_ways_of_inpainting_know_channels(tiny_backbone: Callable[..., Backbone]) -> None:
    config = InpaintingConfig(filling="token", scales=(8, 16, 32))
    views = Inpainting.views(config, IMAGE_SIZE)
    reading = Reading(bands=(1, 2, 3, 4))
    samples = [
        views(open_picture(_tiff(n, 4), reading), np.random.default_rng(n)) for n in range(2)
    ]
    batch = {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]}
    task = Inpainting(tiny_backbone(4), config)
    task(batch).loss.backward()
    assert task.token.shape == (4,)
    assert task.token.grad is not None


@pytest.mark.parametrize("name", ["distill", "self_training"])
def test_a_teacher_of_three_channels_is_not_asked_about_four(
    name: str,
    tiny_backbone: Callable[..., Backbone],
    default_config: Callable[[type[PretextTask]], Section],
) -> None:
    kind = load_task(name)
    with pytest.raises(UsageError, match=r"4 channels|have 4"):
        kind(tiny_backbone(4), default_config(kind))
