"""The command that packs pictures into tar shards, and the one that checks shards.

    python -m pretrain.pack [--labels LABELS] IMAGES [IMAGES ...] SHARDS
    python -m pretrain.pack verify SHARDS

What: finds pictures (pack_plan), packs them (pack_shards), checks shards (verify_shards), and
tells a person what came of it. Why shards: reading a few large files in order is what disks,
object stores and network file systems do well; millions of small files is what they do badly.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from groundwork.command import number_between, printable, whole_number
from groundwork.data.label_lookup import LabelLookup, open_lookup
from groundwork.data.reading import MAX_PIXELS, Reading, add_flags, stated_by
from groundwork.errors import GroundworkError, UsageError
from groundwork.files import write_file
from pretrain.pack_labels import DEFECTS_NAME, UNNAMED, summary, with_labels
from pretrain.pack_plan import (
    Findings,
    Source,
    check_tile_names,
    drop_duplicates,
    find_pictures,
    plan_shards,
)
from pretrain.pack_shards import JPEG_QUALITY, QUARANTINE_NAME, Options, Packed, pack
from pretrain.verify_shards import verify

DUPLICATES_NAME = "duplicates.jsonl"

_PACK_HELP = f"""\
Pack pictures into WebDataset tar shards with an index.

IMAGES are folders (searched with all that is below them), list files (.txt, one path a line,
relative to the list's own folder) or single pictures. SHARDS is a folder for the result alone.

The bytes of a picture are kept as they are, unless --resize or --tiles is given. Each picture is
decoded once on the way; those that cannot be are left out, and noted in SHARDS/{QUARANTINE_NAME}
with the reason. A pack that was stopped, or killed, goes on where it stopped when the same command
is given again; until it has finished, SHARDS has no index.json and is not taken for a data set.

Shards are read by this project and by any webdataset reader. A picture's key is its path less the
extension, with the dots of the file name written as %2E (webdataset cuts at the first dot); where
a folder has a.jpg and a.png, the second one's key is a.png. The index keeps the original paths.

With --labels the boxes of the pictures are packed too, each picture's in a .json member beside it,
in pixels of the upright picture, scaled with --resize:
  python -m pretrain.pack --labels ROOT ROOT/images/train SHARDS/train
Pictures that the labels do not name are left out and noted (YOLO: without a label file they are
background); what was wrong with boxes and was mended is noted in SHARDS/{DEFECTS_NAME}.
"""

_VERIFY_HELP = """\
Find every damage in a folder of shards.

Packed shards are compared with their index, size and sha256, so that no changed bit goes
unnoticed. Shards without our index are checked for what the tar itself shows: checksums of its
headers, members that end beyond the file, a missing end mark, keys that occur twice.

Each damage is shown with the file and what to do. Exit code 0: none; 3: there are some.
"""

_EPILOG = """\
To check shards: python -m pretrain.pack verify SHARDS. (For a folder of pictures that is itself
called verify, write ./verify.)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 usage, 3 data."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given[:1] == ["verify"]:
            return _verify(_verify_parser().parse_args(given[1:]))
        return _pack(_pack_parser().parse_args(given))
    except GroundworkError as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command goes on where it stopped.\n")
        return 130  # what a shell says of a command that Ctrl-C ended


# ---- arguments ---------------------------------------------------------------------------------


def _pack_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.pack",
        description=_PACK_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", type=Path, help="folders, lists (.txt), pictures"
    )
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="the folder for the shards")
    parser.add_argument(
        "--resize",
        metavar="SIDE",
        type=whole_number(1),
        help="shrink pictures whose shortest side is longer than SIDE to that side, upright, and "
        f"encode them anew (JPEG, quality {JPEG_QUALITY}); smaller ones keep their bytes",
    )
    parser.add_argument(
        "--tiles",
        metavar="SIDE",
        type=whole_number(1),
        help="cut pictures that are larger than SIDE in either direction into tiles of SIDE x SIDE "
        f"pixels (JPEG, quality {JPEG_QUALITY}), so that a crop does not decode a whole scene",
    )
    parser.add_argument(
        "--overlap",
        metavar="SHARE",
        type=number_between(0, 0.89),
        default=0.0,
        help="share of a tile's side that neighbours have in common, at least (default "
        "%(default)s)",
    )
    parser.add_argument(
        "--min-visible",
        metavar="SHARE",
        type=number_between(0, 1),
        default=0.25,
        help="with --tiles and --labels: a box of which a tile shows less is marked as a crowd, "
        "which training and scoring pass over (default %(default)s)",
    )
    parser.add_argument(
        "--shard-size",
        metavar="PICTURES",
        type=whole_number(1),
        default=1000,
        help="pictures in a shard, at most (default %(default)s)",
    )
    parser.add_argument(
        "--shard-mib",
        metavar="MIB",
        type=whole_number(1),
        default=256,
        help="size of a shard in MiB, at most, counted before --resize (default %(default)s)",
    )
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave out exact copies (same bytes) of an earlier picture; noted in "
        f"{DUPLICATES_NAME}",
    )
    add_flags(
        parser,
        "as the format says",
        "; --tiles and --resize store what was read so, otherwise pictures keep their bytes and "
        "are to be trained on with the same data.bands and data.value_range",
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--labels",
        metavar="LABELS",
        help="pack the boxes too: the root of the data set that the pictures are from (COCO, YOLO, "
        "Pascal VOC), a COCO json, a data.yaml, or a folder of label files",
    )
    labels.add_argument(
        "--class-folders",
        action="store_true",
        help="take the first folder below IMAGES as the class of the pictures in it; stored as a "
        "number in a .cls member, with the names in index.json",
    )
    parser.add_argument(
        "--max-bad-fraction",
        metavar="FRACTION",
        type=number_between(0, 1),
        default=0.5,
        help="fail when more than this share of the pictures is unreadable (default %(default)s)",
    )
    parser.add_argument(
        "--max-pixels",
        metavar="PIXELS",
        type=whole_number(1),
        default=MAX_PIXELS,
        help="refuse pictures of this many pixels or more (default %(default)s)",
    )
    _add_workers(parser)
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.pack verify",
        description=_VERIFY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="a folder of shards, or a tar")
    _add_workers(parser)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole_number(1),
        default=len(os.sched_getaffinity(0)),
        help="how many to work on at once (default: the cores this process may use, %(default)s)",
    )


# ---- pack --------------------------------------------------------------------------------------


def _pack(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    folder: Path = arguments.shards
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"SHARDS must be a folder, and {str(folder)!r} is a file.")
    if arguments.tiles is not None and (arguments.resize is not None or arguments.class_folders):
        raise UsageError(
            "--tiles is for pictures at their own size, without a class for the whole: leave out "
            "--resize and --class-folders."
        )
    findings = find_pictures(arguments.images, class_folders=arguments.class_folders)
    pictures: Sequence[Source] = findings.pictures
    if arguments.tiles is not None:
        check_tile_names(pictures)
    lookup = open_lookup(arguments.labels) if arguments.labels is not None else None
    if lookup is not None:
        pictures = with_labels(pictures, lookup)
    dropped: list[tuple[str, str]] = []
    if arguments.drop_duplicates:
        pictures, dropped = drop_duplicates(pictures, arguments.workers)
    classes = sorted({picture.label for picture in pictures if picture.label is not None})
    if lookup is not None:
        classes = list(lookup.names)
    reading = stated_by(
        arguments.bands, arguments.value_range, Reading(max_pixels=arguments.max_pixels)
    )
    options = Options(
        arguments.resize,
        arguments.max_pixels,
        tuple(classes),
        labeled=lookup is not None,
        tiles=arguments.tiles,
        overlap=arguments.overlap,
        min_visible=arguments.min_visible,
        reading=reading,
    )
    plan = plan_shards(
        pictures,
        prefix="shard",
        shard_size=arguments.shard_size,
        shard_bytes=arguments.shard_mib << 20,
        options=[
            options,
            *(["labeled"] if options.labeled else []),
            *([] if options.tiles is None else ["tiles", options.tiles, options.overlap]),
            *([options.min_visible] if options.tiles is not None and options.labeled else []),
            *(reading.mapping if reading.stated else []),
        ],
    )
    with tqdm(total=len(pictures), unit=" pictures", desc="Packing", smoothing=0.1) as bar:
        results = pack(
            folder,
            plan,
            options,
            workers=arguments.workers,
            max_bad_fraction=arguments.max_bad_fraction,
            progress=bar.update,
        )
    if dropped:
        lines = (json.dumps({"path": path, "same_as": first}) + "\n" for path, first in dropped)
        write_file(folder / DUPLICATES_NAME, "".join(lines).encode("ascii"))
    _say(_summary(folder, findings, results, len(dropped), time.monotonic() - started, lookup))
    keys = _keys_of(reading, stored=arguments.tiles is not None or arguments.resize is not None)
    _say("To train on them: " + shlex.join([f"data.train={folder}", *keys]))
    return 0


def _keys_of(reading: Reading, *, stored: bool) -> list[str]:
    """Return the keys with which shards are read as they were meant.

    `stored`: bands and values are in the shards as they were read; else pictures kept their bytes.
    """
    bands = reading.bands
    if stored:
        bands = None if reading.channels == 3 else tuple(range(1, reading.channels + 1))
    keys = [] if bands is None else [f"data.bands=[{','.join(map(str, bands))}]"]
    if reading.value_range is not None and not stored:
        low, high = reading.value_range
        keys.append(f"data.value_range=[{low:.10g},{high:.10g}]")
    if reading.max_pixels != MAX_PIXELS and not stored:
        keys.append(f"data.max_pixels={reading.max_pixels}")
    return keys


def _summary(
    folder: Path,
    findings: Findings,
    results: Sequence[Packed],
    dropped: int,
    seconds: float,
    lookup: LabelLookup | None,
) -> str:
    pictures = sum(done.row.pictures for done in results)
    size = sum(done.row.tar_bytes for done in results)
    made = [done for done in results if done.made]
    speed = ""
    if made:
        rate = sum(done.row.pictures for done in made) / seconds
        megabytes = sum(done.row.tar_bytes for done in made) / 1e6 / seconds
        speed = f" ({rate:,.0f} pictures/s, {megabytes:,.1f} MB/s)"
    shards = sum(done.row.pictures > 0 for done in results)
    lines = [
        f"{pictures:,} pictures in {shards:,} shards, {size / 1e6:,.1f} MB, in {folder}",
        f"  {len(made):,} shards written now, in {seconds:,.1f} s{speed}",
    ]
    left_out = [item for done in results for item in done.quarantined]
    bad = [item for item in left_out if item[1] != UNNAMED]
    if len(bad) < len(left_out):
        lines.append(
            f"  {len(left_out) - len(bad):,} pictures left out that the labels do not name, see "
            f"{folder / QUARANTINE_NAME}"
        )
    if bad:
        lines.append(
            f"  {len(bad):,} unreadable pictures left out, see {folder / QUARANTINE_NAME}:"
        )
        lines += [f"    {path!r}: {reason}" for path, reason in bad[:5]]
        lines += [f"    and {len(bad) - 5:,} more"] * (len(bad) > 5)
    if lookup is not None:
        mended = [item for done in results for item in done.mended]
        lines += summary(mended, lookup, str(folder / DEFECTS_NAME))
    if dropped:
        lines.append(f"  {dropped:,} exact copies left out, see {folder / DUPLICATES_NAME}")
    if findings.named_twice:
        lines.append(f"  {findings.named_twice:,} pictures were named twice, and are in once")
    if findings.other_files:
        lines.append(f"  passed over, no pictures by name: {_counted(findings.other_files)}")
    return "\n".join(lines)


def _counted(files: Counter[str]) -> str:
    shown = [f"{count:,} {name!r}" for name, count in files.most_common(5)]
    rest = files.total() - sum(count for _, count in files.most_common(5))
    return ", ".join([*shown, f"{rest:,} others"] if rest else shown)


# ---- verify ------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    if not arguments.shards.exists():
        raise UsageError(f"There is no folder {str(arguments.shards)!r}.")
    with tqdm(unit=" shards", desc="Checking") as bar:
        verdict = verify(arguments.shards, threads=arguments.workers, progress=bar.update)
    for problem in verdict.problems:
        _say(str(problem))
    how = (
        ""
        if verdict.by_hash
        else " (structure only where there is no index of ours to compare with)"
    )
    extent = f"{verdict.shards:,} shards, {verdict.pictures:,} pictures"
    if verdict.problems:
        _say(f"{len(verdict.problems):,} problems in {extent}{how}.")
        return 3
    _say(f"No damage in {extent}, {verdict.bytes_read / 1e6:,.1f} MB{how}.")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")


if __name__ == "__main__":
    sys.exit(main())
