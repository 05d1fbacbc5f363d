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
import ctypes
import json
import logging
import signal
from pathlib import Path

from groundwork.config import merge, parse_overrides, read_yaml, to_yaml
from groundwork.errors import GroundworkError, StoppedError, UsageError
from pretext_tasks import TASKS, load_task
from pretrain import recipe as recipes

logger = logging.getLogger("pretrain.run")

NEXT = """\
What next:
  pack your own pictures    python -m pretrain.pack PICTURES SHARDS
  pretrain on them          accelerate launch pretrain/run.py --task {task} data.train=SHARDS \
budget.epochs=100
  use the backbone          groundwork.backbones.product.backbone_from_file("{file}")"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the six flags and the key=value overrides."""
    parser = argparse.ArgumentParser(
        prog="pretrain/run.py",
        description="Pretrain a detector backbone on unlabeled pictures.",
        epilog="Every other setting is key=value; --print-recipe shows all keys with their values.",
    )
    parser.add_argument("--task", help=f"one of {', '.join(sorted(TASKS))}")
    parser.add_argument("--recipe", help="a recipe file, or a name of recipes/pretrain")
    parser.add_argument("--out", type=Path, help="the run folder (runs/<task>-<backbone>-<time>)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run folder or a checkpoint; without a path, with the last run of runs/",
    )
    parser.add_argument("--init", type=Path, help="weights to start the backbone from")
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    _log_to_standard_output()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    folder: Path | None = None
    try:
        _check_flags(options)
        if options.resume is None:
            recipe = recipes.resolve(options.task, options.recipe, options.overrides)
        else:
            recipe, options = _resumed(options)
        task_class = load_task(recipe.task_name)
        recipe, config = recipes.with_task_defaults(recipe, task_class.Config)
        task_class.views(config, recipe.image_size)
        if options.print_recipe:
            sys.stdout.write(to_yaml(recipe))
            return 0
        from pretrain.loop import prepare_run, pretrain

        run = prepare_run(recipe, options.out, resumed=options.resume is not None)
        folder = run.folder
        _stop_with_the_launcher()
        _status(folder, "running", None, "")
        product = pretrain(
            recipe, task_class, config, run, init=options.init, resume=options.resume
        )
        _status(folder, "done", 0, f"The backbone is in {product}.")
        logger.info(NEXT.format(task=recipe.task_name, file=product))
        return 0
    except GroundworkError as error:
        state = "stopped" if isinstance(error, StoppedError) else "failed"
        _status(folder, state, error.exit_code, str(error))
        if _main_process():
            sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BaseException as error:
        _status(folder, "failed", 1, f"{type(error).__name__}: {error}")
        raise


def _check_flags(options: argparse.Namespace) -> None:
    if options.resume is not None and (options.task or options.recipe or options.init):
        raise UsageError(
            "--resume takes task, recipe and weights from the run: leave out the others."
        )
    if options.init is not None and not options.init.is_file():
        raise UsageError(f"--init {options.init} is not a file.")
    if (
        options.resume is None
        and options.out is not None
        and (options.out / "recipe.yaml").exists()
    ):
        raise UsageError(
            f"--out {options.out} holds a run already: go on with it by --resume {options.out}, "
            "or choose another folder."
        )


def _resumed(options: argparse.Namespace) -> tuple[recipes.Recipe, argparse.Namespace]:
    """Find the run to go on with, and lay the overrides over its recipe."""
    path = Path(options.resume) if options.resume else _last_run(Path("runs"))
    is_checkpoint = (path / "manifest.json").is_file()
    folder = path.parent.parent if is_checkpoint else path
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UsageError(f"--resume {path}: there is no run here ({file} is missing).")
    old = recipes.build(read_yaml(file))
    changes = merge(old.model_dump(mode="json"), parse_overrides(options.overrides), recipes.WHOLE)
    new = recipes.build(changes)
    for line in recipes.refuse_changes(old, new):
        logger.info("Changed on resume: %s", line)
    options.resume = path if is_checkpoint else folder / "checkpoints"
    options.out = options.out or folder
    return new, options


def _last_run(folder: Path) -> Path:
    runs = [path.parent for path in folder.glob("*/recipe.yaml")]
    if not runs:
        raise UsageError(f"--resume: there is no run in {folder.resolve()}; name its folder.")
    return max(runs, key=lambda path: (path / "recipe.yaml").stat().st_mtime)


def _stop_with_the_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher dies.

    `accelerate launch` with one process dies of SIGTERM without passing it on, and training would
    go on as an orphan. Only under a launcher: a run started by hand may outlive its shell.
    """
    launched = any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)
    if launched and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == 1:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)


def _status(folder: Path | None, state: str, exit_code: int | None, message: str) -> None:
    if folder is None or not _main_process():
        return
    from groundwork.checkpoint import write_atomically

    text = json.dumps({"state": state, "exit_code": exit_code, "message": message}, indent=1)
    write_atomically(folder / "status.json", text + "\n")


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _log_to_standard_output() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("groundwork", "pretext_tasks", "pretrain"):
        package = logging.getLogger(name)
        package.handlers = [handler]
        package.propagate = False
        package.setLevel(logging.INFO if _main_process() else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
