"""The same work by our second stage and by ultralytics' yolo12n, side by side, from scratch.

    python -m benchmarks.detector_peers --data ROOT --train-list NAMES --python OTHER/bin/python \
        --seeds 0 1 2 --work FOLDER

Both train yolo12n from random weights on the same list of pictures: AdamW at 1e-3, the same epochs,
picture size and batch, validation off, on the CPU, one after the other at every seed. Both are
scored on the test split by pycocotools, from boxes above 0.001, IoU 0.7, 300 a picture. Reported
are AP, images/s of training (pictures of all epochs over the time of the epochs) and of evaluation
(all pictures of the test split over the time of the call that finds and scores their boxes, the
second of two; of theirs also by the times that it tells itself, which leave out reading). The
labels that both train on and are scored by are ours, mended by the policy that finetune.labels
tells. ultralytics is AGPL-3.0: it runs as a program, in an environment of its own that --python
names; nothing of it is imported here. Every figure is written to FOLDER/results.json as soon as it
is there, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.evaluate import detect_all, measure
from finetune.metrics import to_rows
from finetune.weights import detector_from_file
from groundwork.data.decode import open_picture
from groundwork.data.labels import LabeledSamples, open_labeled

# What the other program is told to do, in its own words: train, then validate twice.
PROGRAM = """
import json, sys, time
from ultralytics import YOLO
job = json.loads(sys.argv[1])
model = YOLO("yolo12n.yaml")
model.train(data=job["data"], epochs=job["epochs"], imgsz=job["size"], batch=job["batch"],
            optimizer="AdamW", lr0=1e-3, device="cpu", val=False, seed=job["seed"], workers=1,
            plots=False, project=job["out"], name="train", exist_ok=True, pretrained=False,
            verbose=False)
model = YOLO(job["out"] + "/train/weights/last.pt")
for _ in range(2):
    began = time.perf_counter()
    found = model.val(data=job["data"], split="test", imgsz=job["size"], batch=16, device="cpu",
                      conf=0.001, iou=0.7, max_det=300, workers=1, plots=False, save_json=True,
                      project=job["out"], name="val", exist_ok=True, verbose=False)
    seconds = time.perf_counter() - began
json.dump({"val_seconds": seconds, "speed": found.speed}, open(job["out"] + "/val.json", "w"))
"""


def write_yolo(labeled: dict[str, LabeledSamples], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write pictures as links and labels as YOLO text; return data.yaml and COCO's test truth."""
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for split, samples in labeled.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for shard, size in enumerate(samples.shard_sizes):
            for index in range(int(size)):
                sample = samples.read(shard, index)
                picture = open_picture(sample.image)
                found = samples.annotations(sample, picture)
                source = Path(sample.source).resolve()
                link = folder / "images" / split / source.name
                if not link.exists():
                    link.symlink_to(source)
                lines = []
                for box, label in zip(found.boxes.tolist(), found.classes.tolist(), strict=True):
                    left, top, right, bottom = box
                    x, w = (left + right) / 2 / picture.width, (right - left) / picture.width
                    y, h = (top + bottom) / 2 / picture.height, (bottom - top) / picture.height
                    lines.append(f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n")
                    if split == "test":
                        truth["annotations"].append(
                            {
                                "id": len(truth["annotations"]) + 1,
                                "image_id": source.stem,
                                "category_id": label,
                                "bbox": [left, top, right - left, bottom - top],
                                "area": (right - left) * (bottom - top),
                                "iscrowd": 0,
                            }
                        )
                (folder / "labels" / split / f"{source.stem}.txt").write_text("".join(lines))
                if split == "test":
                    truth["images"].append(
                        {"id": source.stem, "width": picture.width, "height": picture.height}
                    )
    names = labeled["test"].names
    truth["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    yaml = folder / "data.yaml"
    yaml.write_text(
        f"path: {folder.resolve()}\ntrain: images/train\nval: images/test\ntest: images/test\n"
        f"names: {json.dumps(list(names))}\n"
    )
    return yaml, truth


def scored(truth: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Score boxes (COCO's results, image ids as names) by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {one["id"]: number for number, one in enumerate(truth["images"])}
    coco = COCO()
    coco.dataset = {
        "images": [{**one, "id": numbers[one["id"]]} for one in truth["images"]],
        "annotations": [
            {**one, "image_id": numbers[one["image_id"]]} for one in truth["annotations"]
        ],
        "categories": truth["categories"],
        "info": {},
    }
    coco.createIndex()
    found = coco.loadRes([{**row, "image_id": numbers[str(row["image_id"])]} for row in rows])
    evaluation = COCOeval(coco, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {"ap": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])}


def run_theirs(options: argparse.Namespace, yaml: Path, seed: int, out: Path) -> dict[str, Any]:
    """Run the other program; return its time of training, of evaluation, and its boxes' place."""
    job = {
        "data": str(yaml), "epochs": options.epochs, "size": options.image_size,
        "batch": options.batch_size, "seed": seed, "out": str(out.resolve()),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    quiet = {
        **os.environ, "YOLO_CONFIG_DIR": str(options.work.resolve()), "YOLO_OFFLINE": "true",
    }  # fmt: skip
    with (out / "log.txt").open("w") as log:
        subprocess.run(
            [str(options.python), "-c", PROGRAM, json.dumps(job)],
            check=True, cwd=out, env=quiet, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    lines = (out / "train" / "results.csv").read_text().splitlines()
    column = [name.strip() for name in lines[0].split(",")].index("time")
    seconds = float(lines[-1].split(",")[column])
    told = json.loads((out / "val.json").read_text())
    rows = json.loads((out / "val" / "predictions.json").read_text())
    # Class numbers of the json are counted from 1 for sets of one's own.
    shift = 1 if min(row["category_id"] for row in rows) > 0 else 0
    rows = [{**row, "category_id": row["category_id"] - shift} for row in rows]
    told_ms = sum(told["speed"].values())
    return {
        "train_seconds": seconds,
        "val_seconds": told["val_seconds"],
        "rows": rows,
        "told_images_per_second": 1000 / told_ms,
    }


def run_ours(options: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    """Run our command; return the same."""
    command = [
        sys.executable, "-m", "finetune.run", "--out", str(out), f"data.train={options.data}",
        f"data.train_list={options.train_list}", f"image_size={options.image_size}",
        f"batch_size={options.batch_size}", f"budget.epochs={options.epochs}", "optim.name=adamw",
        "optim.lr=0.001", "eval.times=0", f"seed={seed}", "data.workers=1", *options.keys,
    ]  # fmt: skip
    if out.exists():  # left by a run that was stopped; half of it would not be timed
        shutil.rmtree(out)
    with (out.parent / f"{out.name}.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "speed/images_per_second" in line]
    steps = np.diff([0, *(line["step"] for line in lines)])
    speeds = np.array([line["speed/images_per_second"] for line in lines])
    seconds = float((steps * options.batch_size / speeds).sum())
    detector, about = detector_from_file(out / "detector.safetensors")
    detector = detector.to(memory_format=torch.channels_last)
    test = open_labeled(options.data, "test", cache=options.work, cache_bytes=10**9)
    ids = [
        Path(test.read(shard, index).source).stem
        for shard, size in enumerate(test.shard_sizes)
        for index in range(int(size))
    ]
    for _ in range(2):
        began = time.perf_counter()
        seen = detect_all(detector, test, image_size=options.image_size, batch_size=16)
        assert seen is not None
        measure(seen, about.names)
        val_seconds = time.perf_counter() - began
    assert seen is not None
    rows = to_rows(seen.found, ids)
    return {"train_seconds": seconds, "val_seconds": val_seconds, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write results."""
    options = _parser().parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    names = Path(options.train_list)
    sets = {
        "train": open_labeled(
            options.data, "train", cache=options.work, cache_bytes=10**9, names_in=names
        ),
        "test": open_labeled(options.data, "test", cache=options.work, cache_bytes=10**9),
    }
    yaml, truth = write_yolo(sets, options.work / "data")
    pictures = {split: len(samples) for split, samples in sets.items()}
    file = options.work / "results.json"
    results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(one["seed"], one["by"]) for one in results}
    for seed in options.seeds:
        for by in ("ours", "ultralytics"):
            if (seed, by) in done or by not in options.only:
                continue
            out = options.work / f"{by}-{seed}"
            found = (
                run_ours(options, seed, out)
                if by == "ours"
                else run_theirs(options, yaml, seed, out)
            )
            steps = -(-options.epochs * pictures["train"] // options.batch_size)
            seen = (
                steps * options.batch_size if by == "ours" else options.epochs * pictures["train"]
            )
            results.append(
                {
                    "seed": seed,
                    "by": by,
                    **scored(truth, found["rows"]),
                    "train_images_per_second": seen / found["train_seconds"],
                    "val_images_per_second": pictures["test"] / found["val_seconds"],
                    "told_images_per_second": found.get("told_images_per_second"),
                }
            )
            file.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(json.dumps(results[-1]) + "\n")
            sys.stdout.flush()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector_peers")
    parser.add_argument("--data", required=True)
    parser.add_argument("--train-list", required=True)
    parser.add_argument("--python", type=Path, required=True, help="of the other environment")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=["ours", "ultralytics"])
    parser.add_argument("--keys", nargs="*", default=[], help="more key=value for ours")
    return parser


if __name__ == "__main__":
    sys.exit(main())
