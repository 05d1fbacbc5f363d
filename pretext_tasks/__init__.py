"""The pretext tasks, by name. A new one is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretext_tasks.contract import PretextTask

# Names with the place of their class: a mistyped command is answered before torch is imported.
TASKS = {
    "byol": "pretext_tasks.byol:BYOL",
    "inpainting": "pretext_tasks.inpainting:Inpainting",
    "jigsaw": "pretext_tasks.jigsaw:Jigsaw",
    "simclr": "pretext_tasks.simclr:SimCLR",
}


def load_task(name: str) -> type[PretextTask]:
    """Import the class of a task in TASKS; raises KeyError for another name."""
    module, _, attribute = TASKS[name].partition(":")
    task: type[PretextTask] = getattr(import_module(module), attribute)
    return task
