"""Do pretrained features tell boxed objects apart? Class-balanced kNN on crops of a labeled set.

    python -m benchmarks.cells_knn --data DIR --weights run/pretrained.safetensors ...

DIR is the root of a labeled data set with the splits train and val (docs/finetune.md). Every box is
cut out as a square of its longer side times `--context` (moved inside the picture) and resized.
Crops of train are the bank, crops of val the queries; 20 neighbours by cosine, weighted as in
pretrain/probe.py; the figure is the mean recall over classes. Each file of weights is compared with
raw pixels (32 x 32) and with the random initialisation of the same backbone. `centred` is the same
after the bank's mean was taken off: it says how much of a gain is only a moved origin. BatchNorm's
statistics are those in the file (0 and 1 for random weights), or with `--fresh` those of 1,024
crops of the bank, for every row alike.
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
from groundwork.data.labels import LabeledSamples, open_labeled
from groundwork.data.resize import Box
from groundwork.errors import DataError, GroundworkError
from groundwork.settings import Data
from pretrain.probe import balanced_accuracy, features, fresh_statistics, knn

PIXEL_SIDE = 32


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


def square(box: Sequence[float], context: float, width: int, height: int) -> Box:
    """Turn a box (left, top, right, bottom) into a square inside the picture, all in pixels."""
    left, top, right, bottom = box
    side = min(max(right - left, bottom - top) * context, width, height)
    left = min(max((left + right - side) / 2, 0.0), width - side)
    top = min(max((top + bottom - side) / 2, 0.0), height - side)
    return left, top, left + side, top + side


def read_crops(labeled: LabeledSamples, side: int, context: float = 1.0, threads: int = 1) -> Crops:
    """Cut every box out of its picture, in the order of the pictures; crowds are left out.

    Raises DataError where a picture cannot be read, or there is no box.
    """
    places = [
        (shard, index)
        for shard, size in enumerate(labeled.shard_sizes.tolist())
        for index in range(size)
    ]

    def cut(place: tuple[int, int]) -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
        _, picture, its = labeled.look(*place)
        boxes = [
            square(box, context, picture.width, picture.height)
            for box in its.boxes[~its.crowd].tolist()
        ]
        return (picture.cut(boxes, side) if boxes else []), its.classes[~its.crowd].tolist()

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(cut, places))
    pixels = [crop for crops, _ in parts for crop in crops]
    labels = [label for _, some in parts for label in some]
    if not pixels:
        raise DataError(f"{labeled.name} has no boxes.")
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
    cache = Data().cache_folder()
    parts = []
    for split in ("train", "val"):
        labeled = open_labeled(str(options.data), split, cache=cache, cache_bytes=10**9)
        parts.append(read_crops(labeled, options.image_size, options.context, options.threads))
        labeled.close()
    bank, queries = parts
    classes = list(labeled.names)
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
