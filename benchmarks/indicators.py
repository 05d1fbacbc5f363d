"""How well does what a run measures while it pretrains rank files by what they give a detector?

    python -m benchmarks.indicators --data ROOT ... --work FOLDER --plan PLAN --inits NAME ... \
        --fractions 5 --steps 500 --results docs/results/indicators.json

The inits are those of `python -m benchmarks.label_efficiency`, with the same flags, and so are the
runs: a pretraining or fine-tuning that is in --work is not done again. For every init's file the
indicators of pretrain/probe.py are measured: spread and rank without labels, kNN and linear probe
on crops of the labeled boxes, at 96 px, where there are two classes or more, and the detection
probe on the labeled pictures of the fraction. Then Spearman's rank correlation of each with AP
on the validation and on the test split after fine-tuning (--no-test: on the first alone), over the
inits of a set, and over those of --alone, which tells whether it ranks what lies close together,
too. `scratch` takes part, with the random weights that its fine-tuning began with. Of several
--steps the best on val counts.

Those that use labels are of the same validation pictures as the AP that they are to rank: what is
odd about these pictures helps them a little, and spread and rank not.

Writes --results (a JSON list) and a Markdown table beside it.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import label_efficiency
from benchmarks.cells_knn import Crops, read_crops
from benchmarks.label_efficiency import Study
from benchmarks.label_efficiency_plan import Init, inits_of
from benchmarks.runs import told
from finetune.detector import Detector, build_detector
from finetune.weights import load_init
from groundwork.config import read_yaml
from groundwork.data.labels import open_labeled
from groundwork.data.samples import open_samples
from groundwork.files import write_file
from groundwork.settings import DetectionProbeSettings, ProbeSettings
from pretrain.detection_probe import open_detection_probe
from pretrain.probe import Probe, balanced_accuracy, features, fresh_statistics, knn, linear

logger = logging.getLogger(__name__)

RESULTS = Path("docs/results/indicators.json")
INDICATORS = ("spread", "rankme", "rankme_centred", "knn", "linear", "ap", "ap_backbone")
SPLITS = ("val", "test")
_CROP = 96
_BATCH = 64


class Measures:
    """The indicators of one data set's pictures, read once."""

    def __init__(self, study: Study, fraction: float) -> None:
        options, data = study.options, study.data
        names = study.names(fraction, 0)
        detection = open_detection_probe(
            DetectionProbeSettings(
                data=str(data),
                train_list=None if names is None else str(names),
                image_size=options.image_size,
            ),
            cache=study.work,
            cache_bytes=10**9,
        )
        unlabeled = str(options.unlabeled or data / "images" / "train")
        samples = open_samples(unlabeled, cache=study.work, cache_bytes=10**9)
        assert detection is not None
        self._detection = detection
        self._probe = Probe(ProbeSettings(), samples, options.image_size)
        samples.close()
        self._crops: tuple[Crops, Crops] | None = None
        train, val = (
            open_labeled(str(data), split, cache=study.work, cache_bytes=10**9, names_in=listed)
            for split, listed in (("train", names), ("val", None))
        )
        self.classes = len(train.names)
        if self.classes > 1:
            self._crops = read_crops(train, _CROP), read_crops(val, _CROP)
        train.close()
        val.close()

    def of(self, detector: Detector, with_neck: bool) -> dict[str, float]:
        """Measure a detector's backbone, and its neck where it was pretrained."""
        backbone = detector.backbone
        found = self._probe.measure(backbone) | self._detection.measure(backbone)
        measured = {name.removeprefix("probe/"): value for name, value in found.items()}
        measured["ap_backbone"] = measured["ap"]
        if with_neck:
            measured["ap"] = self._detection.measure(backbone, detector.neck)["probe/ap"]
        if self._crops is not None:
            bank, queries = self._crops
            some = bank.pixels[:: max(1, len(bank) // 1024)]
            with fresh_statistics(backbone, some, _BATCH):
                known, asked = (features(backbone, one.pixels, _BATCH) for one in self._crops)
            for name, classify in (("knn", knn), ("linear", linear)):
                answer = classify(known, bank.labels, asked, self.classes)
                measured[name] = balanced_accuracy(answer, queries.labels)
        return {name: measured[name] for name in INDICATORS if name in measured}


def row_of(study: Study, init: Init, fraction: float, measures: Measures) -> dict[str, Any]:
    """Fine-tune unless it is done, measure, and return a row of the results."""
    val = {steps: study.outcome(init, fraction, 0, steps).ap for steps in init.steps}
    weights = study.weights(init, fraction, 0)
    recipe = read_yaml(study.train(init, fraction, 0, init.steps[0]) / "recipe.yaml")
    torch.manual_seed(recipe["seed"])
    bands = recipe["data"]["bands"]
    detector = build_detector(
        recipe["backbone"]["name"], num_classes=measures.classes,
        in_channels=3 if bands is None else len(bands),
    )  # fmt: skip
    loaded: frozenset[str] = frozenset()
    if weights is not None:
        loaded = load_init(detector, weights, recipe["detector"]["take"]).loaded
    best = max(val, key=lambda steps: (val[steps], -steps))
    on_test = {} if study.options.no_test else {"test_ap": on_test_of(study, init, fraction, best)}
    return {
        "dataset": study.data.name,
        "init": init.name,
        "fraction": fraction,
        "val_ap": val[best],
        **on_test,
        "val_ap_by_steps": {str(steps): ap for steps, ap in val.items()},
        "indicators": measures.of(detector.to(memory_format=torch.channels_last), "neck" in loaded),
    }


def on_test_of(study: Study, init: Init, fraction: float, steps: int) -> float:
    """Return AP on the test split of what is scored of a fine-tuning."""
    return float(study.score(study.outcome(init, fraction, 0, steps).file, "test").ap)


def correlations(
    rows: Sequence[dict[str, Any]], split: str = "val"
) -> dict[str, tuple[float, int]]:
    """Return Spearman's rho with AP on a split, and over how many rows, by indicator."""
    found = {}
    for name in INDICATORS:
        pairs = [
            (one["indicators"][name], one[f"{split}_ap"])
            for one in rows
            if name in one["indicators"] and f"{split}_ap" in one
        ]
        if len(pairs) > 2:
            found[name] = spearman(*zip(*pairs, strict=True)), len(pairs)
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation, ties with their mean rank; NaN where one side is constant."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: Sequence[float]) -> Any:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def table(rows: Sequence[dict[str, Any]], alone: Sequence[str] = ()) -> str:
    """Return Markdown: a table for each set, its rows by AP, and the correlations below them."""
    lines: list[str] = []
    for (dataset, fraction), group in groupby(rows, lambda one: (one["dataset"], one["fraction"])):
        found = sorted(group, key=lambda one: -one["val_ap"])
        lines += [
            f"| {dataset}, {fraction:g} % | AP on val | on test | " + " | ".join(INDICATORS) + " |",
            "|---" * (len(INDICATORS) + 3) + "|",
        ]
        for one in found:
            values = [one["indicators"].get(name) for name in INDICATORS]
            shown = ["" if value is None else f"{value:.3g}" for value in values]
            on_test = f"{one['test_ap']:.3f}" if "test_ap" in one else ""
            lines.append(
                f"| {one['init']} | {one['val_ap']:.3f} | {on_test} | " + " | ".join(shown) + " |"
            )
        some = [one for one in found if one["init"] in alone]
        for split in SPLITS:
            for those, of in ((found, f"these {len(found)}"), (some, ", ".join(alone))):
                if rho := correlations(those, split):
                    shown = [f"{rho[name][0]:+.2f}" if name in rho else "" for name in INDICATORS]
                    said = f"| Spearman's rho with AP on {split}, of {of} | | | "
                    lines.append(said + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write results and table."""
    parser = label_efficiency.parser()
    parser.prog = "python -m benchmarks.indicators"
    parser.set_defaults(results=RESULTS)
    parser.add_argument("--alone", nargs="*", default=[], metavar="INIT", help="ranked alone, too")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = json.loads(options.results.read_text()) if options.results.is_file() else []

    def tell() -> None:
        write_file(options.results.with_suffix(".md"), table(rows, options.alone))

    for data in options.data:
        study = Study(options, data)
        for fraction in options.fractions:
            measures = Measures(study, fraction)
            for init in inits_of(options, data):
                where = {"dataset": data.name, "init": init.name, "fraction": fraction}
                asked = {str(steps) for steps in options.steps}
                done = [one for one in rows if where.items() <= one.items()]
                if any(
                    asked == set(one["val_ap_by_steps"]) and (options.no_test or "test_ap" in one)
                    for one in done
                ):
                    continue
                rows[:] = [one for one in rows if one not in done]
                row = row_of(study, init, fraction, measures)
                rows.append(row)
                rows.sort(key=lambda one: (one["dataset"], one["fraction"], one["init"]))
                options.results.parent.mkdir(parents=True, exist_ok=True)
                write_file(options.results, json.dumps(rows, indent=1) + "\n")
                logger.info("%s: %s", init.name, row["indicators"])
                tell()
    if rows:
        tell()  # others may be ranked alone than before
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
