"""Pictures into shards over several processes, so that a kill at any moment loses little.

What: `pack` writes every shard of a plan that is not there yet, then index.json. A shard counts
as there when it has its final name and its sample index says that it was made for this very plan.
Each picture is decoded once on the way: unreadable ones are left out and noted, with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import logging
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from groundwork.data.bands import write_bands
from groundwork.data.decode import Picture, open_picture
from groundwork.data.label_policy import Defects
from groundwork.data.reach import patiently
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.shard_index import (
    INDEX_NAME,
    SampleIndex,
    dump,
    is_set_index,
    samples_name,
    sha256_text,
)
from groundwork.data.shard_sets import UNFINISHED_NAME, read_set_index
from groundwork.data.tar_format import MAX_MEMBER_BYTES, picture_suffix
from groundwork.data.tiles import tiles_of
from groundwork.data.write_shards import (
    Entry,
    Row,
    finish_set,
    write_shard,
)
from groundwork.errors import DataError, UnavailableError, UsageError, not_read
from groundwork.files import TEMPORARY_SUFFIX, write_file
from pretrain.pack_labels import DEFECTS_NAME, UNNAMED, labeled_member, settled, tile_member
from pretrain.pack_plan import PlannedShard, Source

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
_LOCK_NAME = ".pack.lock"
JPEG_QUALITY = 90
_MANY = 1000  # pictures, of which one at least should be readable
# What reasons that are not the picture's say: they may be gone when the command is run again.
_NOT_READ = "it cannot be read"
_TO_INSTALL = "pip install"


@dataclass(frozen=True, slots=True)
class Options:
    """What happens to each picture on its way into a shard."""

    resize: int | None  # shortest side in pixels; None keeps the original bytes
    max_pixels: int
    classes: tuple[str, ...] = ()
    # What a plan knows by itself, or is told beside these (pretrain/pack.py): not in `repr`, which
    # it is hashed with, so that packings of older versions go on.
    labeled: bool = field(default=False, repr=False)
    tiles: int | None = field(default=None, repr=False)  # side in pixels; None cuts nothing
    overlap: float = field(default=0.0, repr=False)  # of a tile's side, that neighbours share
    min_visible: float = field(default=0.25, repr=False)  # of a box that a tile cuts
    reading: Reading = field(default=PLAIN, repr=False)


@dataclass(frozen=True, slots=True)
class Packed:
    """A shard that is there: its line in index.json, and what was left out of it."""

    row: Row
    quarantined: list[list[str]]  # [path, reason]
    mended: list[list[str]]  # [path, reason, where]: defects of its labels
    made: bool  # in this run


class _Stopped(Exception):
    """The command was interrupted: the shard at hand is given up."""


# ---- one shard, in a worker --------------------------------------------------------------------

Tick = Callable[[int], object]  # hears how many more pictures there are; may raise


def pack_shard(folder: Path, shard: PlannedShard, options: Options, tick: Tick) -> Packed:
    """Write one shard. Raises DataError when the folder cannot be written to."""
    quarantined: list[list[str]] = []
    mended: list[list[str]] = []

    def entries() -> Iterator[Entry]:
        for picture in shard.pictures:
            tick(1)
            defects = Defects()
            try:
                content = patiently(partial(_content, picture), partial(tick, 0), picture.file)
                made = _entries(picture, content, options, defects)
            except UnavailableError as error:  # no fault of the picture
                raise DataError(
                    f"{picture.file}: {error}. When it is within reach again, the same command "
                    "goes on where it stopped."
                ) from error
            except DataError as error:
                quarantined.append([picture.path, str(error)])
            else:
                mended.extend([picture.path, found.reason, found.shown()] for found in defects)
                yield from made

    try:
        samples = write_shard(
            folder,
            shard.name,
            entries(),
            plan=shard.plan,
            quarantined=quarantined,
            mended=mended,
        )
    except OSError as error:
        raise DataError(
            f"The shard {folder / shard.name} cannot be written: {error.strerror}. Make room or "
            "name another folder; the same command goes on where it stopped."
        ) from error
    return Packed(Row.of(shard.name, samples), quarantined, mended, True)


def _content(picture: Source) -> bytes:
    """Read a picture's file. Raises DataError with the reason why it cannot be used."""
    if picture_suffix(picture.path) is None:
        raise DataError("its name does not end like that of a picture")
    if picture.size > MAX_MEMBER_BYTES:
        raise DataError(f"it has {picture.size} bytes, more than {MAX_MEMBER_BYTES}")
    try:
        return Path(picture.file).read_bytes()
    except OSError as error:
        # What was not there when it was planned is bad, and what is not there any more may come
        # back with its folder.
        folder = Path(picture.file).parent if picture.changed else None
        raise not_read(error, f"{_NOT_READ}: {error.strerror}", folder) from error


def _entries(picture: Source, content: bytes, options: Options, defects: Defects) -> list[Entry]:
    """Check one picture: one entry, or one for each of its tiles.

    Raises DataError with the reason why it cannot be used.
    """
    opened = open_picture(content, options.reading)
    if options.tiles is not None and max(opened.width, opened.height) > options.tiles:
        return _tiles(picture, opened, options, defects)
    size = opened.height, opened.width
    if options.resize is not None and min(size) > options.resize:
        size = _resized_to(opened, options.resize)
        suffix, content = _encoded(opened.cut([opened.whole], size)[0])
    elif options.reading.stated and (options.resize or options.tiles):
        # One set, one mapping: all of it as it was read, and nothing as it was stored.
        suffix, content = _encoded(opened.pixels())
    else:
        _check_pixels(opened)
        suffix = picture.path.rpartition(".")[2]
    members = {suffix: content}
    if options.labeled:
        members["json"] = labeled_member(picture.labels, opened, size, options.classes, defects)
    if picture.label is not None:
        # A number, since webdataset decodes `cls` with int(); the index has the name.
        members["cls"] = str(options.classes.index(picture.label)).encode()
    return [Entry(picture.key, members, picture.path, picture.label)]


def _tiles(picture: Source, opened: Picture, options: Options, defects: Defects) -> list[Entry]:
    """Cut a large picture; a tile's key and path say where it lies: scene_x512_y1024."""
    assert options.tiles is not None
    found = settled(picture.labels, opened, defects) if options.labeled else None
    pixels = opened.pixels()
    stem, _, ending = picture.path.rpartition(".")
    entries = []
    for tile in tiles_of(opened.width, opened.height, options.tiles, options.overlap):
        left, top, right, bottom = tile
        place = f"_x{left}_y{top}"
        suffix, content = _encoded(pixels[top:bottom, left:right])
        members = {suffix: content}
        if found is not None:
            members["json"] = tile_member(found, tile, options.classes, options.min_visible)
        entries.append(Entry(f"{picture.key}{place}", members, f"{stem}{place}.{ending}"))
    return entries


def _check_pixels(picture: Picture) -> None:
    """Decode the whole picture, and drop it. Raises DataError.

    A JPEG is decoded at an eighth of its size, which reads every byte of it and is two to four
    times as fast: most of the time of packing.
    """
    picture.cut([picture.whole], (max(1, picture.height // 8), max(1, picture.width // 8)))


def _resized_to(picture: Picture, side: int) -> tuple[int, int]:
    """Return the height and width that have the shortest side at `side`."""
    scale = side / min(picture.width, picture.height)
    return max(side, round(picture.height * scale)), max(side, round(picture.width * scale))


def _encoded(pixels: npt.NDArray[np.uint8]) -> tuple[str, bytes]:
    """Encode H W C anew: RGB as JPEG, other channels as a TIFF without loss."""
    file = io.BytesIO()
    if pixels.shape[2] == 3:
        try:
            Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        except OSError as error:  # libjpeg's longest side is 65,500
            height, width = pixels.shape[:2]
            what = f"its {width} x {height} pixels cannot be encoded as a JPEG ({error})"
            raise DataError(f"{what}: pack it at its own size, or in tiles") from error
        return "jpg", file.getvalue()
    write_bands(file, pixels)
    return "tif", file.getvalue()


def finished_shard(folder: Path, shard: PlannedShard) -> Packed | None:
    """Return a shard that an earlier run finished for the same plan, if there is one."""
    path = folder / samples_name(shard.name)
    try:
        samples = SampleIndex.parse(path.read_bytes(), str(path))
        size = (folder / shard.name).stat().st_size if len(samples) else 0
    except (OSError, DataError):
        return None
    if samples.plan != shard.plan or samples.tar_bytes != size:
        return None
    reasons = [reason for _, reason in samples.quarantined]
    if any(reason.startswith(_NOT_READ) or _TO_INSTALL in reason for reason in reasons):
        return None  # it may be mended by now, and nothing of the picture's file shows it
    return Packed(Row.of(shard.name, samples), samples.quarantined, samples.mended, False)


# ---- all shards --------------------------------------------------------------------------------


def pack(
    folder: Path,
    plan: Sequence[PlannedShard],
    options: Options,
    *,
    workers: int,
    max_bad_fraction: float,
    progress: Callable[[int], object],
) -> list[Packed]:
    """Write every shard that is not there yet, and the index last.

    `progress` hears how many more pictures are done. Raises UsageError when the folder holds
    another packing or something else, DataError when more than `max_bad_fraction` of the pictures
    are unreadable (the shards stay, so that a second try is quick).
    """
    plan_hash = sha256_text(shard.plan for shard in plan)
    with _owned(folder, plan_hash):
        packed: dict[str, Packed] = {}
        missing = []
        for shard in plan:
            earlier = finished_shard(folder, shard)
            if earlier is None:
                missing.append(shard)
            else:
                packed[shard.name] = earlier
                progress(len(shard.pictures))
        pictures = sum(len(shard.pictures) for shard in plan)
        bad = [item for done in packed.values() for item in done.quarantined if _is_bad(item)]
        none_read = not any(done.row.pictures for done in packed.values())
        run = _pack_here if workers <= 1 else _pack_in_processes
        for done in run(folder, missing, options, workers, progress):
            packed[done.row.name] = done
            bad += filter(_is_bad, done.quarantined)
            none_read = none_read and not done.row.pictures
            if len(bad) > max_bad_fraction * pictures:
                break  # whatever the others are
            if none_read and len(bad) >= _MANY:
                none_read = False  # told once
                logger.warning("None of %d pictures could be read so far: %s", len(bad), bad[0][1])
        results = [packed[shard.name] for shard in plan if shard.name in packed]
        _write_quarantine(folder, results)
        not_tried = sum(len(shard.pictures) for shard in plan if shard.name not in packed)
        _check_bad_fraction(folder, results, pictures - not_tried, not_tried, max_bad_fraction)
        classes = list(options.classes)
        finish_set(folder, [done.row for done in results], plan=plan_hash, classes=classes)
        (folder / UNFINISHED_NAME).unlink(missing_ok=True)
    return results


@contextlib.contextmanager
def _owned(folder: Path, plan_hash: str) -> Iterator[None]:
    """Make sure that the folder is for this plan alone, and that no other process packs there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    with _opened(folder / _LOCK_NAME) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"Another pack is writing to {folder}: wait for it.") from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s).", folder, error.strerror)
        _check_plan(folder, plan_hash)
        try:
            for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
            if not is_set_index(folder / INDEX_NAME):
                write_file(folder / UNFINISHED_NAME, dump({"plan": plan_hash}))
            yield
            (folder / _LOCK_NAME).unlink()
        except OSError as error:
            raise DataError(
                f"{error.filename or folder} cannot be written: {error.strerror}. Make room or "
                "name another folder; the same command goes on where it stopped."
            ) from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise UsageError(
            f"The folder {path.parent} cannot be written to: {error.strerror}."
        ) from error


def _check_plan(folder: Path, plan_hash: str) -> None:
    earlier: object = None
    if is_set_index(folder / INDEX_NAME):
        earlier = read_set_index(folder / INDEX_NAME).plan
    elif (folder / UNFINISHED_NAME).exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            earlier = json.loads((folder / UNFINISHED_NAME).read_bytes())["plan"]
    elif next(folder.glob("*.tar"), None) or (folder / INDEX_NAME).exists():
        raise UsageError(
            f"The folder {folder} holds shards that this command did not make: name another one."
        )
    else:
        return
    if earlier != plan_hash:
        raise UsageError(
            f"The folder {folder} holds a packing of other pictures or with other options (or the "
            "pictures have changed since): name another folder, or remove this one."
        )


def _write_quarantine(folder: Path, results: Sequence[Packed]) -> None:
    bad = [
        {"path": path, "reason": reason, "shard": done.row.name}
        for done in results
        for path, reason in done.quarantined
    ]
    mended = [
        {"path": path, "reason": reason, "where": where, "shard": done.row.name}
        for done in results
        for path, reason, where in done.mended
    ]
    for name, rows in ((QUARANTINE_NAME, bad), (DEFECTS_NAME, mended)):
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_file(folder / name, lines.encode("ascii"))
        else:
            (folder / name).unlink(missing_ok=True)


def _is_bad(quarantined: Sequence[str]) -> bool:
    """Tell whether a picture was left out because it cannot be read."""
    return quarantined[1] != UNNAMED


def _check_bad_fraction(
    folder: Path, results: Sequence[Packed], pictures: int, not_tried: int, limit: float
) -> None:
    """Raise DataError where too many of the pictures that were given are bad, tiled or not."""
    left_out = [item for done in results for item in done.quarantined]
    bad = [item for item in left_out if _is_bad(item)]
    pictures -= len(left_out) - len(bad)
    if not bad or (any(done.row.pictures for done in results) and len(bad) <= limit * pictures):
        return
    first = bad[0]
    others = f" ({not_tried} others were not tried)" if not_tried else ""
    raise DataError(
        f"{len(bad)} of {pictures} pictures cannot be read{others}, the first being {first[0]!r} "
        f"({first[1]}); all are in {folder / QUARANTINE_NAME}. Mend or remove them, or allow "
        "more with --max-bad-fraction."
    )


# ---- processes ---------------------------------------------------------------------------------


def _pack_here(
    folder: Path,
    shards: Sequence[PlannedShard],
    options: Options,
    workers: int,
    progress: Callable[[int], object],
) -> Iterator[Packed]:
    for shard in shards:
        yield pack_shard(folder, shard, options, progress)


def _pack_in_processes(
    folder: Path,
    shards: Sequence[PlannedShard],
    options: Options,
    workers: int,
    progress: Callable[[int], object],
) -> Iterator[Packed]:
    # Spawned, not forked: the parent may have threads (torch, a progress bar).
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    waiting = iter(shards)
    seen = 0
    with ProcessPoolExecutor(
        min(workers, max(1, len(shards))), context, _start_worker, (counter, stop)
    ) as pool:
        # A few ahead: a plan of 100,000 shards is not pickled at once.
        running: set[Future[Packed]] = {
            pool.submit(_pack_in_worker, folder, shard, options)
            for shard in itertools.islice(waiting, 2 * workers)
        }
        try:
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                now = counter.value
                progress(now - seen)
                seen = now
                for future in done:
                    yield future.result()
                running |= {
                    pool.submit(_pack_in_worker, folder, shard, options)
                    for shard in itertools.islice(waiting, len(done))
                }
        except BrokenProcessPool as error:
            raise DataError(
                "A process that was packing has died, perhaps for lack of memory: run the same "
                "command again, with fewer --workers; it goes on where it stopped."
            ) from error
        finally:
            stop.set()


# What the executor's initializer leaves for the tasks of one worker process; empty elsewhere.
_worker: dict[str, Any] = {}


def _start_worker(counter: Any, stop: multiprocessing.synchronize.Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(counter=counter, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the command itself was killed: nobody would ever collect what is made here."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pack_in_worker(folder: Path, shard: PlannedShard, options: Options) -> Packed:
    def tick(pictures: int) -> None:
        if _worker["stop"].is_set():
            raise _Stopped
        with _worker["counter"].get_lock():
            _worker["counter"].value += pictures

    return pack_shard(folder, shard, options, tick)
