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
from tests.commands import losses, run

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


def write_detector(file: Path) -> None:
    """Write a detector of two classes as fine-tuning would: random, all scores about a half."""
    import torch

    from finetune.detector import build_detector
    from finetune.weights import parts_of, save_detector

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build_detector("yolo12n", 2)
    for name, parameter in detector.head.named_parameters():
        if name.startswith("classes.") and name.endswith(".2.bias"):
            torch.nn.init.zeros_(parameter)
    save_detector(file, parts_of(detector), names=("a", "b"), image_size=64, metadata={})


def needed(task: str, folder: Path) -> dict[str, str]:
    """Write the file that a task wants, and return the keys below `task.` that name it."""
    if task == "distill":
        write_teacher(folder / "teacher.safetensors")
        return {"teacher": TEACHER, "weights": str(folder / "teacher.safetensors")}
    if task == "self_training":
        write_detector(folder / "detector.safetensors")
        return {"weights": str(folder / "detector.safetensors")}
    return {}


def keys_of(task: str, folder: Path) -> list[str]:
    """Return these keys for the command line."""
    return [f"task.{key}={value}" for key, value in needed(task, folder).items()]


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


def machine() -> str:
    """What rounding depends on: the kind of CPU, and torch."""
    import torch

    about = Path("/proc/cpuinfo")
    lines = about.read_text().split("\n\n")[0].splitlines() if about.exists() else []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    values = {name.strip(): value.strip() for name, value in pairs}
    kind = [values.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
    kind.append(torch.backends.cpu.get_cpu_capability())
    kind += ["AMX"] * ("amx_tile" in values.get("flags", ""))
    return " ".join([*kind, "torch", torch.__version__.partition("+")[0]])


def record(tell: Callable[[str], object]) -> None:
    """Write golden/losses_<task>.json for every task."""
    GOLDEN.mkdir(exist_ok=True)
    for task in sorted(TASKS):
        found = first_losses(task)
        document = {"machine": machine(), "losses": found}
        (GOLDEN / f"losses_{task}.json").write_text(json.dumps(document, indent=1) + "\n")
        tell(f"{task}: {found[0]:.4f} ... {found[-1]:.4f}\n")


if __name__ == "__main__":
    record(sys.stdout.write)
