"""Fine-tuning from beginning to end: one loop, read from top to bottom.

It attaches neck and head to a backbone and trains all of it on labeled pictures. Its state is as
small as that of pretraining (pretrain/loop.py): how many steps were taken, how many samples of the
endless stream were consumed, how long it took; beside that, the best score on the validation set so
far. Learning rate, augmentation, batch size and what is frozen are functions of progress, a sample
is a function of its position, and random numbers on the device of (seed, step, rank).
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from finetune.augment import build as build_augment
from finetune.console import announce, tell_end
from finetune.detector import Detector, Limits, build_detector
from finetune.draw import save_boxes
from finetune.evaluate import evaluate
from finetune.losses import Loss
from finetune.metrics import Results
from finetune.plan import Plan, Stretch
from finetune.recipe import Recipe
from finetune.regularize import regularize
from finetune.sets import open_sets, tell_defects
from finetune.training import (
    Training,
    measure_batchnorm,
    scale_learning_rates,
    share_statistics,
)
from finetune.views import DetectionViews
from finetune.weights import detector_from_file, load_init, parts_of, save_detector
from groundwork import training_state
from groundwork.backbones.from_timm import synchronised
from groundwork.clock import StopRequest, agree, host_group, meet, told_by_main
from groundwork.command import noted_init
from groundwork.console import Display
from groundwork.data.labels import LabeledSamples
from groundwork.data.loader import Loader
from groundwork.data.order import Order
from groundwork.data.shard_index import sha256_text
from groundwork.ema import Ema
from groundwork.errors import CheckpointError, DataError, StoppedError, UsageError
from groundwork.files import optional
from groundwork.optim import (
    build_optimizer,
    set_learning_rate,
)
from groundwork.quarantine import Quarantine
from groundwork.run_folder import (
    BEST,
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

logger = logging.getLogger(__name__)


@dataclass
class Position(training_state.Position):
    """Where a run stands; all of it is in every checkpoint."""

    stretch: int = -1  # of the plan: which part of training this is
    origin: int = 0  # samples consumed when it began
    best_step: int = 0


def finetune(  # noqa: C901 (one loop, read from top to bottom)
    recipe: Recipe,
    run: Run,
    init: Path | None = None,
    resume: Path | None = None,
) -> Path:
    """Train a detector and return the path of detector.safetensors.

    `resume` is a checkpoint, or a folder of checkpoints of which the newest whole one is taken.
    Raises StoppedError after SIGTERM or SIGINT, once a checkpoint is saved; DataError when too
    many pictures are unreadable; DivergedError when gradients stay non-finite.
    """
    accelerator = run.accelerator
    device, world = accelerator.device, accelerator.num_processes
    group = host_group()
    stop = StopRequest()

    # What it is trained on.
    sets = open_sets(recipe)
    names = sets.train.names
    if sets.val is None and recipe.eval.patience is not None:
        raise UsageError(
            f"eval.patience needs validation pictures, and {recipe.data.train} has none: name them "
            "by data.val=ROOT."
        )
    order = Order(sets.train.shard_sizes, seed=recipe.seed, window_shards=recipe.data.window_shards)

    # What is trained. Weights come from one place: a checkpoint, else --init, else the seed.
    torch.manual_seed(recipe.seed)
    detector = build_detector(
        recipe.backbone.name,
        len(names),
        width=recipe.detector.width,
        objectness=recipe.detector.objectness,
        in_channels=sets.train.reading.channels,
    )
    if init is not None:
        begun = load_init(detector, init, recipe.detector.take, names)
        logger.info("%s", begun.sentence())
        own = sets.train.reading.mapping
        if begun.reading is not None and begun.reading.mapping != own:
            logger.warning(
                "%s was trained with data.bands=%s and data.value_range=%s, here they are %s and "
                "%s: it sees other colours than it knows, unless one of the two was packed so.",
                init, *begun.reading.mapping, *own,
            )  # fmt: skip
    regularize(detector, recipe.regularize)
    scale_learning_rates(detector, recipe.optim)
    # Faster on a CPU, too: 1.36 times on yolo12n (LOG.md).
    detector = detector.to(memory_format=torch.channels_last)
    if device.type == "cuda" and world > 1 and recipe.sync_batchnorm:
        detector = synchronised(detector)
    detector = detector.to(device)
    if init is not None and recipe.batchnorm == "measure":
        measure_batchnorm(detector, sets.train, order, recipe.image_size)
    ema = Ema(recipe.ema, parts_of(detector)) if recipe.ema.enabled else None
    optimizer = build_optimizer(recipe.optim, detector)
    trained = Trained("detector", detector, optimizer, ema, accelerator.scaler)

    # Where it stands.
    meet(group)  # a far store is opened at each one's pace
    for labeled, key in ((sets.train, "train"), (sets.val, "val"), (sets.test, "test")):
        check_same_everywhere(group, labeled, f"data.{key}")
    position = Position()
    saved = find_checkpoint(run, resume)
    if saved is not None:
        check_same_data(saved, sets.train)
        position = Position(**saved.documents["state"])
        trained.restore(saved)
        saved.tensors.clear()  # as much memory as the network, and copied
        logger.info("Going on from %s: step %d.", saved.path, position.step)
    began_with = (
        noted_init(saved.path.parent.parent) if saved is not None else init and init.resolve()
    )
    limits = Limits(recipe.eval.score, recipe.eval.iou, recipe.eval.most)
    if sets.val is not None:
        measured_on = sha256_text([sets.val.fingerprint, *map(repr, limits)])
        if saved is not None:
            bring_best(saved, run, position, measured_on)
            if saved.documents["recipe"]["eval"]["patience"] is None:
                position.worse = 0  # nothing has counted so far
        position.measured_on = measured_on
    plan = Plan(recipe, len(sets.train), position.seconds)
    clock = plan.clock
    for stretch in plan.stretches:
        if stretch.batch_size % (world * recipe.accumulate):
            raise UsageError(
                f"batch_size={stretch.batch_size} of a phase is not divisible by {world} processes "
                f"x accumulate={recipe.accumulate}."
            )

    if run.resumed:
        run.begin(saved)
    if accelerator.is_main_process:
        largest = max(side for stretch in plan.stretches for side in stretch.sizes)
        tell_defects(sets, run.folder, largest, recipe.augment.min_side)
    meet(group)
    if recipe.compile:
        for part in parts_of(detector).values():
            part.compile()
    training = Training(detector, recipe.loss)
    wrapped, stepper = accelerator.prepare(training, optimizer)
    parameters = [p for p in detector.parameters() if p.requires_grad]
    buffers = list(detector.buffers())
    kept_buffers = [buffer.clone() for buffer in buffers]
    quarantine = Quarantine(
        run.folder,
        len(sets.train),
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
    announce(recipe, detector, sets, plan.clock, run.folder, world, device.type)

    def open_loader(stretch: Stretch) -> Loader:
        """Open this rank's batches from where the run stands."""
        views = DetectionViews(
            sets.train,
            build_augment(recipe.augment, mixing=stretch.mixing),
            stretch.sizes,
            recipe.seed,
            stretch.batch_size,
            position.origin,
        )
        return Loader(
            sets.train,
            order,
            views,
            seed=recipe.seed,
            batch_size=stretch.batch_size,
            rank=accelerator.process_index,
            world=world,
            accumulate=recipe.accumulate,
            start=position.samples,
            workers=data_workers(recipe.data.workers),
            on_error=recipe.data.on_error,
            reading=sets.train.reading,
            pin_memory=device.type == "cuda",
        )

    def score(labeled: LabeledSamples, model: Detector) -> Results | None:
        """Evaluate over all ranks; the main process gets the results."""
        return evaluate(
            model,
            labeled,
            image_size=recipe.image_size,
            batch_size=recipe.eval.batch_size,
            workers=data_workers(recipe.data.workers),
            limits=limits,
            group=group,
        )

    def kept() -> dict[str, nn.Module]:
        return parts_of(detector) if ema is None else ema.product()

    def write(path: Path, about: dict[str, Any]) -> None:
        save_detector(
            path,
            kept(),
            names=names,
            image_size=recipe.image_size,
            metadata={
                "recipe": recipe.model_dump(mode="json"),
                "init": None if began_with is None else str(began_with),
                "images_seen": position.samples,
                "step": position.step,
                "commit": commit(),
                "data": sets.train.fingerprint,
                **about,
            },
        )

    def keep_best(ap: float) -> bool:
        """Write the best weights, on the main process; a failure is a warning."""
        if accelerator.is_main_process:
            try:
                write(run.folder / BEST, {"val_ap": ap})
            except CheckpointError as error:
                logger.warning("%s Training goes on.", error)
                return False
        return True

    def validate() -> dict[str, float]:
        """Score what would be kept on the validation set; remember the best."""
        if sets.val is None:
            return {}
        if world > 1:
            share_statistics(kept().values())
        found = score(sets.val, Detector(**kept()))  # type: ignore[arg-type]
        # Every rank learns what the main process found, since it decides when to stop.
        known = found is not None and found.figures["ap"] is not None
        ap = told_by_main(group, found.ap if found is not None and known else -1.0)
        if ap < 0:  # no picture has a box: there is nothing to choose weights by
            return {}
        better = ap > position.best
        # Of weights that find nothing yet, the last have learned most.
        wanted = better or ap == position.best == 0
        if wanted and told_by_main(group, float(keep_best(ap))):
            position.best, position.best_step = ap, position.step
            position.worse = 0 if better else position.worse
        if not better and clock.progress(position.step) >= recipe.eval.patience_from:
            position.worse += 1
        if found is None:
            return {}
        return {"eval/ap": found.ap, "eval/ap50": found.ap50, "eval/ap75": found.ap75}

    def save() -> CheckpointError | None:
        """Save a checkpoint; return why it could not be saved."""
        position.seconds = clock.seconds
        position.window = window.plain(accelerator)
        failed = None
        if accelerator.is_main_process:
            try:
                trained.save(run.checkpoints, position, recipe, sets.train, recipe.checkpoint.keep)
            except CheckpointError as error:
                failed = error
        meet(group)
        return failed

    def out_of_patience() -> bool:
        """Say whether too many scorings have brought nothing better."""
        return recipe.eval.patience is not None and position.worse >= recipe.eval.patience

    detector.train()
    loader: Loader | None = None
    batches: Any = None
    window = Window(position.window)
    show = Display(clock, accelerator.is_main_process)
    due = False  # whether a checkpoint is
    try:
        clock.start()
        while not clock.over(position.step) and not out_of_patience():
            progress = clock.progress(position.step)
            stretch = plan.stretch(progress)
            if loader is None or stretch.number != position.stretch:
                if loader is not None:
                    loader.close()
                # A run that goes on with other batches may stand inside one of them.
                off = (position.samples - position.origin) % stretch.batch_size
                if stretch.number != position.stretch or off:
                    position.stretch, position.origin = stretch.number, position.samples
                loader = open_loader(stretch)
                batches = iter(loader)
            factor = multiplier(recipe.schedule, progress) * 0.5**position.rollbacks
            set_learning_rate(optimizer, recipe.optim.lr * factor)
            training.freeze(
                backbone=progress < recipe.freeze.backbone,
                neck=progress < recipe.freeze.neck,
                batchnorm=recipe.batchnorm == "freeze",
            )
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
                if position.step == 0 and micro == 0 and accelerator.is_main_process:
                    path = run.folder / "pictures" / "step-0.png"
                    with optional(path):
                        save_boxes(path, training.seen(views), names)
                last = micro == recipe.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    output: Loss = wrapped(views)
                    accelerator.backward(output.total / recipe.accumulate)
                window.add("train/loss", output.total.detach() / recipe.accumulate)
                for name, value in output.parts.items():
                    window.add(f"train/{name}", value / recipe.accumulate)

            # Step 2. Update, unless a gradient is not finite: then every rank skips, because the
            # norm is taken after the all-reduce.
            limit = recipe.optim.clip or math.inf
            norm = accelerator.clip_grad_norm_(parameters, limit)
            finite = bool(torch.isfinite(norm))
            if finite or recipe.precision == "fp16":  # fp16's loss scaler skips by itself
                stepper.step()
                finite = finite and not accelerator.optimizer_step_was_skipped
            stepper.zero_grad(set_to_none=True)
            position.samples += stretch.batch_size
            position.step += 1

            # Step 3. Move the average, or undo what a bad step left in the buffers.
            if finite:
                if ema is not None:
                    counted = position.step - position.skipped
                    # The first step of the average copies, and so does each before it begins.
                    ema.update(counted if progress >= recipe.ema_from else 1)
                position.skipped_in_a_row = 0
                window.add("gradient_norm", norm)
                window.add("counted", 1.0)
            else:
                copy_all(buffers, kept_buffers)
                position.skipped += 1
                position.skipped_in_a_row += 1
                logger.warning(
                    "Step %d is skipped: a gradient is not finite. Samples %d to %d of the stream.",
                    position.step, position.samples - stretch.batch_size, position.samples - 1,
                )  # fmt: skip
                if position.skipped_in_a_row >= recipe.guard.skips:
                    trained.roll_back(calm_checkpoint(run), position, recipe.guard.rollbacks)
            window.add("steps", 1.0)
            window.add("images", float(stretch.batch_size))

            # Step 4. Everybody agrees on the time, on whether to stop, and on what was unreadable.
            agreed = agree(group, stop.asked, clock.seconds, quarantine.fresh, replaced)
            clock.set(agreed.seconds)
            position.replaced += agreed.total
            quarantine.check(group, agreed.news)
            ended = clock.over(position.step)
            window.add("seconds", clock.lap())

            # Step 5. Tell, score, save: none of it changes what is learned.
            if recipe.log.samples:
                tracking.write_samples(position.step, keys)
            times = recipe.eval.times
            scored = bool(times) and (ended or clock.crossed(progress, position.step, times))
            if position.step == 1 or position.step % recipe.log.every_steps == 0 or ended or scored:
                metrics = window.read(accelerator)
                metrics["optim/lr"] = recipe.optim.lr * factor
                metrics["train/skipped"] = float(position.skipped)
                metrics["data/replaced"] = float(position.replaced)
                tracking.write(position.step, metrics)
                show.metrics(position.step, metrics)
                window = Window()
            if scored:
                try:
                    metrics = validate()
                except DataError as error:  # on every rank: what was learned is not lost with it
                    told = f"Nothing is saved of step {position.step}: skipped steps precede it."
                    if not position.skipped_in_a_row:
                        told = f"Saved at step {position.step}: then --resume {run.folder}."
                        told = str(save() or told)
                    raise type(error)(f"{error} {told}") from error
                if metrics:
                    tracking.write(position.step, metrics)
                    logger.info(
                        "Validation at step %d: AP %.4f.", position.step, metrics["eval/ap"]
                    )
                if out_of_patience():
                    logger.info(
                        "No better AP in %d scorings: stopping at step %d. The best was %.4f.",
                        position.worse, position.step, position.best,
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
        unsaved = save()
    finally:
        if loader is not None:
            loader.close()
        show.close()
        stop.restore()

    # What is kept, and what it is worth.
    product = run.folder / "detector.safetensors"
    best = run.folder / BEST
    meet(group)
    use_best = recipe.eval.select == "best" and position.best >= 0 and best.is_file()
    if accelerator.is_main_process:
        if use_best:
            copy_whole(best, product)  # and not a move: a finished run may be resumed
        else:
            write(product, {})
        quarantine.tell(position.replaced)
    meet(group)
    chosen, _ = detector_from_file(product)
    chosen = chosen.to(device).to(memory_format=torch.channels_last)
    scores: dict[str, Results | None] = {}
    unscored: DataError | None = None
    for name, labeled in (("val", sets.val), ("test", sets.test)):
        try:
            scores |= {} if labeled is None else {name: score(labeled, chosen)}
        except DataError as error:  # on every rank
            unscored = unscored or error
    if accelerator.is_main_process:
        kept_step = position.best_step if use_best else position.step
        tell_end(run.folder, position, kept_step, clock.seconds, scores)
    sets.close()
    tracking.close()
    meet(group)
    if group is not None:
        torch.distributed.destroy_process_group()
    if unsaved:
        told = f"{unsaved} What was learned is in {product}."
        raise CheckpointError(f"{told} Not all is scored: {unscored}" if unscored else told)
    if unscored:
        raise type(unscored)(
            f"{unscored} The detector is whole, in {product}: --resume {run.folder} scores it when "
            "all pictures can be read."
        )
    return product
