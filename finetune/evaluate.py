"""How good a detector is on labeled pictures: `python -m finetune.evaluate WEIGHTS data.val=ROOT`.

Pictures come once each, in the order of the files, letterboxed to the smallest rectangle of whole
strides that a batch of like-shaped pictures needs. Of several processes each takes every so
manieth picture; what they find is gathered and scored once, so that the figures are those of one
process exactly.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from pydantic import Field
from torch import Tensor, nn

from finetune.augment.letterbox import Geometry, letterbox_geometry
from finetune.augment.warp import GREY
from finetune.detector import Detector, suppress
from finetune.metrics import Found, Results, Truth, score, to_rows
from groundwork import colour
from groundwork.checkpoint import write_atomically
from groundwork.command import log_to_standard_output
from groundwork.config import Section, parse_overrides, validate
from groundwork.data.decode import open_picture
from groundwork.data.labels import LabeledSamples, has_split, open_labeled, splits_of
from groundwork.data.shards import Sample
from groundwork.errors import DataError, GroundworkError, UsageError
from groundwork.settings import Data

logger = logging.getLogger("finetune.evaluate")

_STRIDE = 32
# Batches that are decoded ahead, by threads: Pillow gives the interpreter's lock back meanwhile.
_AHEAD = 2


class _Shown(NamedTuple):
    """A picture as the detector is to see it, and what is true of it."""

    number: int
    pixels: npt.NDArray[np.uint8]
    geometry: Geometry
    truth: Truth


class Seen(NamedTuple):
    """What was found in every picture of this process, with the pictures' numbers."""

    numbers: list[int]
    found: list[Found]
    truth: list[Truth]


def evaluate(
    detector: Detector,
    labeled: LabeledSamples,
    *,
    image_size: int,
    batch_size: int = 16,
    workers: int = 1,
    score: float = 0.001,
    iou: float = 0.7,
    most: int = 300,
    rank: int = 0,
    world: int = 1,
    group: torch.distributed.ProcessGroup | None = None,
) -> Results | None:
    """Score a detector on all of `labeled`; None on every process but the first.

    `image_size` is the longer side of what the detector sees, in pixels; `workers` how many threads
    decode. `group` is a gloo group of all ranks where there are several. Modes are left as found.

    Raises DataError naming a picture that cannot be read.
    """
    found = detect_all(
        detector, labeled, image_size=image_size, batch_size=batch_size, workers=workers,
        score=score, iou=iou, most=most, rank=rank, world=world, group=group,
    )  # fmt: skip
    return None if found is None else measure(found, labeled.names)


def measure(seen: Seen, names: Sequence[str]) -> Results:
    """Score what detect_all gave."""
    return score(seen.found, seen.truth, names)


def detect_all(
    detector: Detector,
    labeled: LabeledSamples,
    *,
    image_size: int,
    batch_size: int = 16,
    workers: int = 1,
    score: float = 0.001,
    iou: float = 0.7,
    most: int = 300,
    rank: int = 0,
    world: int = 1,
    group: torch.distributed.ProcessGroup | None = None,
) -> Seen | None:
    """Find the boxes of every picture, in the pictures' own pixels; see `evaluate`."""
    if image_size % _STRIDE:
        raise UsageError(f"image_size={image_size} is not a multiple of {_STRIDE}.")
    mine = list(enumerate(_places(labeled)))[rank::world]
    seen = Seen([], [], [])
    with _evaluating(detector), torch.inference_mode():
        for batch in _batches(labeled, mine, image_size, batch_size, workers):
            image = _normalised(batch, detector)
            boxes, scores = detector.predict(image)
            for one, its_boxes, its_scores in zip(batch, boxes, scores, strict=True):
                kept = suppress(its_boxes, its_scores, score=score, iou=iou, most=most)
                upright = one.geometry.undo(kept.boxes.cpu().numpy())
                limits = np.array([one.truth.width, one.truth.height] * 2, np.float32)
                seen.numbers.append(one.number)
                seen.truth.append(one.truth)
                seen.found.append(
                    Found(
                        np.clip(upright, 0, limits).astype(np.float32),
                        kept.scores.cpu().numpy(),
                        kept.classes.cpu().numpy(),
                    )
                )
    return _gathered(seen, world, group)


def _batches(
    labeled: LabeledSamples,
    mine: Sequence[tuple[int, tuple[int, int]]],
    image_size: int,
    batch_size: int,
    workers: int,
) -> Iterator[list[_Shown]]:
    """Decode pictures by threads, a few batches ahead, in their order."""

    def show(number: int, sample: Sample) -> _Shown:
        try:
            picture = open_picture(sample.image, max_pixels=labeled.max_pixels)
            annotations = labeled.annotations(sample, picture)
            size = (image_size, image_size)
            geometry = letterbox_geometry(picture.width, picture.height, size)
            shown = geometry.shown(picture.width, picture.height)
            whole = (0.0, 0.0, float(picture.width), float(picture.height))
            [pixels] = picture.cut([whole], shown)
        except DataError as error:
            raise DataError(f"picture {sample.key} of {sample.source}: {error}") from error
        truth = Truth(annotations, picture.width, picture.height)
        return _Shown(number, pixels, geometry._replace(left=0, top=0), truth)

    pieces = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: list[list[Future[_Shown]]] = []
        for piece in [*pieces, *[[]] * _AHEAD]:
            # Samples are read by one thread: a shard's file is not shared.
            read = [(number, labeled.read(*place)) for number, place in piece]
            waiting.append([pool.submit(show, *one) for one in read])
            if len(waiting) > _AHEAD:
                batch = [future.result() for future in waiting.pop(0)]
                if batch:
                    yield batch


def _normalised(batch: Sequence[_Shown], detector: Detector) -> Tensor:
    """Lay pictures into the smallest frame that holds them all, at its upper left, grey around."""
    height = max(-(-one.pixels.shape[0] // _STRIDE) * _STRIDE for one in batch)
    width = max(-(-one.pixels.shape[1] // _STRIDE) * _STRIDE for one in batch)
    frame = np.full((len(batch), height, width, 3), GREY, np.uint8)
    for place, one in zip(frame, batch, strict=True):
        place[: one.pixels.shape[0], : one.pixels.shape[1]] = one.pixels
    device = next(detector.parameters()).device
    backbone = detector.backbone
    image = colour.normalise(torch.from_numpy(frame).to(device), backbone.mean, backbone.std)
    return image.contiguous(memory_format=torch.channels_last)


def _gathered(seen: Seen, world: int, group: torch.distributed.ProcessGroup | None) -> Seen | None:
    """Bring all processes' pictures to the first, in their order; None on the others."""
    if world > 1:
        parts: list[Seen | None] = [None] * world
        torch.distributed.all_gather_object(parts, seen, group=group)
        if torch.distributed.get_rank() != 0:
            return None
        seen = Seen([], [], [])
        for part in parts:
            assert part is not None
            seen.numbers.extend(part.numbers)
            seen.found.extend(part.found)
            seen.truth.extend(part.truth)
    order = np.argsort(seen.numbers, kind="stable").tolist()
    return Seen(
        [seen.numbers[place] for place in order],
        [seen.found[place] for place in order],
        [seen.truth[place] for place in order],
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training


# ---- the command -------------------------------------------------------------------------------


class Sets(Data):
    """Which pictures: one of `val` (a root's validation split) and `test` (its test split)."""

    train: str = "scenes"
    val: str | None = None
    test: str | None = None


class Keys(Section):
    """What `python -m finetune.evaluate` can be told as key=value."""

    data: Sets = Sets()
    image_size: int | None = Field(default=None, ge=32, multiple_of=32)  # null: that of training
    batch_size: int = Field(default=16, ge=1)
    score: float = Field(default=0.001, ge=0, le=1)
    iou: float = Field(default=0.7, ge=0, le=1)
    most: int = Field(default=300, ge=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    log_to_standard_output(("groundwork", "finetune"))
    parser = argparse.ArgumentParser(prog="python -m finetune.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("weights", type=Path, help="a detector.safetensors")
    parser.add_argument("--out", type=Path, help="a folder (default: evaluation-<split> beside it)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.val=ROOT ...")
    options = parser.parse_intermixed_args(arguments)
    try:
        keys = validate(Keys, parse_overrides(options.overrides))
        _evaluate_file(options.weights, options.out, keys)
    except GroundworkError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _evaluate_file(weights: Path, out: Path | None, keys: Keys) -> None:
    from finetune.plots import save_confusion, save_curves  # matplotlib takes a second
    from finetune.weights import detector_from_file

    if (keys.data.val is None) == (keys.data.test is None):
        raise UsageError("Say which pictures: one of data.val=ROOT and data.test=ROOT.")
    split = "val" if keys.data.val is not None else "test"
    detector, about = detector_from_file(weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = detector.to(device).to(memory_format=torch.channels_last)
    source = str(keys.data.val or keys.data.test)
    labeled = open_set(source, split, keys.data, about.names)
    try:
        seen = detect_all(
            detector, labeled, image_size=keys.image_size or about.image_size,
            batch_size=keys.batch_size, score=keys.score, iou=keys.iou, most=keys.most,
        )  # fmt: skip
        assert seen is not None
        results = measure(seen, about.names)
        ids = [labeled.read(*place).key for place in _places(labeled)]
    finally:
        labeled.close()
    folder = out or weights.parent / f"evaluation-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    document = {"weights": str(weights), "data": source, "split": split, **results.to_json()}
    write_atomically(folder / "results.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "detections.json", json.dumps(to_rows(seen.found, ids)) + "\n")
    save_curves(results, about.names, folder / "precision-recall.png")
    save_confusion(results, about.names, folder / "confusion.png")
    logger.info("%s", table(results))
    logger.info("In %s: results.json, detections.json, precision-recall.png, confusion.png", folder)


def open_set(source: str, split: str, data: Data, names: Sequence[str]) -> LabeledSamples:
    """Open one split of a data set whose classes are a detector's. Raises DataError."""
    # Data without splits is opened whole, and with a split's strictness.
    chosen = split if has_split(source, split) or not splits_of(source) else None
    cache_bytes = int(data.cache_gb * 1e9)
    labeled = open_labeled(source, chosen, cache=data.cache_folder(), cache_bytes=cache_bytes)
    if tuple(names) != labeled.names:
        raise DataError(
            f"The classes of {source} ({', '.join(labeled.names)}) are not the detector's "
            f"({', '.join(names)}): both must have the same names in the same order."
        )
    return labeled


def table(results: Results) -> str:
    """Lay results out for a person."""

    def shown(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.4f}"

    lines = [f"{results.pictures} pictures, {results.boxes} boxes"]
    lines += [f"  {name:10} {shown(value)}" for name, value in results.figures.items()]
    lines.append(f"  {'class':24} {'AP':>6} {'AP50':>6} {'boxes':>7}")
    for name, values in results.per_class.items():
        lines.append(
            f"  {name[:24]:24} {shown(values['ap'])} {shown(values['ap50'])} "
            f"{int(values['boxes'] or 0):7}"
        )
    return "\n".join(lines)


def _places(labeled: LabeledSamples) -> list[tuple[int, int]]:
    return [(s, i) for s, size in enumerate(labeled.shard_sizes) for i in range(int(size))]


if __name__ == "__main__":
    sys.exit(main())
