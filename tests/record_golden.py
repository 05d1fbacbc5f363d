"""The first ten losses of every task, as the whole loop gives them: `make golden` records them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pretext_tasks import TASKS
from tests.pretrain.commands import losses, run

GOLDEN = Path(__file__).parent / "golden"
KEYS = [
    "backbone.name=yolo12n",
    "image_size=64",
    "batch_size=8",
    "budget.steps=10",
    "log.every_steps=1",
    "data.workers=0",
    "threads=1",
    "probe.labeled=null",
    "probe.times=0",
    "report=false",
]


def write_pictures(folder: Path) -> None:
    """Write 24 small pictures without loss: a decoder's rounding does not enter."""
    folder.mkdir()
    for seed in range(24):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC)
        image.save(folder / f"{seed:02d}.png")


TEACHER = "timm/test_vit"  # 0.4 million parameters, made by timm for tests


def write_teacher(file: Path) -> None:
    """Write a teacher's weights as timm would: random ones."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(TEACHER.removeprefix("timm/"), pretrained=False)
    save_file(dict(model.state_dict()), file)


def keys_of(task: str, folder: Path) -> list[str]:
    """Return what a task must be told: distillation, of its teacher."""
    if task != "distill":
        return []
    write_teacher(folder / "teacher.safetensors")
    return [f"task.teacher={TEACHER}", f"task.weights={folder / 'teacher.safetensors'}"]


def first_losses(task: str) -> list[float]:
    """Run ten steps of a task by its own recipe's settings, on one thread."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "pictures")
        out = folder / "out"
        done = run(
            1,
            folder,
            "--task",
            task,
            "--out",
            str(out),
            f"data.train={folder / 'pictures'}",
            *KEYS,
            *keys_of(task, folder),
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [loss for _, loss in sorted(losses(out).items())]


def record(tell: Callable[[str], object]) -> None:
    """Write golden/losses_<task>.json for every task."""
    GOLDEN.mkdir(exist_ok=True)
    for task in sorted(TASKS):
        found = first_losses(task)
        (GOLDEN / f"losses_{task}.json").write_text(json.dumps(found, indent=1) + "\n")
        tell(f"{task}: {found[0]:.4f} ... {found[-1]:.4f}\n")


if __name__ == "__main__":
    record(sys.stdout.write)
