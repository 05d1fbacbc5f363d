"""What changes while a detector trains, as a function of progress: stretches of one setting each.

Batch size and picture sizes may change by phase (recipe.phases), and mosaic and mixing end before
the budget does (recipe.augment.close). Between two such points everything is the same: a stretch.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.recipe import Recipe
from groundwork.clock import Clock


@dataclass(frozen=True)
class Stretch:
    """A part of the budget in which every batch is made alike; `until` is the share at its end."""

    number: int
    until: float
    batch_size: int
    sizes: tuple[int, ...]
    mixing: bool


class Plan:
    """The stretches of a recipe in their order, and the clock of its budget."""

    def __init__(self, recipe: Recipe, pictures: int, seconds: float) -> None:
        ends = {1.0, *(phase.until for phase in recipe.phases)}
        if 0 < recipe.augment.close < 1:
            ends.add(1 - recipe.augment.close)
        self.stretches: list[Stretch] = []
        begin = 0.0
        samples = 0.0  # of a step, on average over the budget
        for number, until in enumerate(sorted(ends)):
            phase = next((one for one in recipe.phases if until <= one.until), None)
            batch_size = (phase and phase.batch_size) or recipe.batch_size
            sizes = (phase and phase.image_sizes) or recipe.image_sizes or (recipe.image_size,)
            mixing = begin < 1 - recipe.augment.close
            self.stretches.append(Stretch(number, until, batch_size, tuple(sizes), mixing))
            samples += (until - begin) * batch_size
            begin = until
        self.clock = Clock(recipe.budget, pictures, samples, seconds)

    def stretch(self, progress: float) -> Stretch:
        """Return what holds for a step that begins at this share of the budget."""
        return next((one for one in self.stretches if progress < one.until), self.stretches[-1])
