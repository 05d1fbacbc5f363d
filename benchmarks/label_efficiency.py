"""Does pretraining pay? A detector trained on few labels, from nothing and from pretrained files.

    python -m benchmarks.label_efficiency --data ROOT ... --work FOLDER --fractions 5 \
        --inits scratch inpainting byol --seeds 3 --pretrain-minutes 10 --steps 500 1000 2000 4000

For every data set and init: pretrain once on the unlabeled training pictures (`scratch` does not),
all inits for the same wall-clock minutes; fine-tune on a fraction of the labels; score on the test
split. Of several --steps each init gets the schedule length with the best AP on the validation
split at the first seed, and later seeds run that length alone. The test split is scored for the
chosen length only.

An init is a recipe of recipes/pretrain, or an entry of --plan, a YAML file:

    finetune: [optim.lr=0.001]            # keys of every fine-tuning
    inits:
      scratch: {finetune: [optim.lr=0.002]}
      inpainting-neck:
        recipe: inpainting                # what pretrains; of all sets, or by set as below
        pretrain: [task.neck=n]
        finetune: [optim.backbone_lr=0.3]
      domain: {recipe: {medical-txl-pbc: medical, aerial-hrplanes: aerial}}
      other-tool: {weights: {medical-txl-pbc: FILE, aerial-hrplanes: FILE}, minutes: 10}
      two-stages: {recipe: regions, start: byol}
      taught: {recipe: self_training, teacher: domain, steps: [1000, 2000]}

A `start` is another init, whose pretrained file this one's pretraining begins with (--init). A
`teacher` is another init: its detector of the same labels after its longest fine-tuning is the
pretraining's task.weights, and where it starts; that pretraining is done for each fraction and
seed. Either's minutes count. An init with `steps` has these lengths instead of
--steps; with `average: 0.5`, its detector is the mean of the fine-tuned one and of the one that it
began with (finetune/average.py), here in equal shares; of several, `average: [0, 0.5, 1]` (0: the
fine-tuned one, 1: the one that it began with), the one that is best on val, for each seed.

The labeled pictures of a fraction are those of --lists/<set>-<NN>pct-seed<S>.txt, or where there is
no such file, drawn from the set's training pictures by the seed. Every figure is written to
--results (a JSON list: docs/results.md) as soon as it is there; what is there is not run
again, and a run that was cut off goes on where its last checkpoint is. Studies of other sets or
inits may write the same --results at the same time. With --no-test nothing is scored on test and
nothing written: this is for choices, which are made on val.

Each pretraining has a cache of its own: what one works out of pictures is in no other's minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.label_efficiency_plan import Init, inits_of
from benchmarks.label_efficiency_results import read, settings_of, update
from benchmarks.runs import curve, drawn, go_on, noted, told, val_ap
from finetune.average import write as write_average
from finetune.evaluate import evaluate
from finetune.metrics import Results
from finetune.weights import detector_from_file
from groundwork.command import has_checkpoint
from groundwork.data.labels import open_labeled
from groundwork.errors import DataError, UsageError
from groundwork.files import write_file
from groundwork.stages import same_as_before
from pretrain.stage_keys import score_keys, taught_from_val

logger = logging.getLogger(__name__)

RESULTS = Path("docs/results/label_efficiency.json")


class Outcome(NamedTuple):
    """What is scored of a fine-tuning, its AP on val, and the share of its start in it."""

    file: Path
    ap: float
    average: float


@dataclass
class Study:
    """One data set's part of the study."""

    options: argparse.Namespace
    data: Path
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The folder of this set's runs."""
        folder: Path = self.options.work / self.data.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def pretraining(self, init: Init, fraction: float, seed: int) -> Path:
        """Return the run folder of an init's pretraining."""
        of = f"-{fraction:g}pct-seed{seed}" if init.labeled else ""
        return self.work / f"pretrain-{init.name}{of}"

    def weights(self, init: Init, fraction: float, seed: int) -> Path | None:
        """Pretrain, unless it is done, and return the file; None for random weights."""
        if init.weights is not None:
            return init.weights
        if init.recipe is None:
            return None
        run, start = self.pretraining(init, fraction, seed), None
        file, cache = run / "pretrained.safetensors", self.work / f"cache-{run.name}"
        flags = ["--task" if "+" in init.recipe else "--recipe", init.recipe]
        keys = [
            f"data.train={self.options.unlabeled or self.data / 'images' / 'train'}",
            f"data.cache={cache}",
            f"budget.minutes={init.minutes}",
            "probe.labeled=null",
            *init.pretrain,
        ]
        if init.teacher is not None:
            teacher = self.outcome(init.teacher, fraction, seed, max(init.teacher.steps)).file
            keys += [f"task.weights={teacher}", *self.scores(teacher, init, keys)]
            start = teacher
        elif init.start is not None:
            start = self.weights(init.start, fraction, seed)
        flags += [] if start is None else ["--init", str(start)]
        command = ["-m", "pretrain.run", "--out", str(run), *flags, *keys]
        same_as_before(run, command, start)
        if not file.is_file():
            if not has_checkpoint(run):
                shutil.rmtree(cache, ignore_errors=True)  # it begins anew, with all its minutes
            go_on("pretrain.run", run, flags, keys)
        return file

    def names(self, fraction: float, seed: int) -> Path | None:
        """Return the file that lists the labeled pictures of a fraction; None for all of them."""
        if fraction >= 100:
            return None
        name = f"{self.data.name}-{fraction:02g}pct-seed{seed}.txt"
        if self.options.lists is not None and (given := self.options.lists / name).is_file():
            return Path(given)
        made = self.work / name
        if not made.is_file():
            stems = drawn(self.data, self.work, fraction, seed)
            made.write_text("".join(f"{stem}\n" for stem in stems))
        return made

    def train(self, init: Init, fraction: float, seed: int, steps: int) -> Path:
        """Fine-tune, unless it is done, and return the run folder."""
        run = self.work / f"{init.name}-{fraction:g}pct-seed{seed}-{steps}"
        weights = self.weights(init, fraction, seed)
        flags = [] if weights is None else ["--init", str(weights)]
        names = self.names(fraction, seed)
        keys = [
            f"data.train={self.data}",
            *([] if names is None else [f"data.train_list={names}"]),
            f"image_size={self.options.image_size}",
            f"batch_size={self.options.batch_size}",
            f"budget.steps={steps}",
            f"seed={seed}",
            "eval.test=false",
            *init.finetune,
        ]
        command = ["-m", "finetune.run", "--out", str(run), *flags, *keys]
        same_as_before(run, command, weights)
        if not (run / "results.json").is_file():
            go_on("finetune.run", run, flags, keys)
        return run

    def outcome(self, init: Init, fraction: float, seed: int, steps: int) -> Outcome:
        """Fine-tune, unless it is done; return what is scored, which is the best on val."""
        run = self.train(init, fraction, seed, steps)
        found = (self._averaged(init, run, fraction, seed, share) for share in init.averages)
        return max(found, key=lambda one: one.ap)

    def _averaged(self, init: Init, run: Path, fraction: float, seed: int, share: float) -> Outcome:
        """Take the mean of a run's detector and what it began with, unless it is there."""
        file = run / "detector.safetensors"
        if share == 0:
            return Outcome(file, val_ap(run), share)
        start = self.weights(init, fraction, seed)
        assert start is not None  # inits_of has seen to it
        mean = start if share == 1 else run / f"average-{share:g}.safetensors"
        told = run / f"average-{share:g}.json"
        if not told.is_file():
            if share != 1:
                write_average(mean, [file, start], [1 - share, share])
            write_file(told, json.dumps({"ap": self.score(mean, "val").ap}))
        return Outcome(mean, float(json.loads(told.read_text())["ap"]), share)

    def scores(self, teacher: Path, init: Init, keys: Sequence[str]) -> list[str]:
        """Return the key of the scores that are best on val, where none is given (few_labels)."""
        task = taught_from_val(str(init.recipe), [*keys, f"task.weights={teacher}"])
        if task is None:
            return []
        size = task.teacher_size or detector_from_file(teacher)[1].image_size
        told = teacher.with_name(f"{teacher.stem}-scores-{size}-{task.looks}-{task.iou:g}.json")
        if not told.is_file():
            found = self.score(teacher, "val", image_size=size, looks=task.looks, iou=task.iou)
            write_file(told, json.dumps(found.to_json()["per_class"]))
        return score_keys(json.loads(told.read_text()), task.unsure)

    def score(self, file: Path, split: str, **otherwise: Any) -> Results:
        """Score a detector's file on a split, as fine-tuning does but for what is said."""
        detector, about = detector_from_file(file)
        labeled = open_labeled(
            str(self.data), split, cache=self.work, cache_bytes=10**9, reading=about.reading()
        )
        scored = evaluate(
            detector.to(memory_format=torch.channels_last), labeled, workers=1,
            **{"image_size": self.options.image_size, **otherwise},
        )  # fmt: skip
        labeled.close()
        assert scored is not None
        return scored

    def minutes(self, init: Init, fraction: float, seed: int) -> float:
        """Return the minutes before an init's fine-tuning, those of its teacher included."""
        if init.start is not None:
            return init.minutes + self.minutes(init.start, fraction, seed)
        if init.teacher is None:
            return init.minutes
        taught = self.train(init.teacher, fraction, seed, max(init.teacher.steps))
        return init.minutes + self.minutes(init.teacher, fraction, seed) + curve(taught)[-1][1]

    def cell(
        self, init: Init, fraction: float, seed: int, lengths: Sequence[int]
    ) -> dict[str, Any]:
        """Train at these lengths, score the best on test, and return its row of the results."""
        outcomes = {steps: self.outcome(init, fraction, seed, steps) for steps in lengths}
        found = {steps: one.ap for steps, one in outcomes.items()}
        best = max(found, key=lambda steps: (found[steps], -steps))
        where = {"dataset": self.data.name, "init": init.name, "fraction": fraction, "seed": seed}
        command = noted(run := self.train(init, fraction, seed, best))  # it is there
        several = {"averages": list(init.averages)} if len(init.averages) > 1 else {}
        shares = {"average": outcomes[best].average, **several}
        settings = settings_of({"command": command, **shares})
        by_steps = {str(steps): ap for steps, ap in found.items()}
        for one in self.results:
            if not where.items() <= one.items():
                continue
            if settings_of(one) != settings:
                continue  # of a plan with other keys
            by_steps = one["val_ap_by_steps"] | by_steps
            if (one["val_ap"], -one["steps"]) >= (found[best], -best):
                one["val_ap_by_steps"] = by_steps
                return one
        scored = self.score(file := outcomes[best].file, "test")
        # Other seeds' rows of another length, or of other settings, are not comparable.
        mine = {key: where[key] for key in ("dataset", "init", "fraction")}
        self.results[:] = [
            one
            for one in self.results
            if not where.items() <= one.items()
            and not (
                mine.items() <= one.items() and (one["steps"], settings_of(one)) != (best, settings)
            )
        ]
        pretrained = self.pretraining(init, fraction, seed)
        row = {
            **where,
            "steps": best,
            **shares,
            "ap": scored.ap,
            "ap50": scored.ap50,
            "val_ap": found[best],
            "val_ap_by_steps": by_steps,
            "val_curve": curve(run),
            "pretrain_minutes": self.minutes(init, fraction, seed),
            "pretrain_command": None if init.recipe is None else noted(pretrained),
            "command": command,
            "weights_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        self.results.append(row)
        return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write results, table and curves. Raises GroundworkError.

    An init whose run fails is left out, and told of at the end.
    """
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.unlabeled is not None and len(options.data) > 1:
        raise UsageError("--unlabeled is of one set: call the study once for each of --data.")
    failed = []
    for data in options.data:
        study = Study(options, data)
        for fraction in options.fractions:
            for init in inits_of(options, data):
                try:
                    _row(study, init, fraction)
                except DataError as error:
                    logger.error("%s %s %g %%: %s", data.name, init.name, fraction, error)
                    failed.append(f"{data.name} {init.name} {fraction:g} %")
    if failed:
        raise DataError(f"Not all runs ended well: {', '.join(failed)}.")
    return 0


def _row(study: Study, init: Init, fraction: float) -> None:
    """Run all seeds of an init at one fraction; the first chooses the length."""
    options, name = study.options, study.data.name
    lengths: Sequence[int] = init.steps
    for seed in range(options.seeds):
        if options.no_test:
            found = {n: study.outcome(init, fraction, seed, n).ap for n in lengths}
            shown = ", ".join(f"{steps} steps {ap:.4f}" for steps, ap in found.items())
            logger.info("%s %s %g %% seed %d, val AP: %s", name, init.name, fraction, seed, shown)
            continue
        study.results = read(options.results)
        row = study.cell(init, fraction, seed, lengths)
        lengths = [row["steps"]]
        mine = {"dataset": name, "init": init.name, "fraction": fraction}
        update(options.results, [one for one in study.results if mine.items() <= one.items()])
        logger.info(
            "%s %s %g %% seed %d: %d steps, test AP %.4f.", name, init.name, fraction, seed,
            row["steps"], row["ap"],
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_efficiency")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="roots with splits")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/study"), help="folder of runs (%(default)s)"
    )
    parser.add_argument("--inits", nargs="+", required=True)
    parser.add_argument("--fractions", type=float, nargs="+", default=[5.0], help="percent")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--pretrain-minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, nargs="+", default=[2000])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lists", type=Path, help="folder of lists of labeled pictures")
    parser.add_argument("--unlabeled", type=Path, help="default: images/train of the root")
    parser.add_argument("--plan", type=Path, help="YAML: what the inits are")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--finetune", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--no-test", action="store_true", help="val alone; nothing is written")
    return parser


if __name__ == "__main__":
    sys.exit(told(main))
