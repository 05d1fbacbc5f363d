"""What lies where in a set of shards: one small index for the set, one for each shard.

What: `SetIndex` (index.json: every shard's name, number of pictures, bytes and sha256) is all that
is read at the start; `SampleIndex` (beside each tar: every sample's key, offset and size) is read
when a sample of that shard is asked for. Both are JSON by columns, which parses quickly (100,000
shards in well under a second), can be looked at, and runs nothing.

For shards that someone else's webdataset wrote, `index_shard` makes the same index from the
headers alone, by webdataset's own rule: a key is everything up to the first dot of the base name,
and neighbouring members of one key are a sample.

A `.json` member beside a picture (its boxes, see groundwork.data.label_shards) has its place in two
further columns, so that it is read without a scan too. They are left out where a shard has none,
and indices from before they existed are read as having none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from groundwork.data.tar_format import Member, picture_suffix, scan
from groundwork.errors import DataError

INDEX_NAME = "index.json"
VERSION = 1
_SET_FORMAT = "groundwork-shards"
_SAMPLES_FORMAT = "groundwork-samples"
_MAX_LABEL_BYTES = 4096
# Extensions of what belongs to a picture; alone, the picture has been lost.
_COMPANIONS = frozenset(("json", "txt", "cls", "xml"))
_PICKLES = frozenset(("pkl", "pickle", "pyd"))

Value = TypeVar("Value")


def sha256_bytes(content: bytes) -> str:
    """Hash bytes; hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_text(parts: Iterable[object]) -> str:
    """Hash a sequence, each element on a line of its own."""
    text = "\n".join([part if isinstance(part, str) else str(part) for part in parts])
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))


def dump(document: dict[str, Any]) -> bytes:
    """Write an index as JSON: ASCII, no spaces, so that equal contents are equal bytes."""
    return json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n"


def _parsed(content: bytes, expected_format: str, what: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:  # bytes that are no UTF-8 included
        raise DataError(
            f"The index {what} is damaged ({error}): copy it again, or pack the pictures again."
        ) from error
    if not isinstance(document, dict) or document.get("format") != expected_format:
        raise DataError(f"The file {what} is not an index of the format {expected_format!r}.")
    if document.get("version") != VERSION:
        raise DataError(
            f"The index {what} has version {document.get('version')!r}, and this program reads "
            f"version {VERSION}: pack the pictures again, or use the program that packed them."
        )
    return document


def _single(document: dict[str, Any], name: str, kind: type[Value], what: str) -> Value:
    value = document.get(name)
    if not isinstance(value, kind):
        raise DataError(f"The index {what} is damaged (field {name!r}): copy it again.")
    return value


def _column(document: dict[str, Any], name: str, kind: type[Value], what: str) -> list[Value]:
    column = document.get(name)
    # The set of types is quicker than a look at each of 100,000 elements.
    if not isinstance(column, list) or not set(map(type, column)) <= {kind}:
        raise DataError(f"The index {what} is damaged (column {name!r}): copy it again.")
    return column


def _numbers(document: dict[str, Any], name: str, what: str) -> npt.NDArray[np.int64]:
    column = _column(document, name, int, what)
    if column and not 0 <= min(column) <= max(column) < 1 << 62:
        raise DataError(f"The index {what} is damaged (column {name!r}): copy it again.")
    return np.array(column, dtype=np.int64)


# ---- one shard ---------------------------------------------------------------------------------


@dataclass(slots=True)
class SampleIndex:
    """The samples of one shard, in file order: where each picture lies, and what it is."""

    keys: list[str]
    paths: list[str]  # as they were before packing; in shards of others, the members' names
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: list[str | None]
    tar_bytes: int = 0
    tar_sha256: str = ""  # empty where only the headers have been read
    plan: str = ""  # hash of what pack was asked to put here
    quarantined: list[list[str]] = field(default_factory=list)  # [path, reason]
    # Where the `.json` member of each picture lies, 0 where it has none; None where none has one.
    json_offsets: npt.NDArray[np.int64] | None = None
    json_sizes: npt.NDArray[np.int64] | None = None
    # Defects of labels that were mended: [path, reason, where].
    mended: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def dump(self) -> bytes:
        """Write as JSON. Keys and labels are left out where the paths say the same, or nothing."""
        document: dict[str, Any] = {
            "format": _SAMPLES_FORMAT,
            "version": VERSION,
            "bytes": self.tar_bytes,
            "sha256": self.tar_sha256,
            "plan": self.plan,
            "quarantined": self.quarantined,
            "paths": self.paths,
            "offsets": self.offsets.tolist(),
            "sizes": self.sizes.tolist(),
        }
        if self.keys != [default_key(path) for path in self.paths]:
            document["keys"] = self.keys
        if any(label is not None for label in self.labels):
            names = sorted({label for label in self.labels if label is not None})
            numbers = {name: number for number, name in enumerate(names)}
            document["classes"] = names
            document["labels"] = [-1 if x is None else numbers[x] for x in self.labels]
        if self.json_offsets is not None and self.json_sizes is not None:
            document["json_offsets"] = self.json_offsets.tolist()
            document["json_sizes"] = self.json_sizes.tolist()
        if self.mended:
            document["mended"] = self.mended
        return dump(document)

    @classmethod
    def parse(cls, content: bytes, what: str) -> SampleIndex:
        """Read what `dump` wrote. Raises DataError, with `what` as its name, for anything else."""
        document = _parsed(content, _SAMPLES_FORMAT, what)
        paths = _column(document, "paths", str, what)
        keys = list(map(default_key, paths))
        if "keys" in document:
            keys = _column(document, "keys", str, what)
        labels: list[str | None] = [None] * len(paths)
        if "labels" in document:
            names = _column(document, "classes", str, what)
            numbers = _column(document, "labels", int, what)
            if numbers and not -1 <= min(numbers) <= max(numbers) < len(names):
                raise DataError(f"The index {what} is damaged (labels): copy it again.")
            labels = [None if number < 0 else names[number] for number in numbers]
        json_offsets, json_sizes = None, None
        if "json_offsets" in document:
            json_offsets = _numbers(document, "json_offsets", what)
            json_sizes = _numbers(document, "json_sizes", what)
        index = cls(
            keys=keys,
            paths=paths,
            offsets=_numbers(document, "offsets", what),
            sizes=_numbers(document, "sizes", what),
            labels=labels,
            tar_bytes=_single(document, "bytes", int, what),
            tar_sha256=_single(document, "sha256", str, what),
            plan=_single(document, "plan", str, what),
            quarantined=_column(document, "quarantined", list, what),
            json_offsets=json_offsets,
            json_sizes=json_sizes,
            mended=_column(document, "mended", list, what) if "mended" in document else [],
        )
        lengths = {len(keys), len(paths), len(index.offsets), len(index.sizes), len(labels)}
        ends = [index.offsets + index.sizes] if len(lengths) == 1 else []
        if json_offsets is not None and json_sizes is not None:
            lengths |= {len(json_offsets), len(json_sizes)}
            ends += [json_offsets + json_sizes] if len(lengths) == 1 else []
        if len(lengths) != 1 or any((end > index.tar_bytes).any() for end in ends):
            raise DataError(f"The index {what} is damaged (columns disagree): copy it again.")
        return index


def json_columns(
    members: Sequence[tuple[int, int] | None],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | tuple[None, None]:
    """Make the columns of the `.json` members' offsets and sizes; None where there is none."""
    if not any(members):
        return None, None
    column = np.array([member or (0, 0) for member in members], dtype=np.int64)
    return column[:, 0], column[:, 1]


def default_key(path: str) -> str:
    """Return a path less its last extension; the whole path where nothing would be left."""
    folder, slash, base = path.rpartition("/")
    stem = base.rpartition(".")[0]
    return path if stem in ("", ".", "..") else folder + slash + stem


# ---- the set -----------------------------------------------------------------------------------


@dataclass(slots=True)
class SetIndex:
    """Every shard of a set, in order. Names are relative to the folder of the set."""

    names: list[str]
    pictures: npt.NDArray[np.int64]
    tar_bytes: npt.NDArray[np.int64]
    sha256: list[str]  # of the tar; empty strings in an index of someone else's shards
    samples_sha256: list[str]  # of the sample index beside it
    plan: str = ""
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """Hash what is in the set and in which order."""
        columns = (self.names, self.sha256, self.samples_sha256, self.classes)
        numbers = (self.pictures.astype("<i8"), self.tar_bytes.astype("<i8"))
        # A hash of hashes: no name can be mistaken for the beginning of the next column.
        return sha256_text(
            [*map(sha256_text, columns), *(sha256_bytes(column.tobytes()) for column in numbers)]
        )

    def dump(self) -> bytes:
        """Write as JSON, with the fingerprint, which betrays a later change."""
        return dump(
            {
                "format": _SET_FORMAT,
                "version": VERSION,
                "fingerprint": self.fingerprint(),
                "plan": self.plan,
                "classes": self.classes,
                "names": self.names,
                "pictures": self.pictures.tolist(),
                "bytes": self.tar_bytes.tolist(),
                "sha256": self.sha256,
                "samples_sha256": self.samples_sha256,
            }
        )

    @classmethod
    def parse(cls, content: bytes, what: str) -> SetIndex:
        """Read what `dump` wrote. Raises DataError, with `what` as its name, for anything else."""
        document = _parsed(content, _SET_FORMAT, what)
        index = cls(
            names=_column(document, "names", str, what),
            pictures=_numbers(document, "pictures", what),
            tar_bytes=_numbers(document, "bytes", what),
            sha256=_column(document, "sha256", str, what),
            samples_sha256=_column(document, "samples_sha256", str, what),
            plan=_single(document, "plan", str, what),
            classes=_column(document, "classes", str, what),
        )
        count = len(index.names)
        columns = (index.pictures, index.tar_bytes, index.sha256, index.samples_sha256)
        if any(len(column) != count for column in columns):
            raise DataError(f"The index {what} is damaged (columns disagree): copy it again.")
        for name in index.names:
            # Shards lie in the folder itself, or below it in an index of someone else's shards.
            if name.startswith("/") or (".." in name and ".." in name.split("/")):
                raise DataError(f"The index {what} names a shard outside its folder: {name!r}.")
        if document.get("fingerprint") != index.fingerprint():
            raise DataError(
                f"The index {what} is damaged (its fingerprint does not fit its contents): copy it "
                "again, or pack the pictures again."
            )
        return index


SAMPLES_SUFFIX = ".samples.json"


def samples_name(shard: str) -> str:
    """Return the name of the sample index beside a shard."""
    return shard.removesuffix(".tar") + SAMPLES_SUFFIX


def is_set_index(path: Path) -> bool:
    """Tell whether a file named index.json is ours: other tools use this name too."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(f'{{"format":"{_SET_FORMAT}"'.encode())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DataError(f"The index {path} cannot be read: {error.strerror}.") from error


# ---- shards of others --------------------------------------------------------------------------


def split_member(name: str) -> tuple[str, str] | None:
    """Split by webdataset's rule into key and extension, at the first dot of the base name.

    None for what webdataset leaves out: base names without a dot or that begin with one, and
    metadata (`__name__`).
    """
    first = name.split("/", 1)[0]
    if len(first) >= 4 and first.startswith("__") and first.endswith("__"):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def index_shard(path: Path, read: Callable[[Member], bytes]) -> tuple[SampleIndex, int]:
    """Index a shard without an index of ours, from its headers; also count members passed over.

    `read` gives the bytes of a small member (a label). Raises DataError for what `scan` refuses,
    for two pictures or two members of one name under one key, for a key that comes back after
    another one, for a companion (json, txt, cls, xml) without its picture, for pickles, and for
    names that lead out of a folder. Each error names the shard and the members.
    """
    seen: dict[str, str] = {}  # key -> its first member
    samples: list[_Found] = []
    group: dict[str, Member] = {}
    key = ""
    passed_over = 0

    def finish() -> int:
        sample = _sample(path, key, group, read) if group else None
        if sample is not None:
            samples.append(sample)
        return len(group) if sample is None else 0

    for member in scan(path):
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise DataError(
                f"The shard {path} has a member that leads out of its folder: {member.name!r}."
            )
        split = split_member(member.name)
        if split is None:
            passed_over += 1
            continue
        if split[0] != key or not group:
            passed_over += finish()
            key, group = split[0], {}
            if key in seen:
                raise DataError(
                    f"The shard {path} has the key {key!r} twice, with other keys between: "
                    f"{seen[key]!r} and {member.name!r}. Write the members of a sample next to "
                    "each other, or pack the pictures again with `python -m pretrain.pack`."
                )
            seen[key] = member.name
        if split[1] in group:
            raise _clash(path, key, group[split[1]], member)
        group[split[1]] = member
    passed_over += finish()
    pictures = [sample.picture for sample in samples]
    json_offsets, json_sizes = json_columns(
        [(found.json.offset, found.json.size) if found.json else None for found in samples]
    )
    return (
        SampleIndex(
            keys=[sample.key for sample in samples],
            paths=[member.name for member in pictures],
            offsets=np.array([member.offset for member in pictures], dtype=np.int64),
            sizes=np.array([member.size for member in pictures], dtype=np.int64),
            labels=[sample.label for sample in samples],
            tar_bytes=path.stat().st_size,
            json_offsets=json_offsets,
            json_sizes=json_sizes,
        ),
        passed_over,
    )


class _Found(NamedTuple):
    """A sample of a shard that is being indexed."""

    key: str
    picture: Member
    label: str | None
    json: Member | None


def _sample(
    path: Path, key: str, group: dict[str, Member], read: Callable[[Member], bytes]
) -> _Found | None:
    pictures = [member for member in group.values() if picture_suffix(member.name)]
    if len(pictures) > 1:
        raise _clash(path, key, *pictures[:2])
    for extension, member in group.items():
        if extension.rpartition(".")[2] in _PICKLES:
            raise DataError(
                f"The shard {path} holds a pickle, {member.name!r}, which runs code when a tool "
                "reads it: write the shard again without it."
            )
    if not pictures:
        lost = next((m for x, m in group.items() if x.rpartition(".")[2] in _COMPANIONS), None)
        if lost is not None:
            raise DataError(
                f"The shard {path} has {lost.name!r} but no picture under its key {key!r}: write "
                "the shard again with the picture, or without this member."
            )
        return None
    label = group.get("cls")
    if label is None:
        return _Found(key, pictures[0], None, group.get("json"))
    if label.size > _MAX_LABEL_BYTES:
        raise DataError(f"The shard {path} has a label of {label.size} bytes: {label.name!r}.")
    text = read(label).decode("utf-8", "replace").strip()
    return _Found(key, pictures[0], text, group.get("json"))


def _clash(path: Path, key: str, first: Member, second: Member) -> DataError:
    return DataError(
        f"The shard {path} has two members under the key {key!r}: {first.name!r} and "
        f"{second.name!r}. Plain webdataset cuts a name at its first dot: pack the pictures again "
        "with `python -m pretrain.pack`, which escapes dots."
    )
