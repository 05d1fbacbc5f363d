"""Pretraining from beginning to end: one loop, read from top to bottom.

The loop knows no task, no backbone and no file format. Its state is small: how many steps were
taken, how many samples of the endless stream were consumed, how long it took. Learning rate and
targets are functions of `progress`, the order of the data of `samples`, and the random numbers on
the device of (seed, step, rank), so that nothing hidden has to be restored on resume.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from groundwork import training_state
from groundwork.backbones import build_backbone, load_init, load_parts
from groundwork.backbones.contract import Backbone
from groundwork.backbones.from_timm import synchronised
from groundwork.backbones.product import read_product, save_product
from groundwork.clock import Clock, StopRequest, agree, host_group, meet
from groundwork.command import noted_init
from groundwork.config import Section
from groundwork.console import Display
from groundwork.data.loader import Loader
from groundwork.data.memory import Memory
from groundwork.data.order import Order
from groundwork.data.samples import open_samples
from groundwork.data.shards import Samples
from groundwork.ema import Ema
from groundwork.errors import CheckpointError, DivergedError, StoppedError
from groundwork.files import optional
from groundwork.modes import evaluating
from groundwork.optim import (
    build_optimizer,
    set_learning_rate,
)
from groundwork.quarantine import Quarantine
from groundwork.run_folder import (
    BEST,
    LAST,
    Run,
    bring_best,
    calm_checkpoint,
    check_same_data,
    check_same_everywhere,
    commit,
    copy_whole,
    data_workers,
    find_checkpoint,
    step_seed,
)
from groundwork.schedule import multiplier
from groundwork.tracking import Tracking, Window
from groundwork.training_state import Trained, copy_all
from pretext_tasks.contract import PretextTask, Views, backbone_of, remembering
from pretrain.console import announce, tell_end, tell_probe
from pretrain.probe import CollapseAlarm, open_probe
from pretrain.recipe import Recipe
from pretrain.report import save_sheet

logger = logging.getLogger(__name__)

PICTURES = 8  # samples on a sheet of what the task sees


@dataclass
class Position(training_state.Position):
    """Where a run stands; all of it is in every checkpoint."""

    probe: dict[str, Any] = field(default_factory=dict)


def pretrain(  # noqa: C901 (one loop, read from top to bottom)
    recipe: Recipe,
    task_class: type[PretextTask],
    config: Section,
    run: Run,
    init: Path | None = None,
    resume: Path | None = None,
) -> Path:
    """Train the task's backbone and return the path of pretrained.safetensors.

    `resume` is a checkpoint, or a folder of checkpoints of which the newest whole one is taken.
    Raises StoppedError after SIGTERM or SIGINT, once a checkpoint is saved; DataError when too
    many pictures are unreadable; DivergedError when gradients stay non-finite or features
    collapse and the recipe wants to stop.
    """
    accelerator = run.accelerator
    device, world = accelerator.device, accelerator.num_processes
    group = host_group()
    stop = StopRequest()

    # What is trained. Weights come from one place: a checkpoint, else --init, else the seed.
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(recipe.backbone.name, recipe.data.reading().channels)
    if init is not None:
        logger.info("Weights of %s: %s", init, load_init(backbone, init).sentence())
    task = task_class(backbone, config)
    if init is not None:
        for said in load_parts(task.product(), init, task.metadata().get("names")):
            logger.info("%s", said)
    for warning in task.warnings(recipe.image_size, recipe.data.reading()):
        logger.warning("%s", warning)
    # Faster on a CPU, too: 1.36 times on yolo12n (LOG.md).
    task = task.to(memory_format=torch.channels_last)
    if device.type == "cuda" and world > 1 and recipe.sync_batchnorm:
        task = synchronised(task)
    task = task.to(device)
    ema = Ema(recipe.ema, task.product()) if recipe.ema.enabled else None
    optimizer = build_optimizer(recipe.optim, task)
    trained = Trained("task", task, optimizer, ema, accelerator.scaler)

    # What it is trained on, and in which order.
    cache, cache_bytes = recipe.data.cache_folder(), recipe.data.cache_bytes()
    samples = open_samples(recipe.data.train, cache=cache, cache_bytes=cache_bytes)
    order = Order(samples.shard_sizes, seed=recipe.seed, window_shards=recipe.data.window_shards)

    # Where it stands.
    meet(group)  # a far store is opened at each one's pace
    check_same_everywhere(group, samples)
    position = Position()
    saved = find_checkpoint(run, resume)
    if saved is not None:
        check_same_data(saved, samples)
        position = Position(**saved.documents["state"])
        trained.restore(saved)
        saved.tensors.clear()  # as much memory as the network, and copied
        logger.info("Going on from %s: step %d.", saved.path, position.step)
    began_with = (
        noted_init(saved.path.parent.parent) if saved is not None else init and init.resolve()
    )
    clock = Clock(recipe.budget, len(samples), recipe.batch_size, position.seconds)
    alarm = CollapseAlarm(rank=task.rank_matters)
    indicator = recipe.probe.indicator()
    probe = None
    if accelerator.is_main_process and recipe.probe.times:
        probe = open_probe(
            recipe.probe, samples, recipe.image_size, cache=cache, cache_bytes=cache_bytes,
            reading=recipe.data.reading(),
        )  # fmt: skip
        if position.probe:
            alarm.load(position.probe["alarm"])
    meet(group)
    if indicator is not None:
        measured_on = "" if probe is None else probe.measured_on(indicator)
        if saved is not None:
            bring_best(saved, run, position, measured_on, indicator)
            if saved.documents["recipe"]["probe"]["patience"] is None:
                position.worse = 0  # nothing has counted so far
        position.measured_on = measured_on
    patience = recipe.probe.patience
    # A run that patience has ended ends at once when it is gone on with; all processes read so.
    ended_early = patience is not None and position.worse >= patience

    if run.resumed:
        run.begin(saved)
    if recipe.compile:
        backbone_of(task).compile()
    wrapped, stepper = accelerator.prepare(task, optimizer)
    parameters = [p for p in task.parameters() if p.requires_grad]
    buffers = list(task.buffers())
    kept_buffers = [buffer.clone() for buffer in buffers]
    quarantine = Quarantine(
        run.folder,
        len(samples),
        recipe.data.max_bad_fraction,
        before=None if saved is None else saved.path.parent.parent,
        main=accelerator.is_main_process,
    )
    tracking = Tracking(
        run.folder,
        accelerator,
        recipe.log.trackers,
        recipe.model_dump(mode="json"),
        None if saved is None else position.step,
    )
    memory = Memory(cache)
    make_views = remembering(task_class.views(config, recipe.image_size), memory)
    loader = Loader(
        samples,
        order,
        make_views,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        rank=accelerator.process_index,
        world=world,
        accumulate=recipe.accumulate,
        start=position.samples,
        workers=data_workers(recipe.data.workers),
        on_error=recipe.data.on_error,
        reading=recipe.data.reading(),
        pin_memory=device.type == "cuda",
    )
    sheet = _first_views(recipe, make_views, samples, order)
    memory.close()  # workers are forked, and must not inherit a connection
    parameter_count = sum(p.numel() for p in backbone_of(task).parameters())
    announce(recipe, parameter_count, samples, clock, run.folder, world, device.type)

    collapse = ""

    def measure() -> dict[str, float]:
        """Probe what would be kept, on the main process; the others wait at the next step."""
        nonlocal collapse
        if probe is None:
            return {}
        parts = task.product() if ema is None else ema.product()
        backbone = parts["backbone"]
        assert isinstance(backbone, Backbone)
        found = probe.measure(backbone, parts.get("neck"))
        collapse = alarm.check(found) or ""
        first = position.probe.get("first", found)
        position.probe = {"alarm": alarm.state(), "first": first, "last": found}
        if indicator is not None:
            better = found[indicator] > position.best
            # Of weights that find nothing yet, the last have learned most.
            if better or found[indicator] == position.best == 0:
                try:
                    keep(run.folder / BEST, {indicator: found[indicator]})
                    position.best = found[indicator]
                except CheckpointError as error:
                    logger.warning("%s Training goes on.", error)
                    better = False
            position.worse = 0 if better else position.worse + 1
        return found

    def keep(path: Path, about: dict[str, Any]) -> None:
        """Write what the run has made so far."""
        save_product(
            path,
            task.product() if ema is None else ema.product(),
            {
                "task": recipe.task_name,
                "recipe": recipe.model_dump(mode="json"),
                "init": None if began_with is None else str(began_with),
                "images_seen": position.samples,
                "step": position.step,
                "commit": commit(),
                "data": samples.fingerprint,
                **task.metadata(),
                **about,
            },
        )

    def save(last: bool = False) -> CheckpointError | None:
        """Save a checkpoint and, but for the last, what a new run may start from.

        Returns why there is no checkpoint, on the main process.
        """
        position.seconds = clock.seconds
        position.window = window.plain(accelerator)
        failed = None
        if accelerator.is_main_process:
            try:
                trained.save(run.checkpoints, position, recipe, samples, recipe.checkpoint.keep)
            except CheckpointError as error:
                failed = error
            try:
                if not last:
                    keep(run.folder / LAST, {})
            except CheckpointError as error:
                logger.warning("%s", error)
        meet(group)
        return failed

    task.train()
    batches = iter(loader)
    window = Window(position.window)
    show = Display(clock, accelerator.is_main_process)
    due = False  # whether a checkpoint is
    try:
        if position.step == 0:
            tracking.write(0, measure())
            _sheet(run, task, sheet, 0)
        meet(group)
        clock.start()
        while not clock.over(position.step) and not ended_early:
            progress = clock.progress(position.step)
            factor = multiplier(recipe.schedule, progress) * 0.5**position.rollbacks
            set_learning_rate(optimizer, recipe.optim.lr * factor)
            torch.manual_seed(step_seed(recipe.seed, position.step, accelerator.process_index))
            copy_all(kept_buffers, buffers)

            # Step 1. Forward and backward over the micro-batches of this rank.
            replaced = 0
            keys: list[str] = []
            for micro in range(recipe.accumulate):
                began = time.perf_counter()
                batch = next(batches)
                window.add("wait", time.perf_counter() - began)
                window.add("worker", batch.worker_seconds)
                quarantine.note(batch)
                replaced += len(batch.replaced)
                keys += batch.keys
                views = {k: v.to(device, non_blocking=True) for k, v in batch.views.items()}
                last = micro == recipe.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    output = wrapped(views)
                    accelerator.backward(output.loss / recipe.accumulate)
                window.add("train/loss", output.loss.detach() / recipe.accumulate)
                for name, value in output.metrics.items():
                    window.add(f"train/{name}", value / recipe.accumulate)

            # Step 2. Update, unless a gradient is not finite: then every rank skips, because the
            # norm is taken after the all-reduce. Reading it waits for the device, once a step:
            # the price of never putting a NaN into the weights.
            limit = recipe.optim.clip or math.inf
            norm = accelerator.clip_grad_norm_(parameters, limit)
            finite = bool(torch.isfinite(norm))
            if finite or recipe.precision == "fp16":  # fp16's loss scaler skips by itself
                stepper.step()
                finite = finite and not accelerator.optimizer_step_was_skipped
            stepper.zero_grad(set_to_none=True)
            position.samples += recipe.batch_size
            position.step += 1

            # Step 3. Move targets, or undo what a bad step left in the buffers.
            if finite:
                task.after_step(clock.progress(position.step))
                if ema is not None:
                    ema.update(position.step - position.skipped)
                position.skipped_in_a_row = 0
                window.add("gradient_norm", norm)
                window.add("counted", 1.0)
            else:
                copy_all(buffers, kept_buffers)
                position.skipped += 1
                position.skipped_in_a_row += 1
                logger.warning(
                    "Step %d is skipped: a gradient is not finite. Samples %d to %d of the stream.",
                    position.step, position.samples - recipe.batch_size, position.samples - 1,
                )  # fmt: skip
                if position.skipped_in_a_row >= recipe.guard.skips:
                    trained.roll_back(calm_checkpoint(run), position, recipe.guard.rollbacks)
            window.add("steps", 1.0)
            window.add("images", float(recipe.batch_size))

            # Step 4. Everybody agrees on the time, on whether to stop, and on what was unreadable.
            agreed = agree(group, stop.asked, clock.seconds, quarantine.fresh, replaced)
            clock.set(agreed.seconds)
            position.replaced += agreed.total
            quarantine.check(group, agreed.news)
            ended = clock.over(position.step)
            window.add("seconds", clock.lap())

            # Step 5. Tell, probe, save: none of it changes what is learned.
            if recipe.log.samples:
                tracking.write_samples(position.step, keys)
            times = recipe.probe.times
            probed = bool(times) and (ended or clock.crossed(progress, position.step, times))
            if position.step == 1 or position.step % recipe.log.every_steps == 0 or ended or probed:
                metrics = window.read(accelerator)
                metrics["optim/lr"] = recipe.optim.lr * factor
                metrics["train/skipped"] = float(position.skipped)
                metrics["data/replaced"] = float(position.replaced)
                tracking.write(position.step, metrics)
                show.metrics(position.step, metrics)
                window = Window()
            if probed:
                metrics = measure()
                tracking.write(position.step, metrics)
                _sheet(run, task, sheet, position.step)
                tell_probe(position.step, metrics, collapse)
                if agree(group, bool(collapse)).stop and recipe.probe.stop_on_collapse:
                    if failed := save():
                        logger.warning("%s", failed)
                    raise DivergedError(f"Stopped at step {position.step}. {collapse}")
                # The main process alone measures, and so it alone knows.
                enough = probe is not None and patience is not None and position.worse >= patience
                if agree(group, enough).stop and not ended:
                    logger.info(
                        "No better %s in %d measurements: stopping at step %d.",
                        indicator, position.worse, position.step,
                    )  # fmt: skip
                    break
            if agreed.stop and not ended:
                if failed := save():
                    raise failed
                raise StoppedError(
                    f"Stopped on request at step {position.step}; saved. "
                    f"Go on with --resume {run.folder}."
                )
            # Not between skipped steps: what is saved there may give no finite gradient any more.
            due = due or position.step % recipe.checkpoint.every_steps == 0
            if due and not ended and not position.skipped_in_a_row:
                if failed := save():
                    logger.warning("%s Training goes on.", failed)
                due = False
            show.step(position.step)
            clock.lap()
        unsaved = save(last=True)
    finally:
        loader.close()
        samples.close()
        show.close()
        stop.restore()
    product = run.folder / "pretrained.safetensors"
    if accelerator.is_main_process:
        if indicator is not None and position.best >= 0 and (run.folder / BEST).is_file():
            copy_whole(run.folder / BEST, product)  # and not a move: a finished run may be resumed
            _, about = read_product(product)
            logger.info(
                "Kept are the weights of step %d, with the best %s (%.4f).",
                about["step"], indicator, about[indicator],
            )  # fmt: skip
        else:
            keep(product, {})
        (run.folder / LAST).unlink(missing_ok=True)
        tell_end(position.step, position.samples, clock.seconds, position.probe)
        quarantine.tell(position.replaced)
    tracking.close()
    meet(group)
    if group is not None:
        torch.distributed.destroy_process_group()
    if unsaved:
        raise CheckpointError(f"{unsaved} What was learned is in {product}.")
    return product


def _first_views(recipe: Recipe, views: Views, samples: Samples, order: Order) -> dict[str, Tensor]:
    """Make the views of the first samples of the stream, for the sheets."""
    loader = Loader(
        samples, order, views, seed=recipe.seed, batch_size=min(PICTURES, len(samples)),
        reading=recipe.data.reading(),
    )  # fmt: skip
    try:
        return next(iter(loader)).views
    finally:
        loader.close()


def _sheet(run: Run, task: PretextTask, views: dict[str, Tensor], step: int) -> None:
    """Write what the task sees, for a person to look at: pictures/step-<n>-<name>.png."""
    accelerator = run.accelerator
    if not accelerator.is_main_process:
        return
    with evaluating(task), torch.no_grad(), accelerator.autocast():
        shown = task.pictures({k: v.to(accelerator.device) for k, v in views.items()})
    for name, pictures in shown.items():
        path = run.folder / "pictures" / f"step-{step}-{name}.png"
        with optional(path):
            save_sheet(pictures, path)
