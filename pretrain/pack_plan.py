"""Which pictures go into which shard, under which key: a pure function of what is on the disk.

What: `find_pictures` walks the inputs, `drop_duplicates` leaves exact copies out, `plan_shards`
cuts the sorted pictures into shards. Why so: nothing but the sorted list decides where a picture
goes, so that a pack that was killed goes on where it stopped, and the same pictures give the same
shards on every machine and with any number of processes.

Keys: the path below the common folder of all inputs, less its last extension. Where that is taken
(`a.jpg` and `a.png` in one folder), the later picture, in the order of names, keeps its extension
in its key (`a.png`). Nothing is ever left out because of its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from groundwork.data.folders import walk
from groundwork.data.label_policy import Labels
from groundwork.data.lists import read_lines
from groundwork.data.shard_index import default_key, sha256_text
from groundwork.data.tar_format import BLOCK, PICTURE_SUFFIXES, picture_suffix
from groundwork.data.write_shards import shard_name
from groundwork.errors import DataError, UsageError

# macOS writes these beside real pictures, with the same extension: they hold no picture.
_SYSTEM_PREFIX = "._"
_TILE_KEY = re.compile(r"(.+)_x\d+_y\d+")  # pretrain.pack_shards names tiles so


@dataclass(frozen=True, slots=True)
class Source:
    """A picture to be packed. `path` is its name: the path below the common folder.

    `labels` is what is packed beside it with `--labels` (pretrain.pack_labels).
    """

    file: str
    path: str
    size: int
    changed: int  # time of the last change, ns
    label: str | None = None
    key: str = ""
    labels: Labels | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True)
class Findings:
    """What lay in the inputs: pictures in order, and what was passed over."""

    pictures: list[Source] = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)  # by extension
    named_twice: int = 0


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard to be written. `plan` is a hash over its pictures and the options."""

    name: str
    pictures: list[Source]
    plan: str


# ---- finding -----------------------------------------------------------------------------------


def find_pictures(inputs: Sequence[Path], *, class_folders: bool) -> Findings:
    """Find the pictures of folders, list files (.txt) and single files, sorted, with their keys.

    Links to folders are followed, no folder twice. With `class_folders` the first folder below an
    input is the class of what is in it. Raises UsageError for inputs that do not exist, DataError
    where there is no picture.
    """
    findings = Findings()
    roots: list[str] = []
    files: dict[str, str] = {}  # file -> the root it was found under
    for given in inputs:
        root, found = _open_input(given, findings.other_files)
        roots.append(root)
        for file in found:
            findings.named_twice += file in files
            files.setdefault(file, root)
    if not files:
        shown = ", ".join(str(given) for given in inputs)
        raise DataError(
            f"No picture found in {shown}: looked for files that end in "
            f"{', '.join(sorted(PICTURE_SUFFIXES))}."
        )
    base = os.path.commonpath(roots)
    pictures = []
    for file, root in files.items():
        label = os.path.relpath(file, root).split("/") if class_folders else []
        pictures.append(_source(file, os.path.relpath(file, base), label))
    pictures.sort(key=lambda picture: picture.path.rpartition("/")[::2])
    findings.pictures = list(_with_keys(pictures))
    return findings


def check_tile_names(pictures: Sequence[Source]) -> None:
    """Raise UsageError where a picture has the name that a tile of another one would get."""
    keys = {picture.key for picture in pictures}
    for picture in pictures:
        named = _TILE_KEY.fullmatch(picture.key)
        if named is not None and named[1] in keys:
            raise UsageError(
                f"{picture.path} is named like a tile of {named[1]}, which would get the same key: "
                "rename one of the two, or pack them into two sets."
            )


def _open_input(given: Path, other_files: Counter[str]) -> tuple[str, Iterable[str]]:
    """Return the root of an input and its files, absolute, without resolving links."""
    absolute = os.path.abspath(given)  # noqa: PTH100 (pathlib keeps `..`)
    if given.is_dir():
        return absolute, _walk(absolute, other_files)
    if not given.is_file():
        raise UsageError(f"There is no folder, list or picture {str(given)!r}.")
    if given.suffix.lower() == ".txt":
        return _read_list(Path(absolute))
    if picture_suffix(given.name) is None:
        raise UsageError(
            f"{str(given)!r} is neither a folder, nor a list of pictures (.txt), nor a picture."
        )
    return str(Path(absolute).parent), [absolute]


def _walk(folder: str, other_files: Counter[str]) -> Iterator[str]:
    for place, names in walk(folder, hidden=True):
        for name in names:
            if picture_suffix(name) and not name.startswith(_SYSTEM_PREFIX):
                file = Path(place, name)
                # A link that leads nowhere is quarantined when it is read; a pipe is no picture.
                if file.is_symlink() or file.is_file():
                    yield str(file)
                    continue
            other_files[Path(name).suffix or name] += 1


def _read_list(path: Path) -> tuple[str, list[str]]:
    """Read a list of pictures, one path a line, relative to the list's own folder."""
    files = [os.path.abspath(path.parent / line) for line in read_lines(path)]  # noqa: PTH100
    folder = str(path.parent)
    if any(not file.startswith(folder.rstrip("/") + "/") for file in files):
        folder = os.path.commonpath([str(Path(file).parent) for file in files])
    return folder, files


def _source(file: str, path: str, below_root: list[str]) -> Source:
    try:
        status = Path(file).stat()
    except OSError:  # named in a list, or a link that leads nowhere: quarantined when it is read
        return Source(file, path, 0, 0)
    label = below_root[0] if len(below_root) > 1 else None
    return Source(file, path, status.st_size, status.st_mtime_ns, label)


def _with_keys(pictures: Iterable[Source]) -> Iterator[Source]:
    folder, used = "", set[str]()
    for picture in pictures:
        if picture.path.rpartition("/")[0] != folder:
            folder, used = picture.path.rpartition("/")[0], set()
        key = default_key(picture.path)
        if key in used:
            # Free: only a name that begins with this whole one could take it, and sorts later.
            key = picture.path
        used.add(key)
        yield dataclasses.replace(picture, key=key)


# ---- duplicates --------------------------------------------------------------------------------


def drop_duplicates(
    pictures: Sequence[Source], threads: int
) -> tuple[list[Source], list[tuple[str, str]]]:
    """Leave out exact copies (sha256 of the bytes): the first stays, or the first with labels.

    Also returns (path, path of the one that stays) for each. Only files of equal size are read.
    """
    sizes = Counter(picture.size for picture in pictures)
    doubtful = [picture for picture in pictures if sizes[picture.size] > 1 and picture.size > 0]
    with ThreadPoolExecutor(threads) as pool:
        hashes = dict(
            zip(
                (picture.path for picture in doubtful),
                pool.map(_hash, (picture.file for picture in doubtful)),
                strict=True,
            )
        )
    best: dict[str, Source] = {}
    for picture in doubtful:
        digest = hashes[picture.path]
        if digest is not None and _known(picture) > _known(best.get(digest)):
            best[digest] = picture
    kept, dropped = [], []
    for picture in pictures:
        stays = best.get(hashes.get(picture.path) or "", picture)
        if stays.path == picture.path:
            kept.append(picture)
        else:
            dropped.append((picture.path, stays.path))
    return kept, dropped


def _known(picture: Source | None) -> int:
    """Return how much is known of a picture: it has boxes, is named by labels, or is there."""
    if picture is None:
        return 0
    return 1 if picture.labels is None else 3 if len(picture.labels.boxes) else 2


def _hash(file: str) -> str | None:
    try:
        with Path(file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:  # quarantined when it is packed
        return None


# ---- the plan ----------------------------------------------------------------------------------


def plan_shards(
    pictures: Sequence[Source],
    *,
    prefix: str,
    shard_size: int,
    shard_bytes: int,
    options: Sequence[object],
) -> list[PlannedShard]:
    """Cut the pictures into shards of at most `shard_size` pictures and `shard_bytes` bytes.

    A picture larger than that has a shard of its own. `options` are what else decides what a
    shard will hold; they enter its hash.
    """
    groups: list[list[Source]] = []
    room = 0
    for picture in pictures:
        needed = picture.size + 2 * BLOCK  # its header, and its padding to a whole block
        if not groups or len(groups[-1]) >= shard_size or needed > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(picture)
        room -= needed
    return [
        PlannedShard(shard_name(prefix, number), group, _plan_hash(group, options))
        for number, group in enumerate(groups)
    ]


def _plan_hash(pictures: Iterable[Source], options: Sequence[object]) -> str:
    lines = []
    for p in pictures:
        lines.append(repr((p.path, p.key, p.size, p.changed, p.label)))
        if p.labels is not None:
            lines.append(p.labels.digest())
    return sha256_text([*map(repr, options), *lines])
