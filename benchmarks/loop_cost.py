"""What the loop costs: images/s of a whole run beside the bare steps, in one process.

`python -m benchmarks.loop_cost` alternates the real loop (pretrain.loop, with its loader, metrics
and checks, one data worker) with bare forward, backward and optimiser steps on a batch that is
ready in memory, and compares the medians of the step times.

Two settings. With one thread the training process and the worker have a core each, so that nothing
of the worker is in the run's time. With two threads they share two cores: the worker's own CPU time
is subtracted from the run's, once as it is (a thread that waits for the worker makes the other wait
as well) and once halved (the work spread over both cores).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from groundwork.backbones import build_backbone
from groundwork.data.loader import Loader
from groundwork.data.order import Order
from groundwork.data.samples import open_samples
from groundwork.optim import build_optimizer
from groundwork.run_folder import prepare_run
from pretext_tasks import load_task
from pretrain import recipe as recipes
from pretrain.loop import pretrain


def bare_steps(recipe: recipes.Recipe, steps: int) -> list[float]:
    """Seconds of each bare step: forward, backward, update (no clip), on one ready batch."""
    torch.manual_seed(0)
    task_class = load_task(recipe.task_name)
    _, config = recipes.with_task_defaults(recipe, task_class.Config)
    samples = open_samples(recipe.data.train, cache=recipe.data.cache_folder(), cache_bytes=10**9)
    order = Order(samples.shard_sizes, seed=0)
    views = task_class.views(config, recipe.image_size)
    loader = Loader(samples, order, views, seed=0, batch_size=recipe.batch_size)
    batch = next(iter(loader)).views
    loader.close()
    task = task_class(build_backbone(recipe.backbone.name), config)
    task = task.to(memory_format=torch.channels_last)  # as the loop does
    optimizer = build_optimizer(recipe.optim, task)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        task(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(0.5)
        seconds.append(time.perf_counter() - began)
    return seconds


def run_steps(recipe: recipes.Recipe, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each step of a real run, and the worker's CPU seconds for each."""
    task_class = load_task(recipe.task_name)
    recipe, config = recipes.with_task_defaults(recipe, task_class.Config)
    run = prepare_run(recipe, "bench", folder, resumed=False)
    pretrain(recipe, task_class, config, run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "speed/images_per_second" in line]
    return (
        [recipe.batch_size / line["speed/images_per_second"] for line in lines],
        [line["speed/worker_seconds"] for line in lines],
    )


def measure(
    data: str, threads: int, steps: int, rounds: int, size: int, batch: int
) -> dict[str, Any]:
    """Alternate bare steps and real runs; return medians and ratios."""
    keys = [
        f"data.train={data}", f"image_size={size}", f"batch_size={batch}", f"budget.steps={steps}",
        "log.every_steps=1", "data.workers=1", f"threads={threads}", "probe.times=0",
        "probe.labeled=null",
    ]  # fmt: skip
    recipe = recipes.resolve("byol", None, keys)
    torch.set_num_threads(threads)
    bare: list[float] = []
    whole: list[float] = []
    worker: list[float] = []
    for _ in range(rounds):
        bare += bare_steps(recipe, steps)[2:]
        with tempfile.TemporaryDirectory() as folder:
            seconds, cpu = run_steps(recipe, Path(folder) / "run")
        whole += seconds[2:]  # the first two wait for the worker to start
        worker += cpu[2:]
    step, bare_step, cpu_step = map(statistics.median, (whole, bare, worker))
    return {
        "threads": threads,
        "bare_images_per_second": batch / bare_step,
        "run_images_per_second": batch / step,
        "worker_cpu_seconds_per_step": cpu_step,
        "ratio_as_it_is": bare_step / step,
        "ratio_worker_halved": bare_step / (step - cpu_step / 2) if threads > 1 else None,
        "ratio_worker_set_apart": bare_step / (step - cpu_step)
        if threads > 1
        else bare_step / step,
    }


def main() -> None:
    """Measure with one and with two threads, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    for threads in (1, 2):
        found = measure(
            options.data, threads, options.steps, options.rounds, options.image_size,
            options.batch_size,
        )  # fmt: skip
        sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
