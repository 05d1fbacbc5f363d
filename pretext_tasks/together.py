"""Several tasks at once on one backbone: `--task byol+inpainting`.

Every task makes its own views of a picture, has its own heads and targets, and gives its own loss;
the sum of the losses, weighted, is what is trained on. Tasks that train a neck share it. Below
`task.` each has its own keys (`task.byol.momentum`), and there are `task.weights` and
`task.image_sizes`, by name; what is not named weighs 1 and sees the recipe's image_size.

Source: the sum of pretext losses on a shared trunk is multi-task self-supervision (Doersch and
Zisserman 2017, arXiv 1708.07860, section 4). Differs from the paper: there are no lasso weights
over layers; every task reads the levels that it reads alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, create_model
from torch import Tensor, nn

from groundwork.backbones.contract import Backbone
from groundwork.config import Section
from groundwork.data.decode import Picture
from groundwork.data.memory import Memory
from groundwork.data.reading import Reading
from groundwork.errors import UsageError
from groundwork.necks.yolo12 import YOLO12Neck
from pretext_tasks.contract import PretextTask, StepOutput, Views, remembering
from pretext_tasks.through_neck import ThroughNeck

_AT = "/"  # between a task's name and the name of an entry, a metric or a picture


@dataclass(frozen=True)
class TogetherViews:
    """Lets every task cut its views of a picture, one after the other."""

    parts: tuple[tuple[str, Views], ...]

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return all tasks' entries, each called <task>/<entry>."""
        return {
            f"{name}{_AT}{entry}": value
            for name, views in self.parts
            for entry, value in views(picture, generator).items()
        }

    def with_memory(self, memory: Memory) -> TogetherViews:
        """Give every task's views a memory that have a use for it."""
        return TogetherViews(tuple((name, remembering(v, memory)) for name, v in self.parts))


class Together(PretextTask):
    """The tasks of `kinds`, around one backbone; made by `together`."""

    kinds: dict[str, type[PretextTask]]

    def __init__(self, backbone: Backbone, config: Any) -> None:
        super().__init__()
        self.weights: dict[str, float] = {
            name: config.weights.get(name, 1.0) for name in self.kinds
        }
        self.image_sizes: dict[str, int] = dict(config.image_sizes)
        self.tasks = nn.ModuleDict(
            {name: kind(backbone, getattr(config, name)) for name, kind in self.kinds.items()}
        )
        self.rank_matters = any(task.rank_matters for _, task in self._tasks())
        self._share_the_neck()
        heads = [name for name, task in self._tasks() if "head" in task.product()]
        if len(heads) > 1:
            raise UsageError(
                f"{' and '.join(heads)} each train a head, and a file has one: take them one after "
                "the other, the second with --init of the first."
            )

    def _share_the_neck(self) -> None:
        """Let every task that trains a neck train the first one's. Raises UsageError."""
        shared: YOLO12Neck | None = None
        for name, task in self._tasks():
            if not isinstance(task, ThroughNeck) or task.neck is None:
                continue
            if shared is None:
                shared = task.neck
            elif task.neck.letter != shared.letter:
                raise UsageError(
                    f"task.{name}.neck={task.neck.letter}, and another task's is "
                    f"{shared.letter}: tasks that are trained together share one neck."
                )
            task.neck = shared

    def _tasks(self) -> list[tuple[str, PretextTask]]:
        return [(name, task) for name, task in self.tasks.items() if isinstance(task, PretextTask)]

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of all views; `image_size` is for tasks that image_sizes leaves out."""
        return TogetherViews(
            tuple(
                (name, kind.views(getattr(config, name), config.image_sizes.get(name, image_size)))
                for name, kind in cls.kinds.items()
            )
        )

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the weighted sum of the losses. Metrics: every task's, and its loss."""
        losses, metrics = [], {}
        for name, task in self._tasks():
            output = task(_own(name, batch))
            losses.append(self.weights[name] * output.loss)
            metrics[f"{name}_loss"] = output.loss.detach()
            metrics |= {f"{name}_{metric}": value for metric, value in output.metrics.items()}
        return StepOutput(torch.stack(losses).sum(), metrics)

    def after_step(self, progress: float) -> None:
        """Move every task's targets."""
        for _, task in self._tasks():
            task.after_step(progress)

    def product(self) -> dict[str, nn.Module]:
        """Return the backbone, and the neck of the task that trains one."""
        kept: dict[str, nn.Module] = {}
        for _, task in self._tasks():
            kept |= task.product()
        return kept

    def metadata(self) -> dict[str, Any]:
        """Return what every task has to say."""
        return {key: fact for _, task in self._tasks() for key, fact in task.metadata().items()}

    def warnings(self, image_size: int, reading: Reading) -> list[str]:
        """Return what every task has to say, of the size that it sees."""
        return [
            warning
            for name, task in self._tasks()
            for warning in task.warnings(self.image_sizes.get(name, image_size), reading)
        ]

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every task's pictures."""
        return {
            f"{name}-{shown}": pictures
            for name, task in self._tasks()
            for shown, pictures in task.pictures(_own(name, batch)).items()
        }


def together(name: str, kinds: dict[str, type[PretextTask]]) -> type[PretextTask]:
    """Make the task of several, each with its name."""
    fields: dict[str, Any] = {one: (kind.Config, kind.Config()) for one, kind in kinds.items()}
    fields["weights"] = (dict[str, float], Field(default={}))
    fields["image_sizes"] = (dict[str, int], Field(default={}))
    base = create_model(f"{name}Config", __base__=Section, **fields)

    class Config(base):  # type: ignore[valid-type, misc]
        """The tasks' own keys, and what each weighs and sees."""

        def model_post_init(self, context: Any) -> None:
            for key in ("weights", "image_sizes"):
                if unknown := sorted(set(getattr(self, key)) - kinds.keys()):
                    raise ValueError(f"{key}: {unknown[0]} is none of {', '.join(kinds)}")
            if any(not weight > 0 for weight in self.weights.values()):
                raise ValueError("weights must be above 0: leave a task out instead")

    return type("Together", (Together,), {"kinds": kinds, "Config": Config})


def _own(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    start = name + _AT
    return {k.removeprefix(start): v for k, v in batch.items() if k.startswith(start)}
