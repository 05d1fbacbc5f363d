"""The command of the second stage: `accelerate launch finetune/run.py --init FILE`.

The only file of this package that exits with a run's state. Flags say which, keys say how:
everything but the flags is key=value, such as `data.train=ROOT budget.epochs=100 optim.lr=0.001`.
Without data it trains on the drawn scenes.
"""

from __future__ import annotations

import os
import sys

if not __package__:
    # Launchers put finetune/ first on the path; an uninstalled clone has its packages beside it.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import recipe as recipes
from groundwork.backbones import check_backbone_name
from groundwork.command import (
    check_flags,
    flags,
    is_main_process,
    log_to_standard_output,
    note_init,
    recipe_of_run,
    resume_after_restart,
    stop_with_the_launcher,
    tell_failure,
    tell_next,
    tell_page,
    with_backbone_of_init,
    write_status,
)
from groundwork.config import to_yaml
from groundwork.errors import GroundworkError, UsageError

if TYPE_CHECKING:
    from groundwork.run_folder import Run

logger = logging.getLogger("finetune.run")

SCORE = "  score it        python -m finetune.evaluate {file} data.{split}={data}\n"
NEXT = """\
What next:
{score}  use it          python -m finetune.predict {file} PICTURES --out found
  take it along   python -m finetune.export {file} --format onnx"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags and the key=value overrides."""
    parser = flags("finetune/run.py", "Train a detector on a pretrained backbone.")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    log_to_standard_output(("groundwork", "finetune"))
    options = parse(sys.argv[1:] if arguments is None else arguments)
    run: Run | None = None
    try:
        resume_after_restart(options)
        check_flags(options)
        if options.resume is None:
            recipe = recipes.resolve(options.recipe, options.overrides)
        else:
            recipe = recipe_of_run(options, "finetune", recipes.build, recipes.refuse_changes)
        recipe = with_backbone_of_init(recipe, options)
        check_backbone_name(recipe.backbone.name)
        if options.print_recipe:
            sys.stdout.write(to_yaml(recipe))
            return 0
        _check_start(recipe, options)
        from finetune.loop import finetune
        from groundwork.run_folder import prepare_run

        run = prepare_run(
            recipe,
            f"finetune-{recipe.backbone.name}",
            options.out,
            resumed=options.resume is not None,
            parts_without_gradient=recipe.freeze.backbone > 0,
        )
        stop_with_the_launcher()
        note_init(run.folder, options.init, resumed=options.resume is not None)
        product = finetune(recipe, run, init=options.init, resume=options.resume)
        write_status(run.folder, "done", 0, f"The detector is in {product}.")
        if recipe.report and is_main_process():
            tell_page("finetune", run.folder, _page)
        tell_next(NEXT.format(file=product, score=_score(recipe, product)))
        return 0
    except GroundworkError as error:
        tell_failure(run.folder if run is not None and run.begun else None, error)
        return error.exit_code
    except BaseException as error:
        tell_failure(run.folder if run is not None and run.begun else None, error)
        raise


def _check_start(recipe: recipes.Recipe, options: argparse.Namespace) -> None:
    """Raise UsageError for keys about a pretrained start where there is none."""
    if options.init is not None or options.resume is not None:
        return
    keys = []
    if recipe.detector.take != "all":
        keys.append(f"detector.take={recipe.detector.take}")
    if recipe.batchnorm == "freeze":
        keys.append("batchnorm=freeze")
    if keys:
        raise UsageError(
            f"{' and '.join(keys)}: this is about --init's weights, and there are none."
        )


def _score(recipe: recipes.Recipe, product: Path) -> str:
    """Return the line that says how to score a detector, where there is something held out."""
    from groundwork.data.labels import has_split

    data = recipe.data
    if data.holdout and not (data.test or has_split(data.train, "test")):
        flags = f" data.holdout={data.holdout:g}"
        flags += " data.split=train" if has_split(data.train, "train") else ""
        flags += f" data.train_list={data.train_list}" if data.train_list else ""
        return SCORE.format(file=product, split="val", data=f"{data.train}{flags}")
    for split in ("test", "val"):
        given = getattr(recipe.data, split)
        if given is not None or has_split(recipe.data.train, split):
            return SCORE.format(file=product, split=split, data=given or recipe.data.train)
    return ""


def _page(folder: Path) -> Path:
    from finetune.report import write_report  # matplotlib takes a second

    return write_report(folder)


if __name__ == "__main__":
    sys.exit(main())
