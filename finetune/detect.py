"""Every picture of a labeled set through a detector once, by any number of processes.

The set is cut into windows of pictures that follow each other in the order of the files, and of N
processes each takes every Nth window. Inside a window pictures of one frame (finetune/finder.py)
make a batch, so a batch is the same whoever computes it, and what is found does not depend on the
number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from finetune.detector import DEFAULT_LIMITS, Detector, Limits
from finetune.finder import STRIDE, Frame, frame_of, show
from finetune.looks import looking
from finetune.metrics import Found, Truth
from groundwork.data.annotations import Annotations
from groundwork.data.decode import naming, open_picture
from groundwork.data.labels import LabeledSamples
from groundwork.data.reach import read_patiently
from groundwork.data.shards import Sample
from groundwork.errors import DataError, UsageError

# A window is so many batches, for batches of one frame to fill up, but at most this share of the
# pictures, so that a small set is dealt out to all processes.
_BATCHES, _SHARE = 4, 8


class _Shown(NamedTuple):
    """A picture as the detector is to see it, and what is true of it."""

    number: int
    key: str
    pixels: npt.NDArray[np.uint8]
    frame: Frame
    truth: Truth


class _Row(NamedTuple):
    """What was found in one picture."""

    number: int
    found: Found
    truth: Truth
    key: str


class Seen(NamedTuple):
    """What was found in every picture, with the pictures' numbers in file order and their keys."""

    numbers: list[int]
    found: list[Found]
    truth: list[Truth]
    keys: list[str]


def detect_all(
    detector: Detector,
    labeled: LabeledSamples,
    *,
    image_size: int,
    batch_size: int = 16,
    workers: int = 1,
    limits: Limits = DEFAULT_LIMITS,
    looks: int = 1,
    group: dist.ProcessGroup | None = None,
    numbers: Sequence[int] | None = None,
) -> Seen | None:
    """Find the boxes of every picture, in the pictures' own pixels; see finetune.evaluate.

    `group` is a gloo group of all processes where there are several; None on all but the first.
    The detector is copied and stays as it is.

    `numbers` are the detector's numbers of the labels' classes; None: they are the same.
    """
    if image_size % STRIDE:
        raise UsageError(f"image_size={image_size} is not a multiple of {STRIDE}.")
    finder = looking(detector, looks, limits)
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    windows = _windows(_places(labeled), batch_size)[rank::world]
    # On a CPU decoding would only take the cores that the detector computes on, so it gets them all
    # between two windows; beside another device it goes on meanwhile.
    on_cpu = next(detector.parameters()).device.type == "cpu"
    threads = max(workers, torch.get_num_threads()) if on_cpu else max(workers, 1)
    rows: list[_Row] = []
    failure: DataError | None = None
    try:
        for shown in _decoded(labeled, windows, image_size, threads, ahead=0 if on_cpu else 1):
            for batch in _batches(shown, batch_size):
                found = finder(np.stack([one.pixels for one in batch]))
                for one, its in zip(batch, found, strict=True):
                    upright = its._replace(boxes=one.frame.undo(its.boxes))
                    truth = _renumbered(one.truth, numbers)
                    rows.append(_Row(one.number, upright, truth, one.key))
    except DataError as error:
        failure = error
    whole = _gathered(rows, failure, group)
    if whole is None:
        return None
    whole.sort(key=lambda row: row.number)
    return Seen(
        [row.number for row in whole],
        [row.found for row in whole],
        [row.truth for row in whole],
        [row.key for row in whole],
    )


def _places(labeled: LabeledSamples) -> list[tuple[int, int]]:
    return [(s, i) for s, size in enumerate(labeled.shard_sizes) for i in range(int(size))]


def _windows(
    places: Sequence[tuple[int, int]], batch_size: int
) -> list[list[tuple[int, tuple[int, int]]]]:
    """Cut numbered places into windows; a function of the set and the batch size alone."""
    size = max(1, min(_BATCHES * batch_size, len(places) // _SHARE))
    if size > batch_size:  # whole batches
        size -= size % batch_size
    entries = list(enumerate(places))
    return [entries[first : first + size] for first in range(0, len(entries), size)]


def _decoded(
    labeled: LabeledSamples,
    windows: Sequence[Sequence[tuple[int, tuple[int, int]]]],
    image_size: int,
    threads: int,
    ahead: int,
) -> Iterator[list[_Shown]]:
    """Decode windows by threads, `ahead` of them in advance: Pillow frees the interpreter."""

    def shown(number: int, sample: Sample) -> _Shown:
        with naming(f"{sample.key} of {sample.source}"):
            picture = open_picture(sample.image, labeled.reading)
            truth = Truth(labeled.annotations(sample, picture), picture.width, picture.height)
            frame = frame_of(picture.width, picture.height, image_size)
            pixels = show(picture, picture.whole, frame)
        return _Shown(number, sample.key, pixels, frame, truth)

    waiting: list[list[Future[_Shown]]] = []
    with ThreadPoolExecutor(threads) as pool:
        for window in [*windows, *[[]] * ahead]:
            labeled.prefetch(sorted({shard for _, (shard, _) in window}))
            # Samples are read by one thread: a shard's file is not shared.
            read = [(number, read_patiently(labeled, *place)) for number, place in window]
            waiting.append([pool.submit(shown, *one) for one in read])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.pop(0)]


def _batches(shown: Sequence[_Shown], batch_size: int) -> Iterator[list[_Shown]]:
    """Put pictures of one frame together."""
    alike: dict[tuple[int, ...], list[_Shown]] = {}
    for one in shown:
        alike.setdefault(one.pixels.shape, []).append(one)
    for those in alike.values():
        for first in range(0, len(those), batch_size):
            yield those[first : first + batch_size]


def _renumbered(truth: Truth, numbers: Sequence[int] | None) -> Truth:
    if numbers is None:
        return truth
    boxes, classes, crowd = (getattr(truth.annotations, n) for n in ("boxes", "classes", "crowd"))
    classes = np.asarray(numbers, np.int64)[classes]
    return truth._replace(annotations=Annotations(boxes, classes, crowd))


def _gathered(
    rows: list[_Row],
    failure: DataError | None,
    group: dist.ProcessGroup | None,
) -> list[_Row] | None:
    """Bring all processes' pictures to the first; None on the others.

    Where one process failed, all of them raise what it raised, and none waits for it.
    """
    if group is None:
        if failure is not None:
            raise failure
        return rows
    world = dist.get_world_size(group)
    failures: list[DataError | None] = [None] * world
    dist.all_gather_object(failures, failure, group=group)
    failure = next((one for one in failures if one is not None), None)
    if failure is not None:
        raise failure
    parts = [rows] * world if dist.get_rank(group) == 0 else None
    dist.gather_object(rows, parts, group=group)
    return None if parts is None else [row for part in parts for row in part]
