"""The pretext tasks, by name. A new one is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretext_tasks.contract import PretextTask

# Names with the place of their class: a mistyped command is answered before torch is imported.
TASKS = {
    "byol": "pretext_tasks.byol:BYOL",
    "dense": "pretext_tasks.dense:Dense",
    "distill": "pretext_tasks.distill:Distill",
    "inpainting": "pretext_tasks.inpainting:Inpainting",
    "jigsaw": "pretext_tasks.jigsaw:Jigsaw",
    "lejepa": "pretext_tasks.lejepa:LeJEPA",
    "regions": "pretext_tasks.regions:Regions",
    "self_training": "pretext_tasks.self_training:SelfTraining",
    "simclr": "pretext_tasks.simclr:SimCLR",
}


def parts_of(name: str) -> list[str]:
    """Return the tasks that a name asks for: byol+inpainting is two at once.

    Raises KeyError naming the part that is not in TASKS, or is there twice.
    """
    parts = name.split("+")
    for number, part in enumerate(parts):
        if part not in TASKS or part in parts[:number]:
            raise KeyError(part)
    return parts


def load_task(name: str) -> type[PretextTask]:
    """Import the class of a task in TASKS, or make that of several; KeyError as by parts_of."""
    parts = parts_of(name)
    if len(parts) > 1:
        from pretext_tasks.together import together

        return together(name, {part: load_task(part) for part in parts})
    module, _, attribute = TASKS[name].partition(":")
    task: type[PretextTask] = getattr(import_module(module), attribute)
    return task
