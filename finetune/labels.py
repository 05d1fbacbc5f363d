"""The command that shows what labels a data set has, before anything is trained on them.

    python -m finetune.labels DATA [--split train] [--out labels.png] [--pictures 16]

What: for each split the pictures, classes, sizes and defects, and a sheet of pictures with their
boxes drawn. Why: wrong labels train without a complaint; a person sees at a glance that boxes sit
beside their objects, or that names are exchanged. Everything is read as training reads it, through
groundwork.data.labels; pictures are opened as far as their headers, and only those of the sheet are
decoded. Small, medium and large are COCO's (areas below 32 x 32 pixels, up to 96 x 96, above).
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from finetune.draw import TEXT, colour_of, draw_labels, draw_tag, scaled
from groundwork.command import exit_code_of, printable, whole_number
from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture, open_picture
from groundwork.data.labels import LabeledSamples, open_labeled, splits_of
from groundwork.data.reach import read_patiently
from groundwork.data.reading import MAX_PIXELS, PLAIN, add_flags, stated_by
from groundwork.data.shards import evenly
from groundwork.errors import DataError, UnavailableError
from groundwork.settings import Data

UNREADABLE = "picture that cannot be read, replaced by another one in training"
_THREADS = 4
_COUNTING = threading.Lock()
_EXAMPLES = 3  # of each kind of defect
_MANY_CROWDS = 0.1  # of the boxes; COCO has 0.01
_SMALL, _LARGE = 32.0, 96.0  # sides of a square in pixels; COCO's evaluation
_TILE = 480  # pixels: side of a tile
_IMAGE_SIZES = (256, 640)
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(slots=True)
class Survey:
    """What was found in one split. `sides` are the roots of the boxes' areas, in pixels."""

    pictures: int = 0
    background: int = 0
    crowds: int = 0
    boxes: Counter[int] = field(default_factory=Counter)  # by class
    shown_in: Counter[int] = field(default_factory=Counter)  # pictures by class
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # pictures by width, height
    sides: list[npt.NDArray[np.float32]] = field(default_factory=list)
    shares: list[npt.NDArray[np.float32]] = field(default_factory=list)  # of the longer side
    thinnest: list[npt.NDArray[np.float32]] = field(default_factory=list)  # sides, as shares of it
    unreadable: list[str] = field(default_factory=list)  # where, and why

    def count(self, picture: Picture, annotations: Annotations) -> None:
        """Count one picture."""
        classes, edges = annotations.classes.tolist(), annotations.boxes
        self.pictures += 1
        self.background += not classes
        self.crowds += int(annotations.crowd.sum())
        self.boxes.update(classes)
        self.shown_in.update(set(classes))
        self.sizes[picture.width, picture.height] += 1
        longer = max(picture.width, picture.height)
        sides = np.sqrt((edges[:, 2:] - edges[:, :2]).prod(axis=1))
        self.sides.append(sides)
        self.shares.append(sides / longer)
        self.thinnest.append((edges[:, 2:] - edges[:, :2]).min(axis=1) / longer)

    @property
    def objects(self) -> int:
        """Return how many boxes are of one object each: crowds are not learned."""
        return self.boxes.total() - self.crowds

    def suspicion(self) -> str | None:
        """Say so where more boxes are crowds than a data set has that means it."""
        if self.crowds <= _MANY_CROWDS * self.boxes.total():
            return None
        return (
            f"{self.crowds:,} of {self.boxes.total():,} boxes are crowds (iscrowd: 1), which are "
            "neither learned nor counted as background. Some tools, CVAT among them, write so what "
            "was drawn as a mask: set iscrowd to 0 where they are single objects"
        )

    def below(self, pixels: float, image_size: int) -> int:
        """Return how many boxes have a side of less than so many pixels at an image size."""
        return sum(int((sides * image_size < pixels).sum()) for sides in self.thinnest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 usage, 3 data."""
    given = _parser().parse_args(arguments)
    return exit_code_of(lambda: _show(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.labels",
        description="Show the classes, boxes, sizes and defects of labeled data, and draw a sheet "
        "of pictures with their boxes.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="the root of a data set (COCO, YOLO, Pascal VOC), a COCO json, a data.yaml, labeled "
        "shards, or scenes",
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="this split alone (default: all)"
    )
    parser.add_argument(
        "--out",
        metavar="PNG",
        type=Path,
        default=Path("labels.png"),
        help="where the sheet goes (default %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        metavar="N",
        type=whole_number(0),
        default=16,
        help="pictures on the sheet (default %(default)s; 0: no sheet)",
    )
    add_flags(parser, "as the format says")
    parser.add_argument(
        "--max-pixels",
        metavar="PIXELS",
        type=whole_number(1),
        default=MAX_PIXELS,
        help="pictures of so many pixels or more count as unreadable (default %(default)s)",
    )
    return parser


def _show(given: argparse.Namespace) -> None:
    splits: Sequence[str | None] = splits_of(given.data) or (None,)
    if given.split is not None and splits == (None,):
        raise DataError(f"{given.data} is not split, so there is no {given.split}: leave it out.")
    if given.split is not None:
        splits = (given.split,)
    settings = Data()
    reading = stated_by(given.bands, given.value_range, replace(PLAIN, max_pixels=given.max_pixels))
    opened: dict[str | None, LabeledSamples] = {}
    for split in splits:
        samples = open_labeled(
            given.data,
            split,
            cache=settings.cache_folder(),
            cache_bytes=settings.cache_bytes(),
            reading=reading,
        )
        if not opened:
            _say("\n".join(_heading(given.data, samples)))
        opened[split] = samples
        _say("\n".join(_report(split, samples, survey(samples))))
    if given.pictures:
        bad: list[DataError] = []
        tiles = list(_tiles(opened, given.pictures, bad))
        _write_sheet(given.out, tiles, next(iter(opened.values())).names)
        _say(f"\n{len(tiles)} pictures with their boxes: {given.out}")
        if bad:
            _say(f"{len(bad)} others could not be drawn, the first: {bad[0]}")
    for samples in opened.values():
        samples.close()


# ---- counting ----------------------------------------------------------------------------------


def survey(samples: LabeledSamples) -> Survey:
    """Look at every picture's header and labels; the samples' defects then are all there are."""
    places = [
        (shard, index)
        for shard, size in enumerate(samples.shard_sizes.tolist())
        for index in range(size)
    ]
    found = Survey()
    # Readers are for one thread each, so every thread has a copy, which counts for itself.
    copies = [copy.deepcopy(samples) for _ in range(_THREADS)]
    with (
        tqdm(total=len(places), unit=" pictures", desc=samples.name, disable=None) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        parts = [
            pool.submit(_survey, reader, places[first::_THREADS], found, bar.update)
            for first, reader in enumerate(copies)
        ]
        for part in parts:
            part.result()
    for reader in copies:
        samples.defects.found.update(reader.defects.found)
        reader.close()
    return found


def _survey(
    samples: LabeledSamples,
    places: Sequence[tuple[int, int]],
    found: Survey,
    tick: Callable[[], object],
) -> None:
    for shard, index in places:
        source, shown = samples.name, ""
        try:
            sample = read_patiently(samples, shard, index)
            source, shown = sample.source, f"{sample.key}: "
            picture = open_picture(sample.image, samples.reading)
        except UnavailableError:  # no fault of the picture
            raise
        except DataError as error:
            samples.defects.add(UNREADABLE, source, f"{shown}{error}")
            with _COUNTING:
                found.unreadable.append(f"{source}, {shown}{error}")
                tick()
            continue
        annotations = samples.annotations(sample, picture)
        with _COUNTING:
            found.count(picture, annotations)
            tick()


# ---- telling -----------------------------------------------------------------------------------


def _heading(data: str, samples: LabeledSamples) -> Iterator[str]:
    shown = ", ".join(samples.names[:20]) + (", ..." if len(samples.names) > 20 else "")
    yield f"{data}: {samples.form}, {len(samples.names)} classes: {shown}"
    for note in samples.notes:
        yield f"  {note}"


def _report(split: str | None, samples: LabeledSamples, found: Survey) -> Iterator[str]:
    total = found.boxes.total()
    yield ""
    yield (
        f"{split or 'all'}: {found.pictures:,} pictures, of them {found.background:,} background; "
        f"{total:,} boxes" + (f", of them {found.crowds:,} crowds" if found.crowds else "")
    )
    if suspicion := found.suspicion():
        yield f"  {suspicion}."
    width = max(map(len, samples.names))
    for number, name in enumerate(samples.names):
        boxes, pictures = found.boxes[number], found.shown_in[number]
        yield f"  {name:<{width}}  {boxes:>9,} boxes in {pictures:>7,} pictures"
    yield from _box_sizes(found)
    common = [f"{w} x {h} ({count:,})" for (w, h), count in found.sizes.most_common(4)]
    rest = len(found.sizes) - len(common)
    yield f"  pictures' sizes: {', '.join(common)}" + (f" and {rest:,} others" if rest else "")
    yield from _defects(samples)


def _box_sizes(found: Survey) -> Iterator[str]:
    sides = np.concatenate([*found.sides, np.zeros(0, np.float32)])
    if not len(sides):
        return
    small, large = int((sides < _SMALL).sum()), int((sides > _LARGE).sum())
    counts = {"small": small, "medium": len(sides) - small - large, "large": large}
    shares = ", ".join(f"{n} {count:,} ({count / len(sides):.0%})" for n, count in counts.items())
    yield f"  boxes' sizes: {shares}"
    values = np.quantile(sides, _QUANTILES)
    quantiles = ", ".join(
        f"{quantile:.0%} {value:.1f}" for quantile, value in zip(_QUANTILES, values, strict=True)
    )
    yield f"  roots of their areas, px: {quantiles}"
    middle = float(np.median(np.concatenate(found.shares)))
    seen = ", ".join(f"{middle * size:.1f} at image_size={size}" for size in _IMAGE_SIZES)
    yield f"  the middle one, px: {seen}"


def _defects(samples: LabeledSamples) -> Iterator[str]:
    if not len(samples.defects):
        yield "  defects: none"
        return
    yield "  defects:"
    examples: dict[str, list[str]] = {}
    for defect in samples.defects:
        shown = examples.setdefault(defect.reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(defect.shown())
    for reason, count in samples.defects.counts().most_common():
        yield f"    {count:,} x {reason}"
        yield from (f"        {example}" for example in examples[reason])


def _say(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")


# ---- the sheet ---------------------------------------------------------------------------------


def _tiles(
    opened: dict[str | None, LabeledSamples], count: int, bad: list[DataError]
) -> Iterator[Image.Image]:
    """Yield pictures for the sheet, evenly spread over each split, and as many of each.

    What cannot be drawn is put into `bad`: its damage may lie behind the header, or its bands or
    values may want a mapping, neither of which a survey sees.
    """
    shares = [count // len(opened) + (n < count % len(opened)) for n in range(len(opened))]
    for (split, samples), share in zip(opened.items(), shares, strict=True):
        for place in evenly(samples.shard_sizes, share):
            shown = samples.name
            try:
                sample = read_patiently(samples, *place)
                shown = f"{sample.source}, {sample.key}"
                picture = open_picture(sample.image, samples.reading)
                annotations = samples.annotations(sample, picture)
                tile = draw_labels(*scaled(picture, _TILE), annotations, samples.names)
            except UnavailableError:
                raise
            except DataError as error:
                bad.append(DataError(f"{shown}: {error}"))
                continue
            title = sample.key.rpartition("/")[2]
            yield _titled(tile, f"{split}: {title}" if split else title, len(annotations))


def _titled(tile: Image.Image, title: str, boxes: int) -> Image.Image:
    titled = Image.new("RGB", (_TILE, tile.height + 2 * TEXT), "white")
    titled.paste(tile, ((_TILE - tile.width) // 2, 2 * TEXT))
    text = printable(title)
    shown = f"{text if len(text) <= 40 else text[:18] + '...' + text[-19:]}, {boxes} boxes"
    ImageDraw.Draw(titled).text((4, 3), shown, "black", ImageFont.load_default(TEXT))
    return titled


def _write_sheet(path: Path, tiles: Sequence[Image.Image], names: Sequence[str]) -> None:
    """Lay tiles out in a square, with the classes' colours below. Raises DataError."""
    across = max(1, math.ceil(math.sqrt(len(tiles))))
    rows = [tiles[first : first + across] for first in range(0, len(tiles), across)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (across * _TILE, sum(heights) + 2 * TEXT), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * _TILE, sum(heights[:number])))
    pen = ImageDraw.Draw(sheet)
    left, top = 4.0, sum(heights) + TEXT // 2
    for number, name in enumerate(names):
        left += draw_tag(pen, (left, top), name, colour_of(number), margin=3) + 2 * TEXT
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise DataError(f"The sheet {path} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(main())
