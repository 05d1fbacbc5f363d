"""From many pictures and few labels to a detector, in one command: all stages, one after the other.

    python -m pretrain.few_labels PICTURES ROOT --recipe aerial --out runs/planes

PICTURES are without labels (shards, a folder: data.train of pretraining), ROOT is a labeled set
(data.train of fine-tuning). In --out are the run folders of

    1-pretrain    the recipe of recipes/pretrain, which learns without labels, from --init if given
    2-finetune    the recipe of recipes/finetune, on the labels
    3-teach       the recipe NAME_taught: self-training with what that detector finds in PICTURES
    4-finetune    the recipe NAME_taught of recipes/finetune, on the labels once more

and with --rounds 2 a 5-teach and a 6-finetune, taught by the detector of the round before. After
each round the student as it was before its fine-tuning, and the mean of the weights before and
after (finetune/average.py), are scored on val, too. Where the teacher looks at whole pictures
(task.find=picture), it is scored on val as it will look, and each class is taught from the score on
that is best there (--teach task.score=... says another). detector.safetensors is what has the best
AP on val; where no pictures are held out for that, the last mean. few_labels.json tells all
figures. A test split is not looked at. While 1-pretrain runs, a detection probe on the labels shows
what a detector may gain, and chooses nothing: the last weights are kept. --pretrain with keys of
probe.detection, probe.select or probe.patience says another (probe.detection.data=null: none).

Called again, it goes on where it was stopped, with the same keys, pictures and labels; a stage is
run anew where its folder is removed, and those after it want theirs removed too. Keys that change
nothing of what is learned may be others (data.workers, data.cache, data.max_bad_fraction,
data.on_error, threads, log, checkpoint, report). Keys of every stage are given by
--keys, those of one kind of stage by --pretrain, --teach and --finetune. Recipes are for 256 px:
with another image_size in --finetune, --teach wants its own (docs/tasks.md). NAME is that of four
recipes: NAME and NAME_taught in recipes/pretrain and recipes/finetune.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import recipe as finetune_recipes
from finetune.average import write as write_average
from finetune.sets import check_objects, open_sets
from groundwork.command import (
    exit_code_of,
    has_checkpoint,
    log_to_standard_output,
    status_of,
)
from groundwork.config import read_yaml
from groundwork.data.samples import open_samples
from groundwork.data.shard_index import sha256_text
from groundwork.errors import DataError, UsageError
from groundwork.files import copy_file, write_file
from groundwork.stages import check, go_on, run_command, same_as_before
from pretrain import recipe as pretrain_recipes
from pretrain.stage_keys import evaluation_keys, probe_keys, score_keys, taught_from_val

logger = logging.getLogger("pretrain.few_labels")

NEXT = """\
What next:
  score it on other pictures   python -m finetune.evaluate {file} data.test=ROOT
  use it                       python -m finetune.predict {file} PICTURES --out found"""

_DATA = "data.json"  # of --out: hashes of what its stages are made with
_STAGE = re.compile(r"\d+-(pretrain|finetune|teach)")
_KEYS = ("keys", "pretrain", "teach", "finetune")  # the last fields of Chain


@dataclass(frozen=True)
class Chain:
    """What is asked for."""

    pictures: str
    root: str
    recipe: str
    out: Path
    rounds: int = 1
    launch: str | None = None
    init: str | None = None  # what the first stage starts from
    keys: tuple[str, ...] = ()  # of every stage
    pretrain: tuple[str, ...] = ()
    teach: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()

    def check(self) -> dict[str, str]:
        """Return hashes of the pictures and of the labels.

        Raises UsageError or DataError for what a stage would not take, before the first runs.
        """
        if self.rounds < 0:
            raise UsageError(f"--rounds {self.rounds}: a round teaches once; 0 is none.")
        if self.init is not None and not Path(self.init).is_file():
            raise UsageError(f"--init {self.init}: there is no such file.")
        check("finetune.run", ["--recipe", self.recipe], self._finetune_keys())
        shown = [*self._probe_keys(), *self._pretrain_keys()]
        check("pretrain.run", self._pretrain_flags, shown)
        if self.rounds:
            taught = ["--recipe", self._taught]
            check("pretrain.run", taught, self._teach_keys("detector.safetensors"))
            check("finetune.run", taught, self._finetune_keys())
        labels = finetune_recipes.resolve(self.recipe, self._finetune_keys())
        self._check_mappings(labels)
        return self._same_data(labels)

    def _check_mappings(self, labels: finetune_recipes.Recipe) -> None:
        """Raise UsageError where a detector of the labeled pictures cannot teach on the others."""
        labeled = labels.data.reading().mapping
        text = "{} are read with data.bands and data.value_range {}, the labeled ones with {}"
        taught = labeled
        if self.rounds:
            taught = self._taught_recipe().data.reading().mapping
        if taught != labeled:
            raise UsageError(
                f"{text.format('The pictures of --teach', taught, labeled)}: a detector of the "
                "ones cannot teach on the others. Give both the same by --keys. Shards that were "
                "packed with --tiles or --resize hold values that are mapped already: pack the "
                "labeled pictures in that way, too. --rounds 0 goes without self-training."
            )
        pictures = self._pretrain_recipe().data.reading().mapping
        if pictures != labeled:
            logger.warning(
                "%s: no detection probe shows what pretraining gains.",
                text.format("The pictures", pictures, labeled),
            )

    def _same_data(self, labels: finetune_recipes.Recipe) -> dict[str, str]:
        """Return hashes of the pictures, of those of --teach if they are others, and of the labels.

        The pictures may be gone when every stage that sees them is done. Raises UsageError where
        there are stages that were made with others.
        """
        note = self.out / _DATA
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        teaching = [f"{2 * n + 1}-teach" for n in range(1, self.rounds + 1)]
        data = {"labels": hash_of_labels(labels)}
        own = self._pretrain_recipe()
        seen = {"pictures": (own, ["1-pretrain", *teaching])}
        if self.rounds and (taught := self._taught_recipe()).data.train != own.data.train:
            seen = {"pictures": (own, ["1-pretrain"]), "pictures of --teach": (taught, teaching)}
        for what, (recipe, stages) in seen.items():
            if not (before and all(_is_done(self.out / name) for name in stages)):
                data[what] = hash_of_pictures(recipe)
            elif what in before:
                data[what] = before[what]
        there = [path for path in sorted(self.out.glob("*")) if _STAGE.fullmatch(path.name)]
        there = [path for path in there if _is_done(path) or has_checkpoint(path)]
        firsts = {"pictures": 1, "labels": 2, "pictures of --teach": 3}
        for what in data:
            first = firsts[what]
            made = [path.name for path in there if int(path.name.partition("-")[0]) >= first]
            if made and before.get(what, data[what]) != data[what]:
                raise UsageError(
                    f"The {what} are not those that {', '.join(made)} of {self.out} were made "
                    "with: remove these folders, to have them made anew, or name another --out "
                    "(--init takes weights of the old ones)."
                )
        return data

    def run(self, data: Mapping[str, str]) -> dict[str, Any]:
        """Run what is not done yet. Returns, and writes, what each detector reaches on val.

        `data` is what `check` returns.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        write_file(self.out / _DATA, json.dumps(data, indent=1) + "\n")
        start = self._stage(
            "1-pretrain", "pretrain.run", self._pretrain_flags, self._pretrain_keys(),
            None if self.init is None else Path(self.init), self._probe_keys(),
        )  # fmt: skip
        detector, told = self._trained("2-finetune", self.recipe, start)
        if self.rounds and told[0]["ap"] == 0:
            logger.warning("%s finds nothing on val: there is nothing that it can teach.", detector)
        for number in range(1, self.rounds + 1):
            # The teacher is the best so far, which is where the student begins.
            keys = [*self._teach_keys(str(detector)), *self._scores(detector)]
            start = self._stage(
                f"{2 * number + 1}-teach", "pretrain.run",
                ["--recipe", self._taught, "--init", str(detector)], keys, detector,
            )  # fmt: skip
            after, more = self._trained(f"{2 * number + 2}-finetune", self._taught, start)
            told += more
            if (mean := _mean(after, start)) is not None:
                # Very few labels may make the student worse, and the mean with it.
                for name, file in (("start", start), ("mean", mean)):
                    ap = _scored(file, after.parent, name)
                    told.append({"detector": str(file), "ap": ap})
            detector = _best(told)
        kept = self.out / "detector.safetensors"
        copy_file(detector, kept)
        document = {"kept": str(detector), "detectors": told}
        write_file(self.out / "few_labels.json", json.dumps(document, indent=1) + "\n")
        return document

    def _trained(self, name: str, recipe: str, start: Path) -> tuple[Path, list[dict[str, Any]]]:
        """Fine-tune; return the detector's file and, in a list, its AP on val."""
        flags = ["--recipe", recipe, "--init", str(start)]
        file = self._stage(name, "finetune.run", flags, self._finetune_keys(), start)
        found = file.parent / "results.json"  # not there where nothing is held out
        results = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
        of_val = results if results.get("split") == "val" else results.get("val", {})
        return file, [{"detector": str(file), "ap": of_val.get("ap")}]

    def _stage(
        self,
        name: str,
        module: str,
        flags: list[str],
        keys: list[str],
        start: Path | None = None,
        shows: Sequence[str] = (),
    ) -> Path:
        """Run a stage, unless it is done, and return the file that it ends with.

        `shows` are keys of what is shown: a later call that has others takes the stage as it is.
        """
        run = self.out / name
        command = ["-m", module, "--out", str(run), *flags, *keys]
        # A stage that is run anew ends in another file: what began with the old one is no more.
        same_as_before(run, command, start)
        product = "pretrained" if module == "pretrain.run" else "detector"
        file = run / f"{product}.safetensors"
        if not _is_done(run):
            logger.info("%s of %s", name, self.out)
            go_on(module, run, flags, [*shows, *keys], launch=self.launch)
        return file

    def _scores(self, teacher: Path) -> list[str]:
        """Return the key that says from which score on what a teacher finds is taught.

        Of each class that with the best F1 on val, of pictures looked at as the teacher will look.
        Empty where it looks at views, where nothing is held out, and where the score is given.
        """
        task = taught_from_val(self._taught, self._teach_keys(str(teacher)))
        own = evaluation_keys(read_yaml(self.out / "2-finetune" / "recipe.yaml"))
        if task is None or own is None:
            return []
        # Without a size it is the file's own.
        looks = {"looks": task.looks, "iou": task.iou, "image_size": task.teacher_size}
        keys = [key for key in own if key.partition("=")[0] not in looks]
        keys += [f"{key}={value}" for key, value in looks.items() if value is not None]
        results = _evaluated(teacher, teacher.parent / f"scores-{teacher.stem}", keys)
        return score_keys(results["per_class"], task.unsure)

    @property
    def _taught(self) -> str:
        """The recipe of a round, of either stage."""
        return f"{self.recipe}_taught"

    @property
    def _pretrain_flags(self) -> list[str]:
        return ["--recipe", self.recipe, *([] if self.init is None else ["--init", self.init])]

    def _pretrain_keys(self) -> list[str]:
        return [f"data.train={self.pictures}", *self.keys, *self.pretrain]

    def _pretrain_recipe(self) -> pretrain_recipes.Recipe:
        """Return the first stage's recipe but for its probe."""
        keys = [key for key in self._pretrain_keys() if not key.startswith("probe.")]
        return pretrain_recipes.resolve(None, self.recipe, keys)

    def _taught_recipe(self) -> pretrain_recipes.Recipe:
        """Return a round's recipe."""
        keys = self._teach_keys("detector.safetensors")
        return pretrain_recipes.resolve(None, self._taught, keys)

    def _probe_keys(self) -> list[str]:
        labels = finetune_recipes.resolve(self.recipe, self._finetune_keys())
        return probe_keys(self._pretrain_recipe(), labels, [*self.keys, *self.pretrain])

    def _teach_keys(self, teacher: str) -> list[str]:
        return [f"data.train={self.pictures}", f"task.weights={teacher}", *self.keys, *self.teach]

    def _finetune_keys(self) -> list[str]:
        # Test pictures choose nothing: they are for the person, at the end.
        return [f"data.train={self.root}", "eval.test=false", *self.keys, *self.finetune]


def hash_of_labels(recipe: finetune_recipes.Recipe) -> str:
    """Return a hash of the labels for training and validation; say where none are held out.

    Raises DataError or UsageError where they cannot be opened, or hold nothing to learn.
    """
    sets = open_sets(recipe)
    check_objects(sets.train)
    if sets.val is None:
        logger.warning(
            "No labeled pictures are held out, so nothing says what is best, and the last is kept: "
            "--finetune data.holdout=0.2 holds out a fifth."
        )
    hashes = [sets.train.fingerprint, "" if sets.val is None else sets.val.fingerprint]
    sets.close()
    return sha256_text(hashes)


def hash_of_pictures(recipe: pretrain_recipes.Recipe) -> str:
    """Return a hash of the pictures without labels. Raises DataError where there are none."""
    data = recipe.data
    samples = open_samples(data.train, cache=data.cache_folder(), cache_bytes=data.cache_bytes())
    samples.close()
    return samples.fingerprint


def _is_done(run: Path) -> bool:
    return bool(status_of(run).get("state") == "done")


def _mean(after: Path, before: Path) -> Path | None:
    """Write the mean of two detectors beside the first; None where they have none."""
    mean = after.parent / "mean.safetensors"
    if not mean.is_file():
        try:
            write_average(mean, [after, before], [1.0, 1.0])
        except UsageError as error:
            logger.warning("The mean is left out: %s", error)
            return None
    return mean


def _scored(file: Path, run: Path, name: str) -> float | None:
    """Return a detector's AP on val as the fine-tuning of `run` scores; None where it does not."""
    keys = evaluation_keys(read_yaml(run / "recipe.yaml"))
    if keys is None:
        return None
    ap = _evaluated(file, run / f"evaluation-{name}", keys)["ap"]
    return None if ap is None else float(ap)


def _evaluated(file: Path, out: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Return what finetune.evaluate says of a detector; what is there is not done again."""
    results, asked = out / "results.json", out / "keys.txt"
    if not (results.is_file() and asked.is_file() and asked.read_text() == " ".join(keys)):
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "finetune.evaluate", str(file), "--out", str(out), *keys]
        if run_command(command):
            raise DataError(f"{file} could not be scored: see above.")
        write_file(asked, " ".join(keys))
    told: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return told


def _best(told: Sequence[dict[str, Any]]) -> Path:
    """Return the detector with the best AP; the last where nothing says which is better."""
    if any(one["ap"] is None for one in told):
        return Path(told[-1]["detector"])
    return Path(max(reversed(told), key=lambda one: one["ap"])["detector"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    log_to_standard_output(("groundwork", "pretrain", "finetune"))
    parser = argparse.ArgumentParser(prog="python -m pretrain.few_labels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("pictures", help="pictures without labels: shards, or a folder")
    parser.add_argument("root", help="a labeled data set")
    parser.add_argument("--recipe", required=True, metavar="NAME", help="aerial or medical")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--rounds", type=int, default=1, help="of self-training (%(default)s)")
    parser.add_argument("--init", metavar="FILE", help="weights that the first stage starts from")
    parser.add_argument("--launch", help='such as "accelerate launch --num_processes 8"')
    for name in _KEYS:
        of = "every stage" if name == "keys" else f"the stages that {name}"
        parser.add_argument(
            f"--{name}", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=of
        )
    options = parser.parse_args(arguments)
    chain = Chain(
        options.pictures,
        options.root,
        options.recipe,
        options.out,
        options.rounds,
        options.launch,
        options.init,
        *(tuple(vars(options)[name]) for name in _KEYS),
    )

    def work() -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "This command starts the stages itself: call it once, by python, with --launch "
                '"accelerate launch ..." for several processes.'
            )
        _tell(chain.run(chain.check()), chain.out / "detector.safetensors")

    return exit_code_of(work)


def _tell(document: dict[str, Any], kept: Path) -> None:
    logger.info("AP on val:")
    for one in document["detectors"]:
        ap = "     -" if one["ap"] is None else f"{one['ap']:.4f}"
        logger.info("  %s  %s", ap, one["detector"])
    logger.info("%s is %s.", kept, document["kept"])
    logger.info("%s", NEXT.format(file=kept))


if __name__ == "__main__":
    sys.exit(main())
