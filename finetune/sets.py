"""The labeled pictures of a run: which they are, and what is wrong with their labels."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.augment.boxes import Rule
from finetune.labels import Survey, survey
from finetune.recipe import Recipe
from groundwork.data.label_policy import Defect
from groundwork.data.label_table import HeldOut
from groundwork.data.labels import LabeledSamples, has_split, open_labeled, training_split
from groundwork.errors import DataError, UnavailableError, UsageError
from groundwork.files import write_file

logger = logging.getLogger(__name__)

# Labels of so many pictures are looked at before training: some seconds.
SURVEYED = 10_000
_MIN_SIDE = Rule().min_side


@dataclass(frozen=True)
class Sets:
    """The labeled pictures of a run; `val` and `test` where there are any."""

    train: LabeledSamples
    val: LabeledSamples | None
    test: LabeledSamples | None

    def close(self) -> None:
        """Close every open file."""
        for one in (self.train, self.val, self.test):
            if one is not None:
                one.close()


def open_sets(recipe: Recipe) -> Sets:
    """Open training, validation and test pictures, by the rules of recipe.data.

    Raises DataError where a set is missing or knows other classes, UsageError for a bad key.
    """
    data = recipe.data
    cache, cache_bytes = data.cache_folder(), data.cache_bytes()
    names_in = None if data.train_list is None else Path(data.train_list)
    split = training_split(data.train, "fine-tuning (data.train)")
    where: dict[str, Any] = {
        "cache": cache, "cache_bytes": cache_bytes, "reading": data.reading(),
    }  # fmt: skip
    own = data.val is None and has_split(data.train, "val")
    if data.holdout and (own or data.val is not None):
        raise UsageError(
            f"data.holdout={data.holdout:g}: there are pictures for validation, "
            f"{'a split of ' + data.train if own else data.val}. Leave one of them out."
        )

    def part(kept: bool) -> LabeledSamples:
        held_out = HeldOut(data.holdout, kept) if data.holdout else None
        return open_labeled(data.train, split, names_in=names_in, held_out=held_out, **where)

    train = part(kept=False)

    def other(given: str | None, split: str) -> LabeledSamples | None:
        if given is None and not has_split(data.train, split):
            return None
        source = given or data.train
        try:
            found = open_labeled(source, split, **where)
        except UnavailableError:
            raise
        except DataError as error:
            way_out = " eval.test=false goes without the test set." if split == "test" else ""
            raise DataError(f"{error}{way_out}") from error
        if found.names != train.names:
            raise DataError(
                f"The classes of {source} ({', '.join(found.names)}) are not those of {data.train} "
                f"({', '.join(train.names)}): give both the same names in the same order, by a "
                "classes.txt or labelmap.txt in each root where labels do not name them."
            )
        if found.reading.channels != train.reading.channels:
            raise UsageError(
                f"{source} has {found.reading.channels} channels and {data.train} "
                f"{train.reading.channels}, by data.bands: name other pictures."
            )
        return found

    val = part(kept=True) if data.holdout else other(data.val, "val")
    return Sets(train, val, other(data.test, "test") if recipe.eval.test else None)


def check_objects(labeled: LabeledSamples) -> None:
    """Raise DataError where there is nothing to learn; not where that is long to look at."""
    if labeled.local and len(labeled) <= SURVEYED:
        _check_objects(labeled, survey(labeled))


def _check_objects(labeled: LabeledSamples, found: Survey) -> None:
    if not found.objects and found.crowds:
        raise DataError(f"{labeled.name} has nothing to learn: {found.suspicion()}.")
    if not found.boxes and not len(labeled.defects):
        raise DataError(
            f"None of the {found.pictures} pictures of {labeled.name} has a box, so there is "
            "nothing to learn. See `python -m finetune.labels`."
        )
    if not found.boxes and len(labeled.defects):
        reason, count = labeled.defects.counts().most_common(1)[0]
        raise DataError(
            f"No box of {labeled.name} is left to train on: {count} x {reason}. See "
            f"`python -m finetune.labels`, and whether coordinates are what the form "
            "wants: YOLO's are shares of the picture's sides, COCO's and VOC's pixels."
        )


def _tell_of_training(
    labeled: LabeledSamples, found: Survey, image_size: int, min_side: float
) -> None:
    _check_objects(labeled, found)
    if lost := found.below(min_side, image_size):
        logger.warning(
            "%d of %d boxes for training have a side below %g px at image_size=%d and are left "
            "out: a larger image_size shows them, or tiles (python -m pretrain.pack --tiles).",
            lost, found.boxes.total(), min_side, image_size,
        )  # fmt: skip


def _tell_of_scoring(name: str, found: Survey) -> list[str]:
    """Warn of what cannot say anything; return what must not be so."""
    others, way_out = "data.val, or raise data.holdout", ""
    if name == "test":
        others = "data.test, or go without (eval.test=false)"
        way_out = " (eval.test=false goes without the test set)"
    if not found.objects:
        logger.warning(
            "No picture for %s has a box, so AP will say nothing: name others by %s.", name, others
        )
    if not found.unreadable:
        return []
    return [
        f"{len(found.unreadable)} picture(s) for {name} cannot be read, the first "
        f"{found.unreadable[0].removesuffix('.')}. Mend or remove them{way_out}."
    ]


def tell_defects(sets: Sets, folder: Path, image_size: int, min_side: float = _MIN_SIDE) -> None:
    """Say what is wrong with the labels, by reason; label-defects.jsonl lists it.

    Some defects show when a picture is opened. Pictures on this machine are looked at before
    training, their headers alone, where they are not too many; the others are left to
    finetune.labels. Boxes with a side below `min_side` pixels at `image_size` are not learned.
    Raises DataError where no box for training is left, and where a picture for validation or test
    cannot be read: what is scored is scored whole.
    """
    lines: list[str] = []
    refused: list[str] = []
    notes: set[str] = set()
    told: set[Defect] = set()  # a held-out part is of the files that training is of
    for name, labeled in (("training", sets.train), ("validation", sets.val), ("test", sets.test)):
        if labeled is None:
            continue
        for note in labeled.notes:
            if note not in notes:
                logger.warning("Labels of %s: %s.", labeled.name, note)
        notes.update(labeled.notes)
        if labeled.local and len(labeled) <= SURVEYED:
            found = survey(labeled)
            if name == "training":
                _tell_of_training(labeled, found, image_size, min_side)
            else:
                refused += _tell_of_scoring(name, found)
            if name != "test" and (suspicion := found.suspicion()):
                logger.warning("Labels for %s: %s.", name, suspicion)
        else:
            logger.info(
                "%s: %s to look at all labels first: python -m finetune.labels does.",
                labeled.name, "too many pictures" if labeled.local else "too far away",
            )  # fmt: skip
        new = [defect for defect in labeled.defects if defect not in told]
        told.update(new)
        for reason, count in Counter(defect.reason for defect in new).most_common():
            logger.warning("Labels for %s: %d x %s.", name, count, reason)
        lines += [json.dumps({"set": name, **dataclasses.asdict(defect)}) for defect in new]
    if lines:
        file = folder / "label-defects.jsonl"
        write_file(file, "".join(f"{line}\n" for line in lines))
        logger.warning("Each of them is listed in %s.", file)
    if refused:
        raise DataError(" ".join(refused))
