"""What a pretext task is: views made in the worker, a loss computed on the device.

A task owns its views, heads, targets, queues and centres (submodules and persistent buffers: its
state_dict is the whole truth) and its loss. Its only clock is `progress`. It never opens files,
builds loaders, optimisers or schedules, calls backward, step, autocast or .to, asks for rank or
world size, logs, saves, or makes modules after __init__.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from groundwork.backbones.contract import Backbone
from groundwork.config import Section
from groundwork.data.decode import Picture
from groundwork.data.memory import Memory
from groundwork.data.reading import Reading


class StepOutput(NamedTuple):
    """What one forward gives: a scalar float32 loss, and detached scalars worth logging."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Views(Protocol):
    """Makes one sample's views; runs in a data worker, so it must be picklable.

    All randomness comes from `generator`, which belongs to the sample's position in the stream.
    Pictures are uint8, H W C as in the picture (no normalisation, no colour); every other entry is
    a number or a small array drawn for them: colour parameters, a mask, a permutation. The entries
    of a batch are stacked along a new first dimension, so shapes must not depend on the picture.
    """

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the sample's entries of the batch, by name."""


@runtime_checkable
class RememberingViews(Views, Protocol):
    """Views that keep what they work out of a whole picture, the same for every view of it."""

    def with_memory(self, memory: Memory) -> Views:
        """Return views that are the same and remember there."""


def remembering(views: Views, memory: Memory) -> Views:
    """Give views a memory, where they have a use for it."""
    return views.with_memory(memory) if isinstance(views, RememberingViews) else views


class PretextTask(nn.Module, ABC):
    """A pretext task around a backbone. `Config` holds the paper's values, each with its source."""

    Config: ClassVar[type[Section]]
    # Whether features of few directions are a collapse. Where boxes are given, telling one kind of
    # thing from all else may want no more.
    rank_matters: bool = True

    @classmethod
    @abstractmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of views; `image_size` is the side in pixels of what the network sees.

        Raises UsageError where image_size does not suit the task.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Colour and normalise the batch, run the network, return the loss. DDP's only entry."""

    def after_step(self, progress: float) -> None:
        """Move targets after an optimiser step that counted. `progress` runs from 0 to 1."""

    @abstractmethod
    def product(self) -> dict[str, nn.Module]:
        """Return what is kept: {"backbone": Backbone}, and "neck" and "head" where trained."""

    def metadata(self) -> dict[str, Any]:
        """Return what the product's file is to say beside its tensors; JSON-able."""
        return {}

    def warnings(self, image_size: int, reading: Reading) -> list[str]:
        """Return what a person should know of views of this size, of pictures read so."""
        return []

    @abstractmethod
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a person would want to see, by name: uint8 N 3 H W on the CPU."""


def backbone_of(task: PretextTask) -> Backbone:
    """Return the backbone that a task keeps."""
    backbone = task.product()["backbone"]
    assert isinstance(backbone, Backbone)
    return backbone
