"""The command of the first stage: `accelerate launch pretrain/run.py --task byol`.

The only file of this package that exits. Flags say which, keys say how: everything but the six
flags is key=value, such as `data.train=shards/ budget.epochs=100 optim.lr=0.002`.
"""

from __future__ import annotations

import os
import sys

if not __package__:
    # Launchers put pretrain/ first on the path; an uninstalled clone has its packages beside it.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

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
from groundwork.errors import GroundworkError
from pretext_tasks import TASKS, load_task
from pretrain import recipe as recipes

if TYPE_CHECKING:
    from groundwork.run_folder import Run

logger = logging.getLogger("pretrain.run")

NEXT = """\
What next:
  pack your own pictures    python -m pretrain.pack PICTURES SHARDS
  pretrain on them          accelerate launch pretrain/run.py --recipe aerial data.train=SHARDS \
budget.epochs=N
  train a detector          accelerate launch finetune/run.py --recipe aerial --init {file} \
data.train=ROOT  (--recipe medical for cells; README, "Your own pictures")
  use the backbone          groundwork.backbones.product.backbone_from_file("{file}")"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the six flags and the key=value overrides."""
    parser = flags("pretrain/run.py", "Pretrain a detector backbone on unlabeled pictures.")
    parser.add_argument("--task", help=f"one of {', '.join(sorted(TASKS))}")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    log_to_standard_output(("groundwork", "pretext_tasks", "pretrain"))
    options = parse(sys.argv[1:] if arguments is None else arguments)
    run: Run | None = None
    try:
        resume_after_restart(options)
        check_flags(options)
        if options.resume is None:
            recipe = recipes.resolve(options.task, options.recipe, options.overrides)
        else:
            recipe = recipe_of_run(options, "pretrain", recipes.build, recipes.refuse_changes)
        recipe = with_backbone_of_init(recipe, options)
        check_backbone_name(recipe.backbone.name)
        task_class = load_task(recipe.task_name)
        recipe, config = recipes.with_task_defaults(recipe, task_class.Config)
        task_class.views(config, recipe.image_size)
        if options.print_recipe:
            sys.stdout.write(to_yaml(recipe))
            return 0
        from groundwork.backbones.from_timm import has_parallel_branches
        from groundwork.run_folder import prepare_run
        from pretrain.loop import pretrain

        name = f"{recipe.task_name}-{recipe.backbone.name}"
        run = prepare_run(
            recipe,
            name,
            options.out,
            resumed=options.resume is not None,
            parts_without_gradient=has_parallel_branches(recipe.backbone.name),
        )
        stop_with_the_launcher()
        note_init(run.folder, options.init, resumed=options.resume is not None)
        product = pretrain(
            recipe, task_class, config, run, init=options.init, resume=options.resume
        )
        write_status(run.folder, "done", 0, f"The backbone is in {product}.")
        if recipe.report and is_main_process():
            tell_page("pretrain", run.folder, _page)
        tell_next(NEXT.format(file=product))
        return 0
    except GroundworkError as error:
        tell_failure(run.folder if run is not None and run.begun else None, error)
        return error.exit_code
    except BaseException as error:
        tell_failure(run.folder if run is not None and run.begun else None, error)
        raise


def _page(folder: Path) -> Path:
    from pretrain.report import write_report  # matplotlib takes a second

    return write_report(folder)


if __name__ == "__main__":
    sys.exit(main())
