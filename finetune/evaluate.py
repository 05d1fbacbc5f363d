"""How good a detector is on labeled pictures: `python -m finetune.evaluate WEIGHTS data.val=ROOT`.

Every picture counts once, and the figures are those of one process exactly, however many share the
work (finetune/detect.py). They are COCO's (finetune/metrics.py), of boxes in the pictures' own
pixels; small, medium and large go by the area of the box.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed
from pydantic import Field

from finetune.detect import Seen, detect_all
from finetune.detector import DEFAULT_LIMITS, Detector, Limits
from finetune.metrics import Results, score, to_coco, to_rows
from groundwork.command import exit_code_of, log_to_standard_output
from groundwork.config import Section, parse_overrides, validate
from groundwork.data.label_table import HeldOut
from groundwork.data.labels import LabeledSamples, open_labeled
from groundwork.data.reading import MAX_PIXELS, Reading
from groundwork.errors import DataError, UsageError
from groundwork.files import write_file
from groundwork.settings import Count, Data, Fraction, Side

__all__ = ["Seen", "class_numbers", "detect_all", "evaluate", "main", "measure", "table"]

logger = logging.getLogger("finetune.evaluate")

_WRITTEN = (
    "results.json", "detections.json", "labels.json", "precision-recall.png", "confusion.png",
)  # fmt: skip


def evaluate(
    detector: Detector,
    labeled: LabeledSamples,
    *,
    image_size: int,
    batch_size: int = 16,
    workers: int = 1,
    limits: Limits = DEFAULT_LIMITS,
    looks: int = 1,
    group: torch.distributed.ProcessGroup | None = None,
) -> Results | None:
    """Score a detector on all of `labeled`; None on every process but the first.

    `image_size` is the longer side of what the detector sees, in pixels; `workers` how many threads
    decode; `looks` how often a picture is looked at (finetune/looks.py). `group` is a gloo group of
    all ranks where there are several. The detector is copied and stays as it is.

    Raises DataError naming a picture that cannot be read, on every process.
    """
    found = detect_all(
        detector, labeled, image_size=image_size, batch_size=batch_size, workers=workers,
        limits=limits, looks=looks, group=group,
    )  # fmt: skip
    return None if found is None else measure(found, labeled.names)


def measure(seen: Seen, names: Sequence[str]) -> Results:
    """Score what detect_all gave."""
    return score(seen.found, seen.truth, names)


# ---- the command -------------------------------------------------------------------------------


class Sets(Section):
    """Which pictures: one of `val` (a root's validation split) and `test` (its test split)."""

    val: str | None = None
    test: str | None = None
    split: Literal["train", "val", "test"] | None = None  # another split of that root
    # Of pictures that are not split (or of split=train): the share that training with the same
    # data.holdout held out, and train_list, if it had one.
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    train_list: str | None = None
    workers: int | None = Field(default=None, ge=0)  # threads that decode; null: as many as cores
    cache: str | None = None  # for drawn scenes, remote shards, foreign indexes
    cache_gb: Annotated[float, Field(gt=0)] = 50.0  # bound of the local copy of remote shards
    max_pixels: Count = MAX_PIXELS  # a larger picture is refused before it is decoded
    # How pictures are read (docs/data.md); not said: as in training, null: as their format says.
    bands: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    value_range: tuple[float, float] | None = None


class Keys(Section):
    """What `python -m finetune.evaluate` can be told as key=value."""

    data: Sets = Sets()
    image_size: Side | None = None  # null: that of training
    batch_size: Count = 16
    score: Fraction = 0.001
    iou: Fraction = 0.7
    most: Count = 300
    looks: Literal[1, 2, 4, 8] = 1  # mirrored, upside down, turned, too: finetune/looks.py


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    log_to_standard_output(("groundwork", "finetune"))
    parser = argparse.ArgumentParser(prog="python -m finetune.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("weights", type=Path, help="a detector.safetensors")
    parser.add_argument("--out", type=Path, help="a folder (default: evaluation-<split> beside it)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.val=ROOT ...")
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        keys = validate(Keys, parse_overrides(options.overrides))
        _evaluate_file(options.weights, options.out, keys)

    return exit_code_of(work)


def _evaluate_file(weights: Path, out: Path | None, keys: Keys) -> None:
    from finetune.plots import save_confusion, save_curves  # matplotlib takes a second
    from finetune.weights import check_channels, detector_from_file

    if (keys.data.val is None) == (keys.data.test is None):
        raise UsageError("Say which pictures: one of data.val=ROOT and data.test=ROOT.")
    split = keys.data.split or ("val" if keys.data.val is not None else "test")
    folder = out or weights.parent / f"evaluation-{split}"
    detector, about = detector_from_file(weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}.") from error
    detector = detector.to("cuda" if torch.cuda.is_available() else "cpu")
    source = str(keys.data.val or keys.data.test)
    labeled = _open(source, split, keys.data, _reading(keys.data, about.reading()))
    check_channels(detector, labeled.reading)
    if _trained_on_this_set(about.metadata, keys.data, source, labeled.splits, split):
        logger.warning(
            "The detector was trained on pictures of this set: as far as these are among them, the "
            "figures do not say what it is worth on others."
        )
    cores, size = len(os.sched_getaffinity(0)), keys.image_size or about.image_size
    try:
        seen = detect_all(
            detector, labeled, image_size=size,
            batch_size=keys.batch_size, limits=Limits(keys.score, keys.iou, keys.most),
            looks=keys.looks,
            workers=cores if keys.data.workers is None else keys.data.workers,
            numbers=class_numbers(source, labeled.names, about.names),
        )  # fmt: skip
    finally:
        labeled.close()
    assert seen is not None
    results = measure(seen, about.names)
    for note in labeled.notes:
        logger.warning("Labels: %s.", note)
    for reason, count in labeled.defects.counts().most_common():
        logger.warning("Labels: %d x %s.", count, reason)
    how = {"image_size": size, **keys.model_dump(include={"score", "iou", "most", "looks"})}
    document = {"weights": str(weights), "data": source, "split": split, **how}
    document |= results.to_json()
    write_file(folder / "results.json", json.dumps(document, indent=1) + "\n")
    write_file(folder / "detections.json", json.dumps(to_rows(seen.found)) + "\n")
    truth = to_coco(seen.truth, about.names, seen.keys)
    write_file(folder / "labels.json", json.dumps(truth) + "\n")
    save_curves(results, about.names, folder / "precision-recall.png")
    save_confusion(results, about.names, folder / "confusion.png")
    logger.info("%s", table(results))
    logger.info("In %s: %s", folder, ", ".join(_WRITTEN))


def _trained_on_this_set(
    metadata: Mapping[str, Any], sets: Sets, source: str, splits: Sequence[str], split: str
) -> bool:
    """Tell whether a detector was trained on pictures of the set that is about to be scored."""
    data = (metadata.get("recipe") or {}).get("data", {})
    trained = data.get("train") or []
    held_out = sets.holdout > 0 and sets.holdout == data.get("holdout")
    if held_out or (splits and split != "train"):
        return False
    sources = [trained] if isinstance(trained, str) else trained
    return any(Path(one).resolve() == Path(source).resolve() for one in sources)


def _open(source: str, split: str, sets: Sets, reading: Reading) -> LabeledSamples:
    data = Data(cache=sets.cache, cache_gb=sets.cache_gb)
    held_out = HeldOut(sets.holdout, kept=True) if sets.holdout else None
    return open_labeled(
        source, split, cache=data.cache_folder(), cache_bytes=data.cache_bytes(),
        names_in=None if sets.train_list is None else Path(sets.train_list), held_out=held_out,
        reading=reading,
    )  # fmt: skip


def _reading(sets: Sets, trained: Reading) -> Reading:
    """Return how pictures are read: as in training, but for what is said."""
    said = sets.model_fields_set
    return Reading(
        sets.max_pixels,
        sets.bands if "bands" in said else trained.bands,
        sets.value_range if "value_range" in said else trained.value_range,
    )


def class_numbers(source: str, labels: Sequence[str], detector: Sequence[str]) -> list[int] | None:
    """Return the detector's number of each class of the labels; None: they are numbered alike.

    Raises DataError where the two do not know the same classes.
    """
    if tuple(labels) == tuple(detector):
        return None
    if sorted(labels) != sorted(detector):
        one, other = (
            ", ".join(name for name in names if name not in others) or "none"
            for names, others in ((labels, detector), (detector, labels))
        )
        raise DataError(
            f"The classes of {source} are not the detector's: only the labels have {one}; only the "
            f"detector has {other}. Give both the same names, by a classes.txt or labelmap.txt in "
            "the root where labels do not name all classes."
        )
    return [list(detector).index(name) for name in labels]


def table(results: Results) -> str:
    """Lay results out for a person."""

    def shown(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.4f}"

    lines = [f"{results.pictures} pictures, {results.boxes} boxes"]
    lines += [f"  {name:10} {shown(value)}" for name, value in results.figures.items()]
    lines.append(f"  {'class':24} {'AP':>6} {'AP50':>6} {'boxes':>7} {'F1':>6} at score")
    for name, values in results.per_class.items():
        lines.append(
            f"  {name[:24]:24} {shown(values['ap'])} {shown(values['ap50'])} "
            f"{int(values['boxes'] or 0):7} {shown(values['f1'])} {shown(values['f1_score'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
