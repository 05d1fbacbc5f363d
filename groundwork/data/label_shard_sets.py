"""Which labeled shards a person means, their splits, and their classes.

What: `find_shards` tells whether shards are meant, and where those of each split are: splits are
folders of shards called train, val and test, and the drawn scenes have them too.
`open_shard_labels` opens them (groundwork.data.label_shards).

Every class's name is in index.json of shards of ours. In shards of others the members are read
through once, when they are opened, and their names put together; a number that no box has is called
class_0 and so on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from groundwork.data.folders import walk
from groundwork.data.label_roots import find_root
from groundwork.data.label_shards import ShardLabels, read_document, unlabeled
from groundwork.data.label_table import MOST_CLASSES, SPLIT_WORDS, SPLITS, HeldOut, choose
from groundwork.data.remote import is_remote, open_remote
from groundwork.data.remote_samples import RemoteSamples
from groundwork.data.scenes import CLASSES, open_scenes
from groundwork.data.shard_index import INDEX_NAME, is_set_index
from groundwork.data.shard_sets import is_tar, open_shards
from groundwork.data.shards import ShardSamples
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import DataError

logger = logging.getLogger(__name__)

SCENES = "scenes"
# Of the drawn scenes, in sixteenths: train has the first 14, val one, test one.
_SCENE_PARTS = {"train": (0, 14), "val": (14, 15), "test": (15, 16)}


def find_shards(data: str) -> Mapping[str | None, str] | None:
    """Return the shards that a person names, by split (None: not split); None: no shards."""
    if data == SCENES:
        return dict.fromkeys(_SCENE_PARTS, data)
    if is_remote(data):
        return {None: data}
    path = Path(data)
    if path.is_dir():
        if _has_shards(path):
            return None if _labels_lie_beside(path) else {None: data}
        return _splits_below(path) or None
    pattern = not path.exists() and any(mark in data for mark in "*?[{")
    return {None: data} if data.endswith(".tar") or pattern else None


def _splits_below(folder: Path) -> dict[str | None, str]:
    """Find folders of shards that are splits by their names, in the order of SPLITS."""
    found: dict[str, Path] = {}
    for word, split in SPLIT_WORDS.items():
        path = folder / word
        if not _has_shards(path):
            continue
        if split in found:
            raise DataError(
                f"{folder} has two folders of shards for {split}, {found[split].name} and "
                f"{path.name}: name one of them, or put both into one folder."
            )
        found[split] = path
    return {split: str(found[split]) for split in SPLITS if split in found}


def _has_shards(folder: Path) -> bool:
    return folder.is_dir() and (is_set_index(folder / INDEX_NAME) or _tar_in(folder) is not None)


def _tar_in(folder: Path) -> str | None:
    return next((path.name for path in folder.glob("*.tar") if is_tar(path.name)), None)


def _labels_lie_beside(folder: Path) -> bool:
    """Tell whether a tar is what a labeled set came in, which lies unpacked beside it."""
    if is_set_index(folder / INDEX_NAME):
        return False
    if not any(picture_suffix(name) for _, names in walk(folder) for name in names):
        return False
    try:
        find_root(str(folder))
    except DataError:
        return False
    _tell_of_tar(folder)
    return True


@cache
def _tell_of_tar(folder: Path) -> None:
    logger.warning(
        "%s has labels in files as well as %s: the files are read, and the tar is not.",
        folder,
        _tar_in(folder),
    )


def open_shard_labels(
    data: str,
    found: Mapping[str | None, str],
    split: str | None,
    *,
    cache: Path,
    cache_bytes: int,
    names_in: Path | None,
    held_out: HeldOut | None,
) -> tuple[ShardLabels, tuple[str, ...]]:
    """Open what `find_shards` found; also return the classes.

    Raises DataError for shards without labels, and for names that do not agree.
    """
    name = data if split is None or None in found else f"{data} ({split})"
    chooser = None if names_in is None and held_out is None else partial(choose, names_in, held_out)
    if data == SCENES:
        scenes = open_scenes(cache)
        first, end = _SCENE_PARTS[split] if split is not None else (0, 16)
        numbers = np.arange(len(scenes) * first // 16, len(scenes) * end // 16)
        return _some(name, scenes, CLASSES, numbers, chooser), CLASSES
    opened = {key: _open(shards, cache, cache_bytes) for key, shards in found.items()}
    known: dict[int, str] = {}
    digests = []
    for part in opened.values():
        digests.append(_learn_names(part, known))
    names = tuple(
        known.get(number, f"class_{number}") for number in range(max(known, default=0) + 1)
    )
    if None in opened or split is not None:
        shards = opened[None if None in opened else split]
    else:
        shards = open_shards(list(found.values()), cache)
    return _some(name, shards, names, None, chooser, "".join(digests)), names


def _open(shards: str, cache: Path, cache_bytes: int) -> ShardSamples | RemoteSamples:
    if is_remote(shards):
        return open_remote([shards], cache=cache, cache_bytes=cache_bytes)
    return open_shards(shards, cache)


def _some(
    name: str,
    shards: ShardSamples | RemoteSamples,
    names: tuple[str, ...],
    numbers: npt.NDArray[np.int64] | None,
    chooser: Callable[[Sequence[str]], list[int]] | None,
    digest: str = "",
) -> ShardLabels:
    """Keep the samples of these numbers, counted through all shards; of them those chosen."""
    if numbers is None and chooser is None:
        return ShardLabels(name, shards, names, None, digest)
    ends = np.cumsum(shards.shard_sizes)
    if numbers is None:
        numbers = np.arange(len(shards))
    if chooser is not None:
        paths = [path for shard in range(len(ends)) for path in shards.samples(shard).paths]
        numbers = numbers[chooser([paths[number] for number in numbers.tolist()])]
    owners = np.searchsorted(ends, numbers, side="right")
    places = numbers - (ends - shards.shard_sizes)[owners]
    chosen = [places[owners == shard] for shard in range(len(ends))]
    return ShardLabels(name, shards, names, chosen, digest)


def _learn_names(shards: ShardSamples | RemoteSamples, known: dict[int, str]) -> str:
    """Add the classes of these shards to those known; return a hash of labels that were read.

    Raises DataError for shards without labels, and for a number that has two names.
    """
    if isinstance(shards, ShardSamples):
        kept = [part.index.classes for part in shards.sets]
    else:
        kept = [shards.classes()]
    for classes in kept:
        for number, name in enumerate(classes):
            _agree(known, number, name, shards.name)
    whole = not all(kept)
    digest = hashlib.sha256()
    if not whole and not isinstance(shards, ShardSamples):
        return ""  # what is wrong with a remote shard shows when it is fetched
    for shard, size in enumerate(shards.shard_sizes.tolist()):
        samples = shards.samples(shard)
        # Of shards of ours, which were checked when they were packed, the first of each is read.
        for index in range(size if whole else min(size, 1)):
            content = shards.read_json(shard, index)
            if content is None:
                raise unlabeled(f"{shards.name} ({samples.paths[index]})", samples.keys[index])
            digest.update(content)
            document = read_document(content, f"{shards.name} ({samples.keys[index]}.json)")
            names = document.get("names") or [None] * len(document["classes"])
            for number, name in zip(document["classes"], names, strict=True):
                if not 0 <= number < (MOST_CLASSES if whole else len(known)):
                    raise DataError(
                        f"{shards.name}: {samples.keys[index]}.json has a box of the class "
                        f"{number}, which there is not: write the shard again."
                    )
                _agree(known, number, name or known.get(number, f"class_{number}"), shards.name)
    return digest.hexdigest()


def _agree(known: dict[int, str], number: int, name: str, where: str) -> None:
    if known.setdefault(number, name) != name:
        raise DataError(
            f"The class {number} is {known[number]!r} and, in {where}, {name!r}: pack all splits "
            "with the same labels."
        )
