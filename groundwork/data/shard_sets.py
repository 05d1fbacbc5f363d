"""Which shards a person means: a folder, a pattern, tars, of ours or anybody's, all told apart.

What: `open_shards` turns what is named into the sets of shards that there are. Why here: nothing
that lies beside them may be passed over in silence, and a set of ours that lost its index may not
pass for a smaller one of somebody else's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from groundwork.data.folders import walk
from groundwork.data.foreign_shards import index_foreign
from groundwork.data.shard_index import (
    INDEX_NAME,
    SAMPLES_SUFFIX,
    SetIndex,
    is_set_index,
    sha256_text,
)
from groundwork.data.shards import ShardSamples, ShardSet, expand_braces, verify_command
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import DataError

logger = logging.getLogger(__name__)

UNFINISHED_NAME = ".pack.json"


def open_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], index_cache: Path
) -> ShardSamples:
    """Open tar shards: a folder, a glob, a brace pattern (`{000..127}`), a tar, or a list of these.

    `index_cache` is where the index of someone else's shards goes if their own folder cannot be
    written to. A glob is sorted; a list keeps its order. Raises DataError when there is nothing,
    when a shard is missing or named twice, and for a folder whose packing was not finished.
    """
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    name = " ".join(os.fspath(item) for item in given)
    known: dict[str, bool] = {}
    sets = [part for item in given for part in _open_item(os.fspath(item), index_cache, known)]
    if not any(part.index.pictures[part.rows].any() for part in sets):
        raise DataError(f"There are no pictures in the shards {name!r}.")
    if len(given) > 1 or any(mark in name for mark in "*?[{"):
        tars = [
            (folder, part.index.names[row])
            for part in sets
            for folder in [part.folder.resolve()]
            for row in part.rows.tolist()
        ]
        if len(set(tars)) != len(tars):
            raise DataError(
                f"The shards {name!r} name the same tar file twice: name each of them once."
            )
    return ShardSamples(name, sets)


def _open_item(item: str, index_cache: Path, known: dict[str, bool]) -> list[ShardSet]:
    """Open one folder, pattern or tar: one set for each folder of ours that shards lie in.

    `known` remembers which folders are ours.
    """
    if item.startswith("pipe:"):
        raise DataError(f"Shards that are commands are not run: {item!r}. Name files instead.")
    path = Path(item)
    deeper: list[ShardSet] = []
    if path.is_dir():
        if is_set_index(path / INDEX_NAME):
            return [_open_own(path, None)]
        whole, tars = _in_folder(path)
    else:
        whole, tars = [], _expanded(item)
        for odd in [name for name in tars if not name.endswith(".tar")]:
            if picture_suffix(odd):
                raise DataError(
                    f"{item!r} matches {odd}, which is a picture and no tar: name pictures by "
                    "their folder, or by a list (.txt)."
                )
            if Path(odd).is_dir():
                tars.remove(odd)
                deeper += _open_item(odd, index_cache, known)
        if deeper and not tars:
            return deeper
    if not tars and not whole:
        raise DataError(f"No shard found: {item!r} is, or matches, no tar file.")
    # Text, not paths, which would take seconds for 100,000 shards.
    names: dict[str, list[str]] = {}
    for tar in tars:
        folder, _, name = tar.rpartition("/")
        names.setdefault(folder or ("/" if tar.startswith("/") else "."), []).append(name)
    for folder in names.keys() - known.keys():
        known[folder] = _is_own(Path(folder))
    own = [folder for folder in names if known[folder]]
    sets = [_open_own(folder, None) for folder in whole]
    sets += [_open_own(Path(folder), names.pop(folder)) for folder in own]
    foreign = [Path(folder) / name for folder in names for name in names[folder]]
    if foreign:
        root, home = index_foreign(foreign, index_cache)
        index = read_set_index(home / INDEX_NAME)
        sets.append(ShardSet(root, home, index, np.arange(len(index)), index.fingerprint()))
    return deeper + sets


def _in_folder(path: Path) -> tuple[list[Path], list[str]]:
    """Find the sets of ours below a folder that is none itself, and all other tars."""
    places = list(walk(path))
    whole = [Path(place) for place, _ in places if is_set_index(Path(place, INDEX_NAME))]
    inside = {str(place) for place in whole}
    others = [(place, name) for place, names in places if place not in inside for name in names]
    tars = [os.path.join(*one) for one in others if is_tar(one[1])]  # noqa: PTH118
    pictures = [one for one in others if picture_suffix(one[1])]
    if pictures and (tars or whole):
        top, names = places[0]
        shown = os.path.join(*pictures[0])  # noqa: PTH118
        # A set with previews in folders of their own is a set; all else may mean either.
        if pictures[0][0] == top or not any(map(is_tar, names)):
            raise mixed(path, shown, tars[0] if tars else str(whole[0] / INDEX_NAME))
        _passed_over(path, shown)
    return whole, tars


def is_tar(name: str) -> bool:
    """Tell whether a file's name is that of a tar; those that begin with a dot are passed over."""
    return name.endswith(".tar") and not name.startswith(".")


def mixed(where: Path, picture: str, tar: str) -> DataError:
    """Return the error for a folder in which pictures lie as well as shards."""
    return DataError(
        f"{where} holds pictures ({picture}) as well as tar shards ({tar}): put them into folders "
        "of their own, and name one of these, or both."
    )


def _passed_over(folder: Path, picture: str) -> None:
    logger.warning("%s holds shards; pictures that lie there are passed over: %s.", folder, picture)


def _tars_of_a_set(folder: Path) -> set[str]:
    """Return the names of the tars beside an index.json of ours.

    Warns of a picture that lies there, or below, and is passed over; raises DataError for more
    shards below, which index.json does not name.
    """
    present: set[str] = set()
    below: list[str] = []
    pictures: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_tar(entry.name):
                present.add(entry.name)
            elif picture_suffix(entry.name):
                pictures.append(entry.path)
            elif not entry.name.endswith(".json") and entry.name[0] != "." and entry.is_dir():
                below.append(entry.path)
    for one in sorted(below):
        try:
            found = list(walk(one))
        except DataError:  # not ours to read: lost+found
            continue
        for place, names in found:
            tar = next(filter(is_tar, names), None)
            if tar is not None:
                raise DataError(
                    f"{folder} is a set of shards, and {place} in it holds more ({tar}), which its "
                    "index.json does not name: put that into a folder of its own, and name both."
                )
            pictures += [f"{place}/{name}" for name in names if picture_suffix(name)]
    if pictures:
        _passed_over(folder, min(pictures))
    return present


def _expanded(pattern: str) -> list[str]:
    """Expand braces and wildcards; a file that really has such a name goes first."""
    if Path(pattern).exists():
        return [pattern]
    found: list[str] = []
    for name in expand_braces(pattern):
        if any(mark in name for mark in "*?["):
            anchor = Path(name).anchor
            matches = Path(anchor or ".").glob(str(Path(name).relative_to(anchor)))
            hidden = Path(name).name.startswith(".")
            found.extend(sorted(str(one) for one in matches if hidden or one.name[:1] != "."))
        elif name != pattern:  # whether it exists shows when its folder is looked at
            found.append(name)
    return found


def _is_own(folder: Path) -> bool:
    if is_set_index(folder / INDEX_NAME):
        return True
    if (folder / UNFINISHED_NAME).exists():
        raise DataError(
            f"The packing of {folder} was not finished: run the same `python -m pretrain.pack` "
            "command again, and it goes on where it stopped."
        )
    if next(folder.glob(f"*{SAMPLES_SUFFIX}"), None) is not None:
        raise DataError(
            f"The shards of {folder} were packed here, and their {INDEX_NAME} is not there or "
            f"damaged: copy it again; see `{verify_command(folder)}`. (Without the files "
            f"*{SAMPLES_SUFFIX} they are read as anybody's tars, as many as there are.)"
        )
    return False


def _open_own(folder: Path, chosen: list[str] | None) -> ShardSet:
    """Open shards of ours: the whole folder, or the chosen ones in their order."""
    index = read_set_index(folder / INDEX_NAME)
    if chosen is None:
        present = _tars_of_a_set(folder)
    else:
        present = {entry.name for entry in os.scandir(folder)}
    advice = f"see `{verify_command(folder)}`"
    if chosen is None:
        rows = list(range(len(index)))
        extra = present - set(index.names)
        if extra:
            raise DataError(
                f"The folder {folder} has tar files that its index.json does not name, the first "
                f"of {len(extra)} being {min(extra)}: move them away; {advice}."
            )
    else:
        numbers = {name: row for row, name in enumerate(index.names)}
        unknown = [name for name in chosen if name not in numbers]
        if unknown:
            raise DataError(
                f"The shard {folder / unknown[0]} is not in its folder's index.json: {advice}."
            )
        rows = [numbers[name] for name in chosen]
    missing = [index.names[row] for row in rows if index.names[row] not in present]
    if missing:
        raise DataError(
            f"The folder {folder} lacks {len(missing)} shards that its index.json names, the first "
            f"being {missing[0]}: copy them again; {advice}."
        )
    fingerprint = index.fingerprint()
    if rows != list(range(len(index))):
        fingerprint = sha256_text([fingerprint, *rows])
    return ShardSet(folder, folder, index, np.array(rows, dtype=np.int64), fingerprint)


def read_set_index(path: Path) -> SetIndex:
    """Read an index.json. Raises DataError."""
    try:
        return SetIndex.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"The index {path} cannot be read: {error.strerror}.") from error
