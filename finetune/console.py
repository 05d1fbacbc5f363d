"""What a person reads of a fine-tuning: what begins, and what was learned."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from finetune.detector import Detector
from finetune.metrics import Results
from finetune.recipe import Recipe
from finetune.sets import Sets
from groundwork.clock import Clock
from groundwork.console import minutes
from groundwork.errors import CheckpointError
from groundwork.files import write_file
from groundwork.training_state import Position

logger = logging.getLogger(__name__)

_FEW_STEPS = 500  # below which a run on pictures of one's own is told to be a first look


def announce(
    recipe: Recipe,
    detector: Detector,
    sets: Sets,
    clock: Clock,
    folder: Path,
    processes: int,
    device: str,
) -> None:
    """Say what is about to happen."""
    count = sum(p.numel() for p in detector.parameters())
    held_out = [
        f"{len(one)} for {name}"
        for name, one in (("validation", sets.val), ("test", sets.test))
        if one is not None
    ]
    if recipe.data.train != "scenes" and clock.steps is not None and clock.steps < _FEW_STEPS:
        logger.warning(
            "%d steps are a first look: detectors of a few dozen pictures got better up to 2,000 "
            "and more (budget.steps, budget.epochs; recipes/finetune has recipes).", clock.steps,
        )  # fmt: skip
    logger.info(
        "A detector on %s (%.2f M parameters) of %d class(es), %d labeled pictures of %s%s, %d px, "
        "batch %d, %s, %d process(es), %s.",
        recipe.backbone.name, count / 1e6, len(sets.train.names), len(sets.train), sets.train.name,
        f" ({', '.join(held_out)})" if held_out else "", recipe.image_size, recipe.batch_size,
        clock.length, processes, device,
    )  # fmt: skip
    if sets.val is None:
        logger.warning(
            "Nothing is held out, so nothing will say how good it becomes, and the last weights "
            "are kept: name validation pictures by data.val=ROOT, or hold some of these out by "
            "data.holdout=0.2."
        )
    logger.info("Run folder: %s", folder)


def tell_end(
    folder: Path,
    position: Position,
    kept_step: int,
    seconds: float,
    scores: dict[str, Results | None],
) -> None:
    """Say what was learned, and write results.json: the test set's figures, else validation's.

    `kept_step` is the step that the kept weights are of.
    """
    logger.info(
        "Saw %d pictures in %d steps and %s.", position.samples, position.step, minutes(seconds)
    )
    found = {name: one.to_json() for name, one in scores.items() if one is not None}
    for name, one in scores.items():
        if one is not None:
            if one.figures["ap"] is None:
                logger.warning("%s: no picture has a box, so there is no AP.", name)
                continue
            logger.info("%s: AP %.4f, AP50 %.4f, AP75 %.4f.", name, one.ap, one.ap50, one.ap75)
    if found:
        told = [name for name in ("test", "val") if name in found and found[name]["ap"] is not None]
        best = told[0] if told else next(iter(found))
        document = {"split": best, "step": kept_step, "steps": position.step, **found[best]}
        others = {name: one for name, one in found.items() if name != best}
        path = folder / "results.json"
        try:
            write_file(path, json.dumps({**document, **others}, indent=1))
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written ({error.strerror}); the detector is whole: score it "
                "with `python -m finetune.evaluate`."
            ) from error
