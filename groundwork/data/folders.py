"""A folder and those below it, each once, links to folders followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from groundwork.errors import DataError


def walk(root: str | os.PathLike[str], *, hidden: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its files, sorted; `hidden`: those with a first dot, too.

    No folder is read twice, by whatever links it is reached, so a circle of links has an end.
    Raises DataError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"The folder {error.filename} cannot be read: {error.strerror}.")

    walked: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        yield place, sorted(name for name in files if hidden or not name.startswith("."))


def files_below(root: Path, suffix: str) -> list[str]:
    """Return the paths of the files whose names end so, sorted."""
    return sorted(
        f"{place.rstrip('/')}/{name}" for place, names in walk(root) for name in names
        if name.endswith(suffix)
    )  # fmt: skip
