"""Every key of a pretraining recipe with its default, and how the three layers become one.

Defaults here < a recipe file (only what differs) < key=value on the command line. The keys below
`task.` are those of the task's own Config; their defaults are the paper's. Nothing here imports
torch, so that a mistake is told before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import JsonValue, field_validator, model_validator

from groundwork.config import (
    Section,
    changes_on_resume,
    find_recipe,
    merge,
    nearest,
    parse_overrides,
    read_yaml,
    validate,
)
from groundwork.errors import UsageError
from groundwork.settings import (
    WHOLE,
    Count,
    Data,
    Ema,
    Optimiser,
    ProbeSettings,
    RunKeys,
    Schedule,
    Side,
)
from pretext_tasks import TASKS, parts_of


class Recipe(RunKeys):
    """A pretraining recipe, resolved: what runs is what is written in the run folder."""

    task: dict[str, JsonValue]  # name, and the keys of the task's Config
    data: Data = Data()
    image_size: Side = 224  # what the network sees, px
    batch_size: Count = 64
    optim: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    probe: ProbeSettings = ProbeSettings()

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: dict[str, Any]) -> dict[str, Any]:
        name = task.get("name")
        try:
            parts_of(str(name))
        except KeyError as error:
            raise ValueError(_unknown(str(name), str(error.args[0]))) from error
        return task

    @model_validator(mode="after")
    def _drawn_objects_have_colours(self) -> Self:
        channels, probe = self.data.reading().channels, self.probe
        for key, path in (
            ("labeled", probe.labeled),
            ("val", probe.val),
            ("detection.data", probe.detection.data),
            ("detection.val", probe.detection.val),
        ):
            if path == "scenes" and channels != 3:
                raise ValueError(
                    f"probe.{key}=scenes: drawn objects have three channels and data.bands names "
                    f"{channels}: set probe.{key}=null, or name pictures of your own"
                )
        return self

    @property
    def task_name(self) -> str:
        """The task's name in TASKS."""
        return str(self.task["name"])

    def task_keys(self) -> dict[str, Any]:
        """The keys of the task's own Config, as they were given."""
        return {key: value for key, value in self.task.items() if key != "name"}


def resolve(task: str | None, recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """Lay the layers over each other. Raises UsageError for anything that is not a known key.

    `task` alone takes recipes/pretrain/<task>.yaml; `recipe` is a path, or a name of
    recipes/pretrain. Where both are given, the task replaces the recipe's.
    """
    try:
        parts = [] if task is None else parts_of(task)
    except KeyError as error:
        raise UsageError(f"--task {_unknown(str(task), str(error.args[0]))}") from error
    if recipe is None and task is None:
        raise UsageError(
            f"Say what to train: --task NAME with one of {', '.join(sorted(TASKS))}, or --recipe."
        )
    given = parse_overrides(overrides)
    if recipe is None and len(parts) > 1:
        values = _joined(parts)
        if "image_size" in given:  # one size for all that do not have their own on the line
            del values["task"]["image_sizes"]
        return build(merge(_without_scenes(values, given), given, WHOLE))
    values = read_yaml(find_recipe(recipe or str(task), "pretrain"))
    if task is not None:
        below = values.get("task")
        if isinstance(below, dict) and below.get("name") not in (None, task):
            below = None  # another task's keys
        values["task"] = {**(below or {}), "name": task}
    return build(merge(_without_scenes(values, given), given, WHOLE))


def _without_scenes(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Take drawn objects out of a recipe's probe where the line names pictures of one's own.

    How well drawn vehicles are told apart says nothing of features for other pictures.
    """
    own = given.get("data", {}).get("train", "scenes") != "scenes"
    if own and values.get("probe", {}).get("labeled") == "scenes":
        return {**values, "probe": {**values["probe"], "labeled": None}}
    return values


def _unknown(name: str, part: str) -> str:
    known = ", ".join(sorted(TASKS))
    if part in TASKS:
        return f"{name} has {part} twice."
    return f"{part} is not known; the tasks are: {known}.{nearest(part, list(TASKS))}"


def _joined(parts: Sequence[str]) -> dict[str, Any]:
    """Lay the recipes of several tasks side by side: the first one's, with every task's own keys.

    A task whose recipe has another image_size keeps it.
    """
    recipes = [read_yaml(find_recipe(part, "pretrain")) for part in parts]
    default = Recipe.model_fields["image_size"].default
    sizes = [recipe.get("image_size", default) for recipe in recipes]
    task: dict[str, Any] = {"name": "+".join(parts), "image_sizes": {}}
    for part, recipe, size in zip(parts, recipes, sizes, strict=True):
        task[part] = {key: value for key, value in recipe["task"].items() if key != "name"}
        if size != sizes[0]:
            task["image_sizes"][part] = size
    return {**recipes[0], "task": task}


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


# Keys that make another model or another stream: a resumed run must not change them.
FIXED = (
    "task", "backbone", "seed", "image_size", "optim.name", "data.window_shards", "data.bands",
    "data.value_range", "ema",
)  # fmt: skip
# A teacher's file may have moved: its weights are in the checkpoint, or what tells it from others.
FREE = ("task.weights", "task.distill.weights", "task.self_training.weights")


def refuse_changes(old: Recipe, new: Recipe) -> list[str]:
    """Return a line for every harmless change on resume; raises UsageError for another kind."""
    return changes_on_resume(old, new, FIXED, FREE)
