"""What the commands of both stages share: flags, status.json, what is logged, how they are stopped.

Nothing here imports torch: a mistake in a command is told in a quarter of a second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from groundwork.backbones import METADATA_KEY
from groundwork.config import merge, parse_overrides, read_yaml
from groundwork.errors import GroundworkError, StoppedError, UsageError
from groundwork.files import write_file
from groundwork.settings import WHOLE, BackboneKeys, RunKeys

RecipeT = TypeVar("RecipeT", bound=RunKeys)

logger = logging.getLogger("groundwork.command")

# How often a launcher has started the same command before: torchrun's count, and Slurm's.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

LAUNCHER = "GROUNDWORK_LAUNCHER"  # in the environment of what a program of ours has started

INIT_NAME = "init.txt"  # of a run folder: the file that --init named


def printable(text: str) -> str:
    """Make names that are no UTF-8 printable."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def exit_code_of(work: Callable[[], object]) -> int:
    """Do what a command is for; tell an error that is meant for a person, and return its code."""
    try:
        work()
    except GroundworkError as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return error.exit_code
    return 0


def flags(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that both stages have; all else is key=value."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="Every other setting is key=value; --print-recipe shows all keys with their values.",
    )
    parser.add_argument("--recipe", help="a recipe file, or the name of one of recipes/")
    parser.add_argument("--out", type=Path, help="the run folder (default: one of runs/)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run folder or a checkpoint; without a path, with the last run of runs/",
    )
    parser.add_argument("--init", type=Path, help="weights to start from")
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def whole_number(least: int, multiple_of: int = 1) -> Callable[[str], int]:
    """Return what argparse calls for a whole number that is `least` or more."""

    def read(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least or value % multiple_of:
            kind = f"a multiple of {multiple_of}" if multiple_of > 1 else f"{least} or more"
            raise argparse.ArgumentTypeError(f"{text} is not {kind}")
        return value

    return read


def number_between(low: float, high: float) -> Callable[[str], float]:
    """Return what argparse calls for a number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is no number between {low:g} and {high:g}")
        return value

    return read


def check_flags(options: argparse.Namespace) -> None:
    """Raise UsageError for flags that exclude each other, or name what is not there."""
    chosen = options.recipe or options.init or getattr(options, "task", None)
    if options.resume is not None and chosen:
        raise UsageError(
            "--resume takes task, recipe and weights from the run: leave out the others."
        )
    if options.init is not None and not options.init.is_file():
        raise UsageError(f"--init {options.init} is not a file.")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out} is a file: name a folder.")
    if options.resume is None and options.out is not None and holds_run(options.out):
        raise UsageError(
            f"--out {options.out} holds a run already: go on with it by --resume {options.out}, "
            "or choose another folder."
        )


def check_other_folder(out: Path | None, run: Path) -> None:
    """Raise UsageError where a run is to go on in a folder that holds another one."""
    if out is not None and out.resolve() != run.resolve() and holds_run(out):
        raise UsageError(f"--out {out} holds another run than {run}: choose another folder.")


def resume_after_restart(options: argparse.Namespace) -> None:
    """Go on with the run of --out where the launcher has started its processes anew.

    torchrun --max-restarts gives the first command again, and so does Slurm, which counts how often
    it has requeued a job. Without --out every start has a folder of its own, and nothing is gone on
    with.
    """
    restarted = any(int(os.environ.get(name) or "0") > 0 for name in _RESTARTS)
    if restarted and options.resume is None and options.out is not None and holds_run(options.out):
        options.resume, options.out = str(options.out), None
        options.recipe = options.init = None
        options.overrides = []
        if hasattr(options, "task"):
            options.task = None


def has_checkpoint(run: Path) -> bool:
    """Tell whether a run has saved one, damaged or not; what a killed save has left is none."""
    # One that was to be replaced is found again under its name (groundwork/checkpoint.py, sweep).
    return any(
        any((run / "checkpoints").glob(f"{kind}*/manifest.json"))
        for kind in ("step-", ".replaced-")
    )


def holds_run(folder: Path) -> bool:
    """Tell whether a run lives in a folder: one that failed before its first step does not."""
    if not (folder / "recipe.yaml").exists():
        return False
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        return True
    if has_checkpoint(folder):
        return True
    return status_of(folder).get("state") != "failed"


def find_run(resume: str, stage: str) -> tuple[Path, Path]:
    """Return what to resume from (a checkpoint, or a folder of them) and the run folder.

    An empty `resume` is the last run of `stage` (pretrain or finetune) in runs/. Raises UsageError.
    """
    path = Path(resume) if resume else _last_run(Path("runs"), stage)
    is_checkpoint = (path / "manifest.json").is_file()
    folder = path.parent.parent if is_checkpoint else path
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UsageError(f"--resume {path}: there is no run here ({file} is missing).")
    if stage_of(folder) != stage:
        raise UsageError(
            f"--resume {path}: this is a run of {stage_of(folder)}/run.py: go on with it there."
        )
    return path if is_checkpoint else folder / "checkpoints", folder


def note_init(folder: Path, init: Path | None, *, resumed: bool) -> None:
    """Write down what weights a run begins with, for a start anew before its first checkpoint."""
    if not is_main_process():
        return
    if init is None and not resumed:
        (folder / INIT_NAME).unlink(missing_ok=True)  # of a start that failed
    elif init is not None:
        (folder / INIT_NAME).write_text(f"{init.resolve()}\n", encoding="utf-8")


def with_backbone_of_init(recipe: RecipeT, options: argparse.Namespace) -> RecipeT:
    """Return a recipe with the backbone that --init's file names, where no key chose one.

    Only a file of ours names one. What cannot be read here is told where the file is loaded.
    """
    init: Path | None = options.init
    chosen = recipe.backbone
    if init is None or "name" in chosen.model_fields_set or init.suffix != ".safetensors":
        return recipe
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(init, framework="np") as file:
            said = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return recipe
    name = said.get("backbone") if isinstance(said, dict) else None
    if not isinstance(name, str) or name == chosen.name:
        return recipe
    if not options.print_recipe:  # which is all that goes to standard output
        logger.info("backbone.name=%s, as %s says.", name, init)
    return recipe.model_copy(update={"backbone": BackboneKeys(name=name)})


def noted_init(folder: Path) -> Path | None:
    """Return the weights that a run of this folder has begun with, there or not any more."""
    note = folder / INIT_NAME
    return Path(note.read_text(encoding="utf-8").strip()) if note.is_file() else None


def begun_with(folder: Path) -> Path | None:
    """Return the weights that a run without a checkpoint began with, if it began with any.

    Raises UsageError where the file is gone.
    """
    init = noted_init(folder)
    if init is None or has_checkpoint(folder):
        return None
    if not init.is_file():
        raise UsageError(
            f"{folder} has no checkpoint yet and began with {init}, which is not there any more: "
            "start a new run."
        )
    return init


def recipe_of_run(
    options: argparse.Namespace,
    stage: str,
    build: Callable[[dict[str, Any]], RecipeT],
    refuse_changes: Callable[[RecipeT, RecipeT], list[str]],
) -> RecipeT:
    """Return the recipe of the run that --resume names, with the overrides laid over it.

    Puts into `options` the checkpoint, the folder and, for a run without a checkpoint, the weights
    that it goes on with. Raises UsageError.
    """
    options.resume, folder = find_run(options.resume, stage)
    check_other_folder(options.out, folder)
    old = build(read_yaml(folder / "recipe.yaml"))
    new = build(merge(old.model_dump(mode="json"), parse_overrides(options.overrides), WHOLE))
    for line in refuse_changes(old, new):
        logger.info("Changed on resume: %s", line)
    options.out = options.out or folder
    options.init = begun_with(folder)
    return new


def stage_of(folder: Path) -> str:
    """Say which stage a run folder is of: only a pretraining recipe has a task."""
    with (folder / "recipe.yaml").open(encoding="utf-8") as file:
        return "pretrain" if any(line.startswith("task:") for line in file) else "finetune"


def _last_run(folder: Path, stage: str) -> Path:
    found = [path.parent for path in folder.glob("*/recipe.yaml")]
    runs = [path for path in found if stage_of(path) == stage and holds_run(path)]
    if not runs:
        raise UsageError(f"--resume: there is no run in {folder.resolve()}; name its folder.")
    return max(runs, key=lambda path: (path / "recipe.yaml").stat().st_mtime)


def stop_with_the_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher dies.

    `accelerate launch` with one process dies of SIGTERM without passing it on, and training would
    go on as an orphan. Only under a launcher: a run started by hand may outlive its shell.
    """
    launched = any(
        name.startswith(("ACCELERATE_", "TORCHELASTIC_", LAUNCHER)) for name in os.environ
    )
    if launched and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == 1:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)


def write_status(folder: Path | None, state: str, exit_code: int | None, message: str) -> None:
    """Write status.json, since launchers turn every exit code into 1."""
    if folder is not None and is_main_process():
        _write_status(folder, state, exit_code, message)


def _write_status(folder: Path, state: str, exit_code: int | None, message: str) -> None:
    text = json.dumps({"state": state, "exit_code": exit_code, "message": message}, indent=1)
    try:
        write_file(folder / "status.json", text + "\n")
    except OSError as error:  # what is told is told elsewhere, too, and the exit code holds
        logger.warning("%s could not be written: %s.", folder / "status.json", error.strerror)


def tell_failure(folder: Path | None, error: BaseException) -> None:
    """Write what ended a run to standard error and status.json: by the process that knows it.

    Where one of several processes fails, the others fail of its silence; the launcher then tells
    nothing that helps. So that one speaks for all, and what the others say later does not count.
    """
    known = isinstance(error, GroundworkError)
    code = error.exit_code if isinstance(error, GroundworkError) else 1
    said = str(error) if known else f"{type(error).__name__}: {error}"
    state = "stopped" if isinstance(error, StoppedError) else "failed"
    told = status_of(folder)
    if told.get("state") == "failed" and (not known or told.get("message") == said):
        return
    if not is_main_process() and (folder is None or state == "stopped" or not known):
        return
    if folder is not None:
        _write_status(folder, state, code, said)
    if known:
        rank = "" if is_main_process() else f"Process {os.environ['RANK']}: "
        with suppress(OSError):  # of a terminal that is gone
            sys.stderr.write(f"{rank}{said}\n")


def status_of(folder: Path | None) -> dict[str, Any]:
    """Return what status.json of a run folder says; nothing where there is none."""
    if folder is None:
        return {}
    try:
        found = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_main_process() -> bool:
    """Tell by the launcher's variables whether this is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def tell_page(stage: str, folder: Path, write: Callable[[Path], Path]) -> None:
    """Write the page of a run of `stage`; a run that is done stays done where that fails."""
    try:
        logger.info("What there is to see: %s", write(folder))
    except Exception as error:
        logger.warning(
            "The page could not be written (%s: %s). Try `python -m %s.report %s`.",
            type(error).__name__, error, stage, folder,
        )  # fmt: skip


def tell_next(text: str) -> None:
    """Say what may come next; not where a program of ours does it."""
    if LAUNCHER not in os.environ:
        logger.info("%s", text)


def log_to_standard_output(packages: Sequence[str]) -> None:
    """Log what these packages say, as plain lines; only errors of other ranks."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in packages:
        package = logging.getLogger(name)
        package.handlers = [handler]
        package.propagate = False
        package.setLevel(logging.INFO if is_main_process() else logging.ERROR)
