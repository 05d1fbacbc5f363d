"""What a person reads of a pretraining run: what begins, what a probe found, what was learned."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from groundwork.clock import Clock
from groundwork.console import minutes
from groundwork.data.shards import Samples
from pretrain.recipe import Recipe

logger = logging.getLogger(__name__)

LEARNED = {
    "probe/knn": "Class-balanced accuracy of nearest neighbours on frozen features",
    "probe/linear": "Class-balanced accuracy of a linear probe on frozen features",
    "probe/rankme": "Effective number of feature dimensions (RankMe)",
    "probe/spread": "Spread of the features (0 collapsed, 1 everywhere)",
}


def announce(
    recipe: Recipe,
    parameters: int,
    samples: Samples,
    clock: Clock,
    folder: Path,
    processes: int,
    device: str,
) -> None:
    """Say what is about to happen."""
    logger.info(
        "%s on %s (%.2f M parameters), %d pictures of %s, %d px, batch %d, %s, %d process(es), %s.",
        recipe.task_name, recipe.backbone.name, parameters / 1e6, len(samples), samples.name,
        recipe.image_size, recipe.batch_size, clock.length, processes, device,
    )  # fmt: skip
    for place in [recipe.data.train] if isinstance(recipe.data.train, str) else recipe.data.train:
        if splits := held_out_in(Path(place)):
            logger.warning(
                "%s holds %s as well as training pictures, and all of it is trained on: name the "
                "training pictures alone where figures on the others are to count.",
                place, " and ".join(splits),
            )  # fmt: skip
    logger.info("Run folder: %s", folder)


def held_out_in(place: Path) -> list[str]:
    """Return the folders of held-out pictures beside those of training, as data sets have them."""
    for folder in (place, place / "images"):
        if (folder / "train").is_dir():
            return [name for name in ("val", "valid", "test") if (folder / name).is_dir()]
    return []


def tell_probe(step: int, metrics: Mapping[str, float], alarm: str) -> None:
    """Say what a probe found, and raise the alarm where it has to be."""
    if metrics:
        values = "  ".join(f"{k.removeprefix('probe/')} {v:.4g}" for k, v in metrics.items())
        with suppress(OSError):  # a terminal or a pipe that is gone; logging passes over it, too
            tqdm.write(f"probe at step {step}: {values}", file=sys.stdout)
    if alarm:
        logger.warning("COLLAPSE ALARM at step %d. %s", step, alarm)


def tell_end(step: int, pictures: int, seconds: float, probe: Mapping[str, Any]) -> None:
    """Say what was learned."""
    logger.info("Saw %d pictures in %d steps and %s.", pictures, step, minutes(seconds))
    if not probe:
        return
    first, last = probe["first"], probe["last"]
    for name, title in LEARNED.items():
        if name in last and name in first:
            logger.info("%s: %.3f before, %.3f after.", title, first[name], last[name])
