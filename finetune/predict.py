"""What a detector finds in pictures: `python -m finetune.predict WEIGHTS PICTURES [--out DIR]`.

What: DIR/predictions.json (images, annotations and categories in COCO's form), DIR/detections.json
(COCO's results form, a list), and DIR/pictures, where the boxes are drawn with names and scores.
`--tile` cuts large pictures into overlapping tiles (finetune/tiles.py).

Pictures are looked at one after the other, so that memory does not grow with their number, and in
the same frame as in evaluation: the longer side is image_size, and each side of the frame the
smallest multiple of 32 that holds the picture. One that cannot be read is told of and left out.

Coordinates are pixels of the upright picture (its EXIF orientation applied). An image's id is its
number, from 1, among the pictures that could be read; a category's id is its class, from 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from finetune.augment.warp import resized
from finetune.detector import DEFAULT_LIMITS, Detections, Detector, Limits
from finetune.finder import (
    STRIDE,
    Finder,
    Frame,
    frame_of,
    placed,
    show,
)
from finetune.looks import LOOKS, looking
from finetune.predictions import Drawings, Writer
from finetune.tiles import find_in_tiles, needs_tiles
from finetune.weights import About, check_channels, detector_from_file
from groundwork.command import exit_code_of, number_between, printable, whole_number
from groundwork.data.decode import Picture, naming, open_picture
from groundwork.data.reach import read_patiently
from groundwork.data.reading import MAX_PIXELS, PLAIN, Reading, add_flags, stated_by
from groundwork.data.samples import open_samples
from groundwork.data.shards import Sample, Samples, ShardSamples
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import (
    CheckpointError,
    DataError,
    UnavailableError,
    UsageError,
)
from groundwork.settings import Data

OVERLAP = 0.2  # of a tile's side that neighbours share


@dataclass(frozen=True, slots=True)
class Predictor:
    """A finder, and how it looks at pictures.

    `image_size` is the longer side of what it sees, in pixels; `limits` are the finder's, for what
    tiles find together; `tile` (pixels; None: no tiles) and `overlap` (a share of it) are those of
    groundwork.data.tiles.tiles_of. `most` is how many boxes a picture in tiles may have (None: all
    that its tiles have, each as many as `limits` say).
    """

    finder: Finder
    image_size: int
    limits: Limits = DEFAULT_LIMITS
    tile: int | None = None
    overlap: float = OVERLAP
    at_once: int = 1  # tiles in a batch
    most: int | None = None

    def find(self, picture: Picture) -> Detections:
        """Find the boxes of a picture, in its upright pixels. Raises DataError where it is damaged.

        They are on the CPU, clipped to the picture, best first.
        """
        width, height = picture.width, picture.height
        if self.tile is not None and needs_tiles(width, height, self.tile):
            return find_in_tiles(
                picture.pixels(), self.find_in_areas, image_size=self.image_size, tile=self.tile,
                overlap=self.overlap, limits=self.limits, at_once=self.at_once,
                most=self.most,
            )  # fmt: skip
        # Cut to the size that is seen: a JPEG is decoded no larger than needed.
        frame = frame_of(width, height, self.image_size)
        [found] = self._look([show(picture, picture.whole, frame)], frame)
        return found

    def find_in_areas(
        self, areas: Sequence[npt.NDArray[np.uint8]], longer: int
    ) -> list[Detections]:
        """Find the boxes of areas of one size (H W C), whose longer side is seen as `longer`."""
        frame = frame_of(areas[0].shape[1], areas[0].shape[0], longer)
        size = frame.shown_height, frame.shown_width
        return self._look([placed(resized(area, size), frame) for area in areas], frame)

    def _look(self, framed: Sequence[npt.NDArray[np.uint8]], frame: Frame) -> list[Detections]:
        detections = []
        for found in self.finder(np.stack(framed)):
            boxes = torch.from_numpy(frame.undo(found.boxes))
            kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # some lie in the grey around the picture
            scores, classes = torch.from_numpy(found.scores), torch.from_numpy(found.classes)
            detections.append(Detections(boxes[kept], scores[kept], classes[kept]))
        return detections


# ---- the command -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 usage, 3 data, 4 weights."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def predict(
    predictor: Predictor,
    samples: Samples,
    folder: Path,
    names: Sequence[str],
    *,
    pictures: bool = True,
    reading: Reading = PLAIN,
) -> str:
    """Write what is found in all pictures into a folder, drawn too if `pictures`; sum it up.

    Pictures that cannot be read are named on standard error. Raises DataError where none could be,
    OSError where the folder cannot be written.
    """
    unreadable, full = 0, 0
    drawings = Drawings(folder / "pictures", names)
    bar = tqdm(_places(samples), total=len(samples), unit=" pictures", disable=None)
    with Writer(folder, names) as writer, bar:
        for shard, index in bar:
            try:
                sample = read_patiently(samples, shard, index)
                if drawings.made(sample.source):
                    continue
                name = _file_name(samples, sample, shard, index)
                picture, found = _found(predictor, sample, name, reading)
            except UnavailableError:  # no fault of the pictures
                raise
            except DataError as error:
                unreadable += 1
                bar.write(printable(f"Left out: {error}"), file=sys.stderr)
                continue
            tiled = predictor.tile is not None and needs_tiles(
                picture.width, picture.height, predictor.tile
            )
            most = predictor.most if tiled else predictor.limits.most
            full += len(found.boxes) == most
            number = writer.add(name, picture.width, picture.height, found)
            if pictures:
                drawings.draw(number, name, picture, found)
        if not writer.pictures:
            raise DataError(
                f"None of the {unreadable:,} pictures of {samples.name} could be read: see the "
                "reasons above, and name others."
            )
        writer.finish()
    left_out = f"; {unreadable:,} pictures could not be read" if unreadable else ""
    if full:
        left_out += f"; {full:,} pictures have as many boxes as --most allows: raise it"
    return f"{writer.boxes:,} boxes in {writer.pictures:,} pictures{left_out}"


def _run(options: argparse.Namespace) -> None:
    if options.overlap is not None and options.tile is None:
        raise UsageError("--overlap is of tiles: say how large they are by --tile.")
    drawn, given = (options.out / "pictures").resolve(), Path(options.pictures).resolve()
    if drawn == given or drawn in given.parents:
        raise UsageError(
            f"--out {options.out}: boxes are drawn into {drawn}, where PICTURES are: name another."
        )
    detector, about = _detector(options.weights)
    data = Data()
    samples = open_samples(
        options.pictures,
        cache=data.cache_folder(),
        cache_bytes=data.cache_bytes(),
        key="PICTURES",
    )
    reading = _reading(options, about.reading())
    check_channels(detector, reading)
    size = options.image_size or about.image_size
    limits = Limits(options.score, options.iou, options.most or DEFAULT_LIMITS.most)
    finder = looking(detector, options.looks, limits)
    # On a CPU one tile at a time is 1.1 times as fast as eight (LOG.md).
    at_once = 1 if next(detector.parameters()).device.type == "cpu" else 8
    predictor = Predictor(
        finder,
        size,
        limits,
        options.tile,
        options.overlap or OVERLAP,
        at_once,
        options.most,
    )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        told = predict(
            predictor, samples, options.out, about.names, pictures=not options.no_pictures,
            reading=reading,
        )  # fmt: skip
    except OSError as error:
        raise DataError(
            f"{error.filename or options.out} cannot be written ({error.strerror}): choose another "
            "folder with --out."
        ) from error
    finally:
        samples.close()
    sys.stdout.write(printable(f"{told}: {options.out}\n"))


def _reading(options: argparse.Namespace, trained: Reading) -> Reading:
    """Return how pictures are read: as in training, but for what is said."""
    otherwise = replace(PLAIN if options.plain else trained, max_pixels=options.max_pixels)
    return stated_by(options.bands, options.value_range, otherwise)


def _detector(weights: Path) -> tuple[Detector, About]:
    """Read a detector onto the device that there is. Raises CheckpointError."""
    detector, about = detector_from_file(weights)
    if len(about.names) != detector.head.num_classes:
        raise CheckpointError(
            f"{weights} names {len(about.names)} classes and has {detector.head.num_classes}: "
            "write it again with one name a class."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return detector.to(device).to(memory_format=torch.channels_last), about


def _places(samples: Samples) -> Iterator[tuple[int, int]]:
    """Yield (shard, index) of every sample, in order, telling which shard comes next."""
    for shard, size in enumerate(samples.shard_sizes.tolist()):
        samples.prefetch(range(shard, min(shard + 2, len(samples.shard_sizes))))
        yield from ((shard, index) for index in range(size))


def _file_name(samples: Samples, sample: Sample, shard: int, index: int) -> str:
    """Return a picture's path as the data knows it: below its folder, or before it was packed."""
    if isinstance(samples, ShardSamples):
        return samples.samples(shard).paths[index]
    suffix = Path(sample.source).suffix
    return sample.key + suffix if picture_suffix(sample.source) else sample.key


def _found(
    predictor: Predictor, sample: Sample, name: str, reading: Reading
) -> tuple[Picture, Detections]:
    with naming(f"{name} of {sample.source}"):
        picture = open_picture(sample.image, reading)
        return picture, predictor.find(picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.predict",
        description="Find objects in pictures; write their boxes in COCO's form, and draw them.",
    )
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", type=Path, help="a detector.safetensors")
    add("pictures", metavar="PICTURES", help="a picture, a folder, a list (.txt) or tar shards")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("predictions"),
        help="the folder to write (%(default)s)",
    )
    add(
        "--score",
        type=number_between(0, 1),
        default=0.25,
        help="boxes scored lower are left out (%(default)s)",
    )
    add(
        "--iou",
        type=number_between(0, 1),
        default=0.7,
        help="boxes of a class may overlap so far (%(default)s)",
    )
    add(
        "--most",
        type=whole_number(1),
        metavar="N",
        help=f"boxes of a picture (default: {DEFAULT_LIMITS.most}, in tiles so many of each tile)",
    )
    add(
        "--looks",
        type=int,
        choices=LOOKS,
        default=1,
        help="look 2, 4 or 8 times, mirrored and turned, and take the mean (%(default)s)",
    )
    add(
        "--image-size",
        type=whole_number(STRIDE, STRIDE),
        metavar="N",
        help="the longer side of what the detector sees, in pixels (default: that of training)",
    )
    add(
        "--tile",
        type=whole_number(STRIDE, STRIDE),
        metavar="N",
        help="cut pictures longer than 1.5 tiles into tiles of N x N pixels (default: never)",
    )
    add(
        "--overlap",
        type=number_between(0.05, 0.75),
        help=f"the share of a tile's side that neighbours share ({OVERLAP}); objects up to that "
        "size are seen whole",
    )
    add_flags(parser, "as in training")
    add(
        "--plain", action="store_true", help="read pictures as their format says, whatever training"
    )
    add(
        "--max-pixels",
        metavar="PIXELS",
        type=whole_number(1),
        default=MAX_PIXELS,
        help="pictures of so many pixels or more are left out (default %(default)s)",
    )
    add("--no-pictures", action="store_true", help="write the json files alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
