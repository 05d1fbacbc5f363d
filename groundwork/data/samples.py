"""What can be read: a folder of pictures, tar shards here or far away, drawn scenes, or several.

`open_samples` takes what a person writes as data.train and gives one `Samples`. A folder is read as
it is, one picture a shard, so that nothing has to be packed to begin with; from a few 100,000
pictures on, shards are the better form (python -m pretrain.pack).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from groundwork.data.folders import walk
from groundwork.data.lists import read_lines
from groundwork.data.remote import is_remote, open_remote
from groundwork.data.scenes import open_scenes
from groundwork.data.shard_index import INDEX_NAME, default_key, is_set_index, sha256_text
from groundwork.data.shard_sets import is_tar, mixed, open_shards
from groundwork.data.shards import Sample, Samples
from groundwork.data.tar_format import MAX_MEMBER_BYTES, PICTURE_SUFFIXES, picture_suffix
from groundwork.errors import DataError, UsageError, not_read

logger = logging.getLogger(__name__)

SCENES = "scenes"
_PACK_HINT = "`python -m pretrain.pack IMAGES SHARDS` makes shards of a folder of pictures."


def open_samples(
    train: str | Sequence[str], *, cache: Path, cache_bytes: int, key: str = "data.train"
) -> Samples:
    """Open what data.train names, or another `key` that errors then speak of.

    One of: a folder of pictures; a folder, glob, brace pattern or list of tar shards; the URL of
    shards (http, https, s3, gs); a text file that lists any of these, a path a line; `scenes`; or a
    list of them. `cache` is the folder for what is fetched, drawn or indexed, and `cache_bytes` how
    much fetched shards may take there.

    Raises DataError where nothing is found, UsageError for what is not supported.
    """
    given = [train] if isinstance(train, str) else list(train)
    if not given:
        raise UsageError(f"{key} is an empty list: name at least one folder, or shards.")
    if len(given) > 1 and all(is_remote(item) and item.endswith(".tar") for item in given):
        return open_remote(given, cache=cache, cache_bytes=cache_bytes, key=key)
    if len(given) > 1 and all(_is_local_shards(item) for item in given):
        return open_shards(given, cache)
    _refuse_doubles(given, key)
    parts = [_open_one(item, cache, cache_bytes, key) for item in given]
    return parts[0] if len(parts) == 1 else JoinedSamples(parts)


def _refuse_doubles(given: Sequence[str], key: str) -> None:
    """Raise DataError where one place is named twice, or lies in another one.

    Of a text file's pictures the folders are looked at, and all else that it names.
    """
    places: dict[str, str] = {}
    for item in given:
        place = item.rstrip("/") if _scheme(item) else os.path.realpath(item)
        if place in places:
            raise DataError(f"{key} names {item} twice: name each of them once.")
        places[place] = item
    inner = {
        (str(above), item) for item in given if not _scheme(item)
        for above in Path(os.path.realpath(item)).parents
    }  # fmt: skip
    if len(given) > 1:
        inner |= {
            (str(above), f"{item}, whose {place}")
            for item in given
            for place in _listed_places(item)
            for above in (place, *Path(place).parents)
        }
    for above, item in sorted(inner):
        if above in places:
            raise DataError(
                f"{key} names {item}, which lies in {places[above]}: its pictures would be there "
                "twice. Name one of the two."
            )


def _listed_places(item: str) -> set[str]:
    """Return what a text file names, and of its pictures the folders that they lie in."""
    path = Path(item)
    if _scheme(item) or path.suffix != ".txt" or not path.is_file():
        return set()
    named = {
        os.path.dirname(line) if picture_suffix(line) else line  # noqa: PTH120 (there are many)
        for line in read_lines(path)
        if not _scheme(line)
    }
    return {os.path.realpath(path.parent / place) for place in named}


def _open_one(train: str, cache: Path, cache_bytes: int, key: str) -> Samples:
    if train == SCENES:
        return open_scenes(cache)
    if is_remote(train):
        return open_remote([train], cache=cache, cache_bytes=cache_bytes, key=key)
    _refuse_schemes(train, key)
    path = Path(train)
    if _is_local_shards(train):
        return open_shards(train, cache)
    if path.name == INDEX_NAME and is_set_index(path):
        return open_shards(path.parent, cache)
    if path.is_dir():
        try:
            return FolderSamples(path)
        except DataError:
            if any(is_tar(name) for _, names in walk(path) for name in names):
                return open_shards(train, cache)  # all of them in folders of their own
            raise
    if path.is_file() and train.endswith(".txt"):
        return _open_list(path, cache, cache_bytes, key)
    if path.is_file() and picture_suffix(path.name):
        return PictureFiles(path.parent, [path.name], str(path))
    if path.exists():
        raise DataError(
            f"{key}={train} is neither a folder, nor a tar shard, nor a picture, nor a list"
            f" of them (.txt). {_PACK_HINT}"
        )
    raise DataError(
        f"{key}={train} does not exist (looked for {path.absolute()}): name a folder of"
        f" pictures, tar shards, their URL, or {SCENES}. {_PACK_HINT}"
    )


def _is_local_shards(train: str) -> bool:
    """Tell whether this names tar shards here: a folder with some right in it, or a pattern."""
    if train == SCENES or _scheme(train):
        return False
    path = Path(train)
    if path.is_dir():
        if is_set_index(path / INDEX_NAME):
            return True
        with os.scandir(path) as entries:
            return any(is_tar(entry.name) for entry in entries)
    return train.endswith(".tar") or (not path.exists() and any(mark in train for mark in "*?[{"))


def _scheme(train: str) -> str:
    """Return the scheme of a URL or of a command for webdataset, such as `ftp` or `pipe`."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe|exec):", train)
    return (match[1] or match[2]).lower() if match else ""


def _refuse_schemes(train: str, key: str) -> None:
    scheme = _scheme(train)
    if scheme in ("pipe", "exec"):
        raise UsageError(f"{key}={train} would run a command, which is never done: name files.")
    if scheme:
        raise UsageError(
            f"{key}={train}: {scheme}:// cannot be read; http://, https://, s3://, gs:// and"
            " plain paths can."
        )


# ---- pictures in folders -----------------------------------------------------------------------


class PictureFiles:
    """Pictures that are files of their own, each a shard of one sample unless they are grouped; the
    Samples protocol.

    `paths` are relative to `root`, or absolute. The paths are kept as one row of bytes: a million
    of them take what their letters take, and eight bytes each. A sample's key is its path less the
    last extension, as in shards; its label is the first folder below the root that it lies in.
    """

    def __init__(
        self, root: Path, paths: Sequence[str] | Iterator[tuple[str, int]], name: str
    ) -> None:
        self.root = root
        self.name = name
        digest = hashlib.sha256()
        joined = bytearray()
        ends = array("q", [0])
        for item in paths:
            path, size = item if isinstance(item, tuple) else (item, _file_size(str(root / item)))
            encoded = os.fsencode(path)
            joined += encoded
            ends.append(len(joined))
            digest.update(b"%s\0%d\n" % (encoded, size))
        self._joined = bytes(joined)
        self._ends: npt.NDArray[np.int64] = np.frombuffer(ends, np.int64)
        self.shard_sizes = np.ones(len(ends) - 1, np.int64)
        self.fingerprint = digest.hexdigest()
        self._group = 1  # pictures of a shard

    def __len__(self) -> int:
        return len(self._ends) - 1

    def group(self, size: int) -> None:
        """Let `size` pictures in a row be a shard: what an order shuffles as it does real ones."""
        self._group = size
        shards = -(-len(self) // size)
        self.shard_sizes = np.full(shards, size, np.int64)
        self.shard_sizes[-1] = len(self) - size * (shards - 1)
        self.fingerprint = sha256_text([self.fingerprint, size])

    def path(self, number: int) -> str:
        """Return the path of a picture, as it was given."""
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} pictures, not one numbered {number}")
        return os.fsdecode(self._joined[self._ends[number] : self._ends[number + 1]])

    def read(self, shard: int, index: int) -> Sample:
        """Read one picture. Raises DataError naming its file."""
        if not 0 <= index < self._group:
            raise IndexError(f"a shard of {self._group} pictures has no index {index}")
        path = self.path(shard * self._group + index)
        file_path = self.root / path
        try:
            with file_path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_MEMBER_BYTES:
                    raise DataError(
                        f"The picture {file_path} has {size} bytes, more than the limit of"
                        f" {MAX_MEMBER_BYTES}."
                    )
                content = file.read()
        except OSError as error:
            sentence = f"The picture {file_path} cannot be read: {error.strerror}."
            outside = path.startswith(("/", "../"))
            raise not_read(error, sentence, file_path.parent if outside else self.root) from error
        return Sample(default_key(path), content, _label(path), str(file_path), 0)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Do nothing: local files need no fetching."""

    def close(self) -> None:
        """Do nothing: no file stays open."""


class FolderSamples(PictureFiles):
    """Every picture in a folder and the folders below it, sorted by path.

    Pictures are known by their extension, upper or lower case. Names that begin with a dot are
    passed over (thumbnails, and the shadow files that macOS leaves). A link to a folder elsewhere
    is followed, once; one to a folder inside the same tree, or around it, is not, so that a circle
    of links has an end. No folder is read twice. A link that leads nowhere is kept, and is a bad
    picture when it is read.

    Raises DataError where there is no picture, and where tars lie among the pictures.
    """

    def __init__(self, root: Path) -> None:
        tars: list[str] = []
        super().__init__(root, _pictures_below(root, tars), str(root))
        if len(self) and tars:
            raise mixed(root, self.path(0), tars[0])
        if not len(self):
            raise DataError(
                f"There is no picture in {root.absolute()} or below it: looked for the extensions"
                f" {', '.join(sorted(PICTURE_SUFFIXES))}. {_PACK_HINT}"
            )


def _pictures_below(root: Path, tars: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (relative path, bytes) of every picture, folder by folder, each sorted by name.

    Relative paths of tars that are passed go into `tars`.
    """
    own = os.path.realpath(root)
    walked: set[str] = set()  # real paths
    # A stack instead of recursion: what is on top comes next, so names go on it in reverse.
    stack: list[tuple[str, str]] = [("", own)]  # (path relative to the root, real path)
    while stack:
        relative, place = stack.pop()
        if relative and not place.endswith("/"):
            yield relative, _file_size(place)
            continue
        if place.rstrip("/") in walked:
            continue
        walked.add(place.rstrip("/"))
        found: list[tuple[str, str]] = []
        for entry in _entries(place):
            below = relative + entry.name
            if _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if not entry.is_symlink() or os.path.commonpath([real, own]) not in (real, own):
                    found.append((below + "/", real.rstrip("/") + "/"))
            elif picture_suffix(entry.name) and (entry.is_symlink() or entry.is_file()):
                found.append((below, entry.path))
            elif is_tar(entry.name):
                tars.append(below)
        stack.extend(reversed(found))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"The folder {place} cannot be read: {error.strerror}.") from error
    return sorted(shown, key=lambda entry: entry.name)


def _file_size(place: str) -> int:
    """Return the size for the fingerprint; -1 for what will be a bad picture when it is read."""
    try:
        return Path(place).stat().st_size
    except OSError:
        return -1


def _label(path: str) -> str | None:
    folder = path.partition("/")[0]
    return folder if folder and folder != path else None


# ---- lists, and several at once ----------------------------------------------------------------


def _open_list(path: Path, cache: Path, cache_bytes: int, key: str) -> Samples:
    """Open a text file of paths, one a line, relative to the folder that the file lies in."""
    lines = read_lines(path)
    once: dict[str, str] = {}
    for line in lines:
        place = os.path.abspath(path.parent / line) if _is_place(line) else line  # noqa: PTH100
        once.setdefault(place, line)
    given = list(once.values())
    if len(given) < len(lines):
        logger.warning(
            "The list %s names %d things more than once: each is in once.",
            path,
            len(lines) - len(given),
        )
    pictures = [line for line in given if picture_suffix(line) and not _scheme(line)]
    others = [line for line in given if not picture_suffix(line) or _scheme(line)]
    lists = [os.path.realpath(path.parent / line) for line in others if line.endswith(".txt")]
    if os.path.realpath(path) in lists:
        raise DataError(f"The list {path} names itself: take that line out.")
    if pictures and others:
        _refuse_listed_twice(path, pictures, others)
    parts: list[Samples] = []
    if pictures:
        parts.append(PictureFiles(path.parent, pictures, str(path)))
    if others:
        sources = [
            line if _scheme(line) or line == SCENES else str(path.parent / line) for line in others
        ]
        parts.append(open_samples(sources, cache=cache, cache_bytes=cache_bytes, key=key))
    if not parts:
        raise DataError(f"The list {path} names nothing: write a path on each line.")
    return parts[0] if len(parts) == 1 else JoinedSamples(parts)


def _is_place(line: str) -> bool:
    return line != SCENES and not _scheme(line)


def _refuse_listed_twice(path: Path, pictures: Sequence[str], others: Sequence[str]) -> None:
    """Raise DataError where a picture of a list lies in a folder that the list names as well."""
    named = {os.path.realpath(path.parent / line): line for line in others if _is_place(line)}
    where = {os.path.dirname(line): line for line in pictures}  # noqa: PTH120 (there are many)
    for folder, picture in where.items():
        real = Path(os.path.realpath(path.parent / folder))
        for above in (real, *real.parents):
            if str(above) in named:
                raise DataError(
                    f"The list {path} names {picture}, which lies in {named[str(above)]}, which it "
                    "names as well: its pictures would be there twice. Name one of the two."
                )


class JoinedSamples:
    """Several data sets as one: the shards of the first, then those of the next.

    Single pictures beside shards are grouped into shards as large as these are. As shards of one,
    a window of the shuffle would hold one real shard and a few pictures, and batches were of that
    shard alone.
    """

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        others = [p.shard_sizes for p in self.parts if not isinstance(p, PictureFiles)]
        size = int(np.median(np.concatenate(others))) if others else 1
        for part in self.parts:
            if isinstance(part, PictureFiles) and size > 1:
                part.group(size)
        self.name = " + ".join(part.name for part in self.parts)
        self.shard_sizes = np.concatenate([part.shard_sizes for part in self.parts])
        self.fingerprint = sha256_text(part.fingerprint for part in self.parts)
        self._ends = np.cumsum([len(part.shard_sizes) for part in self.parts])
        self._length = int(self.shard_sizes.sum())

    def __len__(self) -> int:
        return self._length

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample. Raises DataError as the part does that it lies in."""
        part, own = self._part(shard)
        return self.parts[part].read(own, index)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Tell each part which of its shards come next."""
        wanted: list[list[int]] = [[] for _ in self.parts]
        for shard in shards:
            part, own = self._part(shard)
            wanted[part].append(own)
        for samples, own_shards in zip(self.parts, wanted, strict=True):
            samples.prefetch(own_shards)

    def close(self) -> None:
        """Close every part."""
        for part in self.parts:
            part.close()

    def _part(self, shard: int) -> tuple[int, int]:
        if not 0 <= shard < len(self.shard_sizes):
            raise IndexError(f"there are {len(self.shard_sizes)} shards, not one numbered {shard}")
        part = int(np.searchsorted(self._ends, shard, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        return part, shard - first
