"""A run: its folder, the processes that take part, and where it goes on. Shared by both stages."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
)

from groundwork import checkpoint as checkpoints
from groundwork.backbones.product import read_product
from groundwork.checkpoint import Checkpoint
from groundwork.command import note_init, noted_init, write_status
from groundwork.config import to_yaml
from groundwork.data.shards import Samples
from groundwork.errors import CheckpointError, DataError, UsageError
from groundwork.files import copy_file, write_file
from groundwork.settings import RunKeys
from groundwork.tracking import check_trackers
from groundwork.training_state import Position

logger = logging.getLogger(__name__)

BEST = "best.safetensors"  # of a run folder: the weights with the best score so far
LAST = "last.safetensors"  # what a pretraining has made so far, while it is not done
LOCK = ".lock"  # of a run folder
_TRIES, _PAUSE = 12, 0.5  # of taking it, or seeing what another wrote; seconds between two
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Lock:
    """An open file that keeps others out; it is closed when nothing holds this any more."""

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


@dataclass
class Run:
    """Where a run keeps its files, and the processes that take part in it."""

    folder: Path
    accelerator: Accelerator
    recipe: RunKeys
    resumed: bool
    lock: Lock | None = None  # of the folder, as long as the run lives
    # Whether the folder is this run's: one that is gone on with stays as it was until then.
    begun: bool = False

    def begin(self, saved: Checkpoint | None = None) -> None:
        """Write recipe, machine and state into the folder: the run has what it needs.

        `saved` is the checkpoint that it goes on from.
        """
        if self.accelerator.is_main_process:
            if saved is not None and saved.path.parent.resolve() == self.checkpoints.resolve():
                _set_aside(self.checkpoints, saved.step)
            elif saved is not None:  # from here on the folder stands by itself
                note_init(self.folder, noted_init(saved.path.parent.parent), resumed=True)
                checkpoints.bring(saved.path, self.checkpoints)
            write_file(self.folder / "recipe.yaml", to_yaml(self.recipe))
            machine = "machine-resumed.json" if self.resumed else "machine.json"
            text = json.dumps(_machine(self.accelerator), indent=1)
            write_file(self.folder / machine, text)
            write_status(self.folder, "running", None, "")
        self.begun = True
        self.accelerator.wait_for_everyone()

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"


def prepare_run(
    recipe: RunKeys,
    name: str,
    out: Path | None,
    *,
    resumed: bool,
    parts_without_gradient: bool = False,
) -> Run:
    """Start Accelerate, agree on the run folder, and write the recipe and the machine into it.

    Without `out`, the folder is runs/<name>-<time>. `parts_without_gradient` says that some steps
    train a part only.

    Raises UsageError where the launcher and Accelerate disagree on the number of processes, a
    tracker is not installed, or a CPU is to run in fp16 or to compile half precision.
    """
    check_trackers(recipe.log.trackers)
    state = PartialState(cpu=not torch.cuda.is_available())
    if recipe.precision == "fp16" and state.device.type == "cpu":
        raise UsageError("precision=fp16 wants a GPU: set precision=bf16 or fp32 on a CPU.")
    if recipe.compile and recipe.precision != "fp32" and state.device.type == "cpu":
        # Measured (LOG.md): box logits of a compiled head in bf16 were NaN, others at every call.
        raise UsageError(
            f"compile=true with precision={recipe.precision} gives wrong numbers on a CPU: set "
            "compile=false, or precision=fp32."
        )
    name = f"{name.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    chosen = [str(out or Path("runs") / name)]
    folder = Path(broadcast_object_list(chosen)[0])
    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        mixed_precision=PRECISIONS[recipe.precision],
        log_with=list(recipe.log.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, find_unused_parameters=parts_without_gradient
            )
        ],
    )
    world = accelerator.num_processes
    refuse_sharded_networks(accelerator.distributed_type)
    if int(os.environ.get("WORLD_SIZE", "1")) != world:
        raise UsageError(
            f"The launcher started {os.environ['WORLD_SIZE']} processes, Accelerate sees {world}: "
            "use torchrun --nproc-per-node N the same command, and check the Accelerate config."
        )
    if recipe.batch_size % (world * recipe.accumulate):
        raise UsageError(
            f"batch_size={recipe.batch_size} is not divisible by {world} processes x "
            f"accumulate={recipe.accumulate}."
        )
    if accelerator.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(recipe.threads or max(1, len(os.sched_getaffinity(0)) // here))
    lock, problem = _make_and_lock(folder) if accelerator.is_main_process else (None, "")
    problem = broadcast_object_list([problem])[0]
    if problem:
        raise UsageError(problem)
    if accelerator.is_main_process:
        checkpoints.sweep(folder / "checkpoints")
    run = Run(folder, accelerator, recipe, resumed, lock)
    if not resumed:
        run.begin()
    return run


def refuse_sharded_networks(kind: DistributedType) -> None:
    """Raise UsageError where Accelerate would shard the network: a checkpoint holds it whole."""
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(
            f"The Accelerate config asks for {kind.value}, and what is trained here fits one "
            "device: run `accelerate config` again without it, or use torchrun."
        )


def _make_and_lock(folder: Path) -> tuple[Lock | None, str]:
    """Make the run folder and lock it; also return why that cannot be, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        why = f"The run folder {folder} cannot be made: {error.strerror}. Name another by --out."
        return None, why
    lock = Lock(descriptor)
    try:
        # Data workers of a process that was killed hold it for some seconds more.
        for _ in range(_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock, ""
            time.sleep(_PAUSE)
        return None, f"Another process trains in {folder}: wait for it, or stop it first."
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s).", folder, error.strerror)
        return lock, ""


def find_checkpoint(run: Run, resume: Path | None) -> Checkpoint | None:
    """Read what to resume from: a checkpoint, or the newest whole one of a folder of them.

    The main process chooses: on a network file system the others may not see the newest yet.
    """
    return None if resume is None else _chosen_by_main(run, lambda: _newest(resume))


def calm_checkpoint(run: Run) -> Checkpoint | None:
    """Read what a run is rolled back to: its newest whole checkpoint.

    One that was saved between skipped steps is taken only where there is no other: its weights may
    be those that give no finite gradient any more.
    """
    folder = run.checkpoints
    return _chosen_by_main(
        run, lambda: checkpoints.latest(folder, _is_calm) or checkpoints.latest(folder)
    )


def _is_calm(saved: Checkpoint) -> bool:
    return not saved.documents["state"]["skipped_in_a_row"]


def _chosen_by_main(run: Run, choose: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Read the checkpoint that the main process chooses, on every process."""
    found, told = None, ["", ""]  # the path of the checkpoint, and what is wrong
    if run.accelerator.is_main_process:
        try:
            found = choose()
        except CheckpointError as error:
            told[1] = str(error)
        else:
            told[0] = "" if found is None else str(found.path)
    path, problem = broadcast_object_list(told)
    if problem:
        raise CheckpointError(problem)
    if path and found is None:
        for _ in range(_TRIES):
            if (Path(path) / checkpoints.MANIFEST).is_file():
                break
            time.sleep(_PAUSE)
        found = checkpoints.load(Path(path))
    return found


def _newest(resume: Path) -> Checkpoint | None:
    if (resume / checkpoints.MANIFEST).is_file():
        return checkpoints.load(resume)
    found = checkpoints.latest(resume)
    if found is None and any(resume.glob(f"{checkpoints.PREFIX}*/{checkpoints.MANIFEST}")):
        raise CheckpointError(
            f"{resume}: every checkpoint is damaged, so there is nothing to go on from: start a "
            "new run."
        )
    if found is None:
        logger.warning("%s holds no checkpoint yet: starting from the beginning.", resume)
    return found


def _set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints behind the step that a run goes on from: they are of another course.

    Left where they are they would be taken for the newest, and the new ones pruned as older.
    """
    for path in folder.glob(f"{checkpoints.PREFIX}*"):
        number = path.name.removeprefix(checkpoints.PREFIX)
        if number.isdigit() and int(number) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            logger.warning("%s is of a course that is left; it is kept as %s.", path, aside)


def check_same_data(saved: Checkpoint, samples: Samples) -> None:
    """Raise UsageError where the data is not what the checkpoint was trained on."""
    before = saved.documents["data"]
    if before["fingerprint"] != samples.fingerprint:
        run = saved.path.parent.parent
        made = ("pretrained.safetensors", "detector.safetensors", LAST, BEST)
        there = [file for name in made if (file := run / name).is_file()]
        raise UsageError(
            f"The data is not what {saved.path} was trained on: {before['pictures']} pictures of "
            f"{before['name']} then, {len(samples)} of {samples.name} now. Give the same data, or "
            f"start a new run with --init {there[0] if there else 'FILE'}."
        )


def check_same_everywhere(
    group: torch.distributed.ProcessGroup | None, samples: Samples | None, key: str = "data.train"
) -> None:
    """Raise DataError, on every rank, where one sees other data than the first; None: it has none.

    Each would follow an order of its own, so that pictures were seen twice or never, and an epoch
    would end at another step. Every rank calls this for every key. No group: there is one process.
    """
    if group is None:
        return
    own = ("no pictures", "")
    if samples is not None:
        own = (f"{len(samples):,} pictures of {samples.name}", samples.fingerprint)
    seen = [own] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(seen, own, group=group)
    for rank, (what, fingerprint) in enumerate(seen):
        if fingerprint != seen[0][1]:
            others = " of other names, sizes or labels" if what == seen[0][0] else ""
            raise DataError(
                f"Process {rank} sees {what}, process 0 {seen[0][0]}{others}: {key} must be whole, "
                "and the same on all machines, before training starts."
            )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the device's random numbers (dropout): nothing of them needs to be saved."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def data_workers(workers: int | None) -> int:
    """Return data.workers, or where it is null one worker for each core of this rank but one."""
    if workers is not None:
        return workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // here - 1))


def _machine(accelerator: Accelerator) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


@functools.cache
def commit() -> str:
    """Return the commit of this checkout, or an empty string where there is none."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, perhaps below somebody's own checkout
        return ""
    try:
        told = subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(root), "rev-parse", "HEAD"],
            env={name: value for name, value in os.environ.items() if name != "GIT_DIR"},
            capture_output=True, text=True, timeout=9,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""


def bring_best(
    saved: Checkpoint,
    run: Run,
    position: Position,
    measured_on: str,
    measure: str | None = None,
) -> None:
    """Set what the weights of a run that goes on have to beat; bring the best so far along.

    The main process decides, and `measured_on`, a hash of what it measures on, is its own. There is
    nothing to beat where the best weights are not there any more, where they are of a step behind
    the checkpoint (of a course that is left, or of steps to be taken again), or where they were
    chosen by another `measure`, or on other pictures.
    """
    here, there = run.folder / BEST, saved.path.parent.parent / BEST
    run.accelerator.wait_for_everyone()
    best = [position.best]
    if run.accelerator.is_main_process and position.best >= 0:
        if position.measured_on not in ("", measured_on):
            logger.warning(
                "What the weights are chosen on is not what it was: the best is looked for anew."
            )
            best = [-1.0]
        elif _step_of(there, measure) > saved.step:
            best = [-1.0]
        elif here.resolve() != there.resolve():
            copy_whole(there, here)
    position.best = broadcast_object_list(best)[0]
    if position.best < 0:
        position.worse = 0


def _step_of(path: Path, measure: str | None) -> float:
    """Return the step that weights are of; infinite where none can be read that tell `measure`."""
    try:
        about = read_product(path)[1]
        return math.inf if measure is not None and measure not in about else int(about["step"])
    except CheckpointError:
        return math.inf


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file whole or not at all. Raises CheckpointError."""
    try:
        copy_file(source, target)
    except OSError as error:
        raise CheckpointError(f"{source} could not be copied to {target}: {error}.") from error
