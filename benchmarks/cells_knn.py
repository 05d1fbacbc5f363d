"""Do pretrained features tell boxed objects apart? Class-balanced kNN on crops of a labeled set.

    python -m benchmarks.cells_knn --data DIR --weights run/pretrained.safetensors ...

DIR has images/{train,val}, YOLO labels in labels/{train,val}/*.txt and names in labels/classes.txt.
Every box is cut out as a square of its longer side times `--context` (moved inside the picture) and
resized. Crops of train are the bank, crops of val the queries; 20 neighbours by cosine, weighted as
in pretrain/probe.py; the figure is the mean recall over classes. Each file of weights is compared
with raw pixels (32 x 32) and with the random initialisation of the same backbone. `centred` is the
same after the bank's mean was taken off: it says how much of a gain is only a moved origin.
BatchNorm's statistics are those in the file (0 and 1 for random weights), or with `--fresh` those
of 1,024 crops of the bank, for every row alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from groundwork.backbones import build_backbone
from groundwork.backbones.product import backbone_from_file
from groundwork.data.decode import open_picture
from groundwork.errors import DataError, GroundworkError
from pretrain.probe import balanced_accuracy, features, fresh_statistics, knn

PIXEL_SIDE = 32
ENDINGS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Crops:
    """Boxed objects: uint8 N side side 3, and the class number of each."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Score(NamedTuple):
    """Mean recall, recall by class (None without a query), and mean recall of centred features."""

    mean: float
    recalls: list[float | None]
    centred: float


def square(
    box: tuple[float, float, float, float], context: float, width: int, height: int
) -> tuple[float, float, float, float]:
    """Turn a YOLO box (centre and sides as shares) into a square inside the picture, in pixels."""
    x, y, w, h = box
    side = min(max(w * width, h * height) * context, width, height)
    left = min(max(x * width - side / 2, 0.0), width - side)
    top = min(max(y * height - side / 2, 0.0), height - side)
    return left, top, left + side, top + side


def read_labels(path: Path, classes: int) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Read one YOLO file; boxes without an area are left out. Raises DataError."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            name, x, y, w, h = line.split()
            label, box = int(name), (float(x), float(y), float(w), float(h))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not 'class x y width height'.") from error
        if not 0 <= label < classes:
            raise DataError(f"{path}, line {number}: class {label} of {classes} classes.")
        if box[2] > 0 and box[3] > 0:
            found.append((label, box))
    return found


def read_crops(
    data: Path, split: str, side: int, context: float, classes: int, threads: int
) -> Crops:
    """Cut every box of a split out of its picture, in the order of the files' names."""
    folder = data / "labels" / split
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise DataError(f"{folder} has no .txt labels.")

    def cut(path: Path) -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
        labeled = read_labels(path, classes)
        pictures = [data / "images" / split / (path.stem + ending) for ending in ENDINGS]
        file = next((one for one in pictures if one.is_file()), None)
        if file is None:
            raise DataError(f"{path} has no picture {pictures[0].with_suffix('')} beside it.")
        picture = open_picture(file.read_bytes())
        boxes = [square(box, context, picture.width, picture.height) for _, box in labeled]
        return (picture.cut(boxes, side) if boxes else []), [label for label, _ in labeled]

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(cut, paths))
    pixels = [crop for crops, _ in parts for crop in crops]
    labels = [label for _, some in parts for label in some]
    if not pixels:
        raise DataError(f"{folder} has no boxes.")
    return Crops(torch.from_numpy(np.stack(pixels)), torch.tensor(labels, dtype=torch.int64))


def balanced(crops: Crops, per_class: int, seed: int) -> Crops:
    """Keep up to `per_class` crops of each class, drawn by `seed`, in their old order."""
    generator = np.random.default_rng(seed)
    labels = crops.labels.numpy()
    rows = [generator.permutation(np.flatnonzero(labels == one)) for one in np.unique(labels)]
    kept = torch.from_numpy(np.sort(np.concatenate([some[:per_class] for some in rows])))
    return Crops(crops.pixels[kept], crops.labels[kept])


def raw_pixels(crops: Crops) -> Tensor:
    """Return pixels of crops resized to 32 x 32: float32 (N, 3072)."""
    small = [
        functional.interpolate(
            batch.permute(0, 3, 1, 2).float() / 255,
            size=PIXEL_SIDE,
            mode="bilinear",
            antialias=True,
        ).flatten(1)
        for batch in torch.split(crops.pixels, 1024)
    ]
    return torch.cat(small)


def score(bank: Tensor, queries: Tensor, known: Tensor, wanted: Tensor, classes: int) -> Score:
    """Compare queries (Q, D) with the bank (N, D)."""
    predicted = knn(bank, known, queries, classes)
    mean = bank.mean(dim=0)
    moved = knn(bank - mean, known, queries - mean, classes)
    asked = set(wanted.tolist())
    recalls = [
        float((predicted[wanted == one] == one).double().mean()) if one in asked else None
        for one in range(classes)
    ]
    return Score(balanced_accuracy(predicted, wanted), recalls, balanced_accuracy(moved, wanted))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write a table and one line of JSON."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        report = measure(options)
    except GroundworkError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(table(report))
    sys.stdout.write(json.dumps(report) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Read the crops, compute every kind of features, and score them."""
    try:
        names = (options.data / "labels" / "classes.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"The names of the classes cannot be read: {error}") from error
    classes = [name.strip() for name in names.splitlines() if name.strip()]
    bank, queries = (
        read_crops(
            options.data, split, options.image_size, options.context, len(classes), options.threads
        )
        for split in ("train", "val")
    )
    if options.bank_per_class is not None:
        bank = balanced(bank, options.bank_per_class, seed=0)
    rows: list[dict[str, Any]] = []

    def add(kind: str, first: Tensor, second: Tensor, seconds: float) -> None:
        result = score(first, second, bank.labels, queries.labels, len(classes))
        rows.append({"features": kind, "seconds": round(seconds, 1), **result._asdict()})

    if not options.no_pixels:
        add("pixels", raw_pixels(bank), raw_pixels(queries), 0.0)
    subjects: list[tuple[str, int | None]] = [(f"random, seed {s}", s) for s in options.seeds]
    subjects += [(str(path), None) for path in options.weights]
    for kind, seed in subjects:
        if seed is None:
            backbone = backbone_from_file(Path(kind))
        else:
            torch.manual_seed(seed)
            backbone = build_backbone(options.backbone)
        started = time.perf_counter()
        chosen = torch.arange(min(1024, len(bank))) * len(bank) // min(1024, len(bank))
        with ExitStack() as stack:
            if options.fresh:
                some = bank.pixels[chosen]
                stack.enter_context(fresh_statistics(backbone, some, options.batch_size))
            found = [
                features(backbone, one.pixels, options.batch_size, options.levels)
                for one in (bank, queries)
            ]
        add(kind, found[0], found[1], time.perf_counter() - started)
    settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
    return {
        "settings": settings,
        "classes": classes,
        "bank": torch.bincount(bank.labels, minlength=len(classes)).tolist(),
        "queries": torch.bincount(queries.labels, minlength=len(classes)).tolist(),
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Lay the report out for a person."""
    classes = report["classes"]
    lines = [
        "crops: "
        + "; ".join(
            f"{name} {bank} in the bank, {queries} queries"
            for name, bank, queries in zip(classes, report["bank"], report["queries"], strict=True)
        ),
        f"{'features':40} {'kNN':>7} {'centred':>8} "
        + " ".join(f"{name[:9]:>9}" for name in classes),
    ]
    for row in report["rows"]:
        recalls = " ".join(
            f"{'-' if value is None else f'{value:.3f}':>9}" for value in row["recalls"]
        )
        lines.append(
            f"{row['features'][-40:]:40} {row['mean']:7.4f} {row['centred']:8.4f} {recalls}"
        )
    chance = [row["mean"] for row in report["rows"] if row["features"].startswith("random")]
    if len(chance) > 1:
        lines.append(
            f"random: mean {np.mean(chance):.4f}, from {min(chance):.4f} to {max(chance):.4f}"
        )
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cells_knn", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="*", default=[])
    parser.add_argument("--backbone", default="yolo12n", help="whose random weights to compare")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--context", type=float, default=1.0, help="square side / longer box side")
    parser.add_argument(
        "--levels", nargs="+", choices=["c3", "c4", "c5"], default=["c5"], help="pooled and joined"
    )
    parser.add_argument("--bank-per-class", type=int, default=None, help="at most, drawn once")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--fresh", action="store_true", help="BatchNorm statistics of the bank")
    parser.add_argument("--no-pixels", action="store_true")
    parser.add_argument("--json", type=Path, default=None, help="also write the report here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
