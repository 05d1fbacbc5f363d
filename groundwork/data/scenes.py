"""The embedded default: drawn aerial scenes, kept as tar shards in a cache.

What: `open_scenes` gives pictures (with their boxes in a `.json` member), drawn the first time and
read afterwards; `open_scene_objects` gives labeled crops of single objects, by which
a probe says whether a backbone learned anything. Why: a command without any data must work, and be
a fair first test. They are drawings, and say so; nobody should conclude anything about photographs.

The three sets never share a scene: each has a seed of its own. A folder appears whole or not at
all; processes that want the same one wait for the one that draws it.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from groundwork.data.scene_drawing import VERSION, Scene, draw_scene
from groundwork.data.scene_labels import CLASSES
from groundwork.data.shard_index import INDEX_NAME
from groundwork.data.shard_sets import open_shards
from groundwork.data.shards import ShardSamples
from groundwork.data.write_shards import write_shards
from groundwork.errors import DataError, UsageError

__all__ = ["CLASSES", "Scene", "draw_scene", "open_scene_objects", "open_scenes"]

QUALITY = 92  # of the JPEGs
OBJECT_SIDE = 128
CONTEXT = 1.5  # an object's crop is a square of this many times the longer side of its box
OBJECTS_OF_A_CLASS = {"train": 100, "val": 50}
OBJECTS_OF_A_SCENE = 4  # of one class, so that a crowded lot does not stand for its class

_INDEX_FORM = 2  # raise it when the index of the shards has more in it: caches are named by it
_SEEDS = 1 << 32  # seeds of open_scenes lie below; those of the labeled crops do not
_OBJECT_SEEDS = {"train": _SEEDS + 1, "val": _SEEDS + 2}
_SCENES_A_PROCESS = 64  # fewer are drawn sooner than a process starts
_RECORD = struct.Struct("<II")

Members = Mapping[str, bytes]
_logger = logging.getLogger(__name__)


def open_scenes(cache: Path, count: int = 2048, size: int = 256, seed: int = 0) -> ShardSamples:
    """Open the drawn scenes in `cache`, and draw them first where they are not there yet.

    Each sample has a `.json` member: {"boxes": [[left, top, right, bottom], ...] in pixels,
    "classes": [...] places in CLASSES, "names": [...]}.

    Raises UsageError for numbers that make no scenes, DataError where the cache cannot be written.
    """
    if count < 1 or size < 32 or not 0 <= seed < _SEEDS:
        raise UsageError(
            f"Drawn scenes need a count of at least 1 (not {count}), a size of at least 32 "
            f"(not {size}) and a seed from 0 to {_SEEDS - 1} (not {seed})."
        )
    folder = cache / f"scenes-v{VERSION}-index{_INDEX_FORM}-seed{seed}-{count}x{size}px"
    what = f"{count} aerial scenes of {size}x{size} pixels"
    return _open(folder, what, lambda: _drawn_by_many(count, size, seed), count, CLASSES)


def open_scene_objects(cache: Path, split: Literal["train", "val"]) -> ShardSamples:
    """Open labeled crops of single objects, as many of each class; draw them first if need be.

    They come from scenes that open_scenes never draws, and train and val share none. A sample's
    label is its class's name.
    """
    if split not in _OBJECT_SEEDS:
        raise UsageError(f"Drawn objects have the splits train and val, not {split!r}.")
    each = OBJECTS_OF_A_CLASS[split]
    folder = cache / f"scene-objects-v{VERSION}-{split}-{each}x{OBJECT_SIDE}px"
    what = f"{each} crops of each of {', '.join(CLASSES)}"
    return _open(folder, what, lambda: _cut_objects(split, each), each * len(CLASSES))


def _open(
    folder: Path,
    what: str,
    draw: Callable[[], Iterable[tuple[str, Members]]],
    count: int,
    classes: Sequence[str] | None = None,
) -> ShardSamples:
    """Open a folder of shards; where it is missing, one process draws it and the others wait."""
    if not (folder / INDEX_NAME).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                if not (folder / INDEX_NAME).is_file():
                    _logger.info("drawing %s into %s, once", what, folder)
                    bar = tqdm(draw(), folder.name, count, unit="picture", disable=None)
                    write_shards(folder, bar, prefix="scenes", shard_size=256, classes=classes)
        except OSError as error:
            raise DataError(
                f"The drawn scenes cannot be kept in {folder.parent}: {error.strerror or error}. "
                "Name another cache folder, or make room there."
            ) from error
    _logger.info("drawn pictures, not photographs: %s, kept in %s", what, folder)
    return open_shards(folder, folder.parent)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is to be made; the system gives it back if we are killed."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for another process that draws %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_by_a_kill in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left_by_a_kill)
        yield


# ---- whole scenes ------------------------------------------------------------------------------


def _encode(picture: npt.NDArray[np.uint8] | Image.Image) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _draw_members(seed: int, index: int, size: int) -> tuple[bytes, bytes]:
    """Draw a scene; return its JPEG and its labels as JSON."""
    scene = draw_scene(seed, index, size)
    labels = {
        "boxes": [[round(float(edge), 2) for edge in box] for box in scene.boxes],
        "classes": scene.classes.tolist(),
        "names": [CLASSES[place] for place in scene.classes],
    }
    return _encode(scene.picture), json.dumps(labels).encode()


def draw_to_pipe(seed: int, first: int, count: int, step: int, size: int) -> None:
    """Draw scenes first, first + step, ... below count, and write them to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reads decides
    try:
        for index in range(first, count, step):
            picture, labels = _draw_members(seed, index, size)
            sys.stdout.buffer.write(_RECORD.pack(len(picture), len(labels)) + picture + labels)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(1)  # the reader is gone, and so is whom an error message would be for


def _drawn_by_many(count: int, size: int, seed: int) -> Iterator[tuple[str, Members]]:
    """Draw scenes in as many processes as there are cores, and give them in their order.

    The processes are started afresh and not forked, since whoever calls may have threads and a
    GPU; and not by multiprocessing's spawn, which would run the caller's main module again.
    """
    workers = min(len(os.sched_getaffinity(0)), -(-count // _SCENES_A_PROCESS))
    if workers == 1:
        for index in range(count):
            picture, labels = _draw_members(seed, index, size)
            yield f"scene-{index:06d}", {"jpg": picture, "json": labels}
        return
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    program = "import sys; from groundwork.data.scenes import draw_to_pipe as draw; "
    program += "draw(*map(int, sys.argv[1:]))"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for first in range(workers):
            numbers = [str(n) for n in (seed, first, count, workers, size)]
            command = [sys.executable, "-P", "-c", program, *numbers]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, bufsize=1 << 20)
            )
        for index in range(count):
            picture, labels = _read_record(processes[index % workers])
            yield f"scene-{index:06d}", {"jpg": picture, "json": labels}
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _read_record(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    assert process.stdout is not None
    header = process.stdout.read(_RECORD.size)
    if len(header) == _RECORD.size:
        picture_bytes, label_bytes = _RECORD.unpack(header)
        content = process.stdout.read(picture_bytes + label_bytes)
        if len(content) == picture_bytes + label_bytes:
            return content[:picture_bytes], content[picture_bytes:]
    raise DataError(
        f"A process that draws scenes ended early (exit code {process.wait()}): see its message "
        "above; without one, it was probably killed for lack of memory."
    )


# ---- single objects ----------------------------------------------------------------------------


def _cut_objects(split: str, each: int) -> Iterator[tuple[str, Members]]:
    """Draw scenes until there are `each` crops of every class."""
    found: Counter[int] = Counter()
    index = 0
    while found.total() < each * len(CLASSES):
        scene = draw_scene(_OBJECT_SEEDS[split], index)
        image = Image.fromarray(scene.picture)
        here: Counter[int] = Counter()
        for box, place in zip(scene.boxes.tolist(), scene.classes.tolist(), strict=True):
            if found[place] == each or here[place] == OBJECTS_OF_A_SCENE:
                continue
            crop = image.resize(
                (OBJECT_SIDE, OBJECT_SIDE), Image.Resampling.BICUBIC, _around(box, image.width)
            )
            label = CLASSES[place].encode()
            yield f"{split}-{found.total():06d}", {"jpg": _encode(crop), "cls": label}
            found[place] += 1
            here[place] += 1
        index += 1


def _around(box: list[float], size: int) -> tuple[float, float, float, float]:
    """Give the square around a box, with context, moved into the picture where it sticks out."""
    left, top, right, bottom = box
    side = min(float(size), CONTEXT * max(right - left, bottom - top))
    x = min(max((left + right - side) / 2, 0.0), size - side)
    y = min(max((top + bottom - side) / 2, 0.0), size - side)
    return x, y, x + side, y + side
