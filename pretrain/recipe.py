"""Every key of a pretraining recipe with its default, and how the three layers become one.

Defaults here < a recipe file (only what differs) < key=value on the command line. The keys below
`task.` are those of the task's own Config; their defaults are the paper's. Nothing here imports
torch, so that a mistake is told before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from groundwork.config import Section, keys_of, merge, nearest, parse_overrides, read_yaml, validate
from groundwork.errors import UsageError
from groundwork.settings import Ema, Optimiser, ProbeSettings, Schedule
from pretext_tasks import TASKS

Count = Annotated[int, Field(ge=1)]


class Data(Section):
    """Where the pictures come from, and how they are read."""

    train: str | tuple[str, ...] = "scenes"  # a folder, shards, a URL, a list of these, or scenes
    workers: Annotated[int, Field(ge=0)] | None = None  # of each rank; null: cores less one, max 8
    window_shards: Count = 16  # samples are shuffled inside a window of so many shards
    cache: str | None = None  # for drawn scenes, remote shards, foreign indexes
    cache_gb: Annotated[float, Field(gt=0)] = 50.0  # bound of the local copy of remote shards
    on_error: Literal["skip", "raise"] = "skip"  # what an unreadable picture does
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # of the pictures of the data
    max_pixels: Count = 100_000_000  # a larger picture is refused before it is decoded

    def cache_folder(self) -> Path:
        """Return the folder for what is made or fetched once."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.cache or f"{base}/groundwork").expanduser()


class BackboneKeys(Section):
    """Which backbone is trained: yolo12n, s, m, l, x, or timm/<model>."""

    name: str = "yolo12n"


class Budget(Section):
    """How long to train: exactly one of these is set. Progress runs from 0 to 1 over it."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Count | None = None
    samples: Count | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None  # of the loop's wall clock

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        chosen = [name for name, value in self if value is not None]
        if len(chosen) != 1:
            raise ValueError(
                "set exactly one of budget.epochs, budget.steps, budget.samples, budget.minutes, "
                f"not {len(chosen)}"
            )
        return self


class CheckpointKeys(Section):
    """How often a checkpoint is saved, and how many of the newest are kept."""

    every_steps: Count = 500
    keep: Count = 3


class Log(Section):
    """How often metrics are written; trackers are Accelerate's (tensorboard, wandb, ...)."""

    every_steps: Count = 10
    samples: bool = False  # also write which pictures each rank saw, to samples-<rank>.jsonl
    trackers: tuple[str, ...] = ()


class Guard(Section):
    """What happens when gradients are not finite: the step is skipped on every rank.

    After `skips` in a row the last checkpoint's weights come back with the learning rate halved
    and the stream goes on behind the bad batches; after `rollbacks` of these the run ends (5).
    """

    skips: Count = 10
    rollbacks: Annotated[int, Field(ge=0)] = 2


class Recipe(Section):
    """A pretraining recipe, resolved: what runs is what is written in the run folder."""

    task: dict[str, JsonValue]  # name, and the keys of the task's Config
    backbone: BackboneKeys = BackboneKeys()
    data: Data = Data()
    image_size: Annotated[int, Field(ge=32, multiple_of=32)] = 224  # what the network sees, px
    batch_size: Count = 64  # of one optimiser step, over all ranks
    accumulate: Count = 1  # forwards for one optimiser step
    budget: Budget = Budget(epochs=100)
    optim: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    probe: ProbeSettings = ProbeSettings()
    checkpoint: CheckpointKeys = CheckpointKeys()
    log: Log = Log()
    guard: Guard = Guard()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # compiles the backbone in place
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    threads: Count | None = None  # of a one-process CPU run; null: all allowed cores

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: dict[str, Any]) -> dict[str, Any]:
        name = task.get("name")
        if not isinstance(name, str) or name not in TASKS:
            known = ", ".join(sorted(TASKS))
            hint = nearest(str(name), list(TASKS))
            raise ValueError(f"'{name}' is no task; these are: {known}.{hint}")
        return task

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}"
            )
        return self

    @property
    def task_name(self) -> str:
        """The task's name in TASKS."""
        return str(self.task["name"])

    def task_keys(self) -> dict[str, Any]:
        """The keys of the task's own Config, as they were given."""
        return {key: value for key, value in self.task.items() if key != "name"}


# A later layer that sets one budget replaces the earlier layer's.
WHOLE = frozenset({"budget"})


def resolve(task: str | None, recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """Lay the layers over each other. Raises UsageError for anything that is not a known key.

    `task` alone takes recipes/pretrain/<task>.yaml; `recipe` is a path, or a name of
    recipes/pretrain. Where both are given, the task replaces the recipe's.
    """
    if task is not None and task not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise UsageError(
            f"--task {task} is not known; the tasks are: {known}." + nearest(task, list(TASKS))
        )
    if recipe is None and task is None:
        raise UsageError(
            f"Say what to train: --task NAME with one of {', '.join(sorted(TASKS))}, or --recipe."
        )
    values = read_yaml(find_recipe(recipe or str(task)))
    if task is not None:
        below = values.get("task")
        if isinstance(below, dict) and below.get("name") not in (None, task):
            below = None  # another task's keys
        values["task"] = {**(below or {}), "name": task}
    return build(merge(values, parse_overrides(overrides), WHOLE))


def build(values: dict[str, Any]) -> Recipe:
    """Validate a nested dict as a Recipe; raises UsageError."""
    return validate(Recipe, values)


def with_task_defaults(recipe: Recipe, config: type[Section]) -> tuple[Recipe, Section]:
    """Validate the task's own keys and write its defaults into the recipe.

    Raises UsageError naming the key below `task.` that is wrong.
    """
    given = validate(config, recipe.task_keys(), prefix="task.")
    task = {"name": recipe.task_name, **given.model_dump(mode="json")}
    return recipe.model_copy(update={"task": task}), given


def find_recipe(name: str) -> Path:
    """Return the path of a recipe given by path or by its name in recipes/pretrain."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return Path(name)
    folder = Path(str(resources.files("recipes"))) / "pretrain"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        raise UsageError(
            f"There is no recipe '{name}'; these are: {', '.join(known)}." + nearest(name, known)
        )
    return path


def all_keys() -> list[str]:
    """List every key of a recipe but the task's own."""
    return keys_of(Recipe)


# Keys that make another model or another stream: a resumed run must not change them.
FIXED = ("task", "backbone", "seed", "image_size", "optim.name", "data.window_shards", "ema")


def refuse_changes(old: Recipe, new: Recipe) -> list[str]:
    """Compare the recipe of a checkpoint with the one asked for on resume.

    Returns a line for every harmless change; raises UsageError for one that would make another
    model or another order of the data.
    """
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    fixed = [line for line in changed if line.split(":")[0].startswith(FIXED)]
    if fixed:
        raise UsageError(
            "A resumed run cannot change "
            + "; ".join(fixed)
            + ". Start a new run with --init instead."
        )
    return changed


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves.update(_leaves(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves
