"""Text files that list paths or names, one a line, as people and other tools write them."""

from __future__ import annotations

from pathlib import Path

from groundwork.errors import DataError


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list that are not blank, without their ends.

    What Windows' tools write is no part of a name: a byte-order mark, and a carriage return before
    the end of a line. Bytes that are no UTF-8 are kept (surrogateescape). Raises DataError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"The list {path} cannot be read: {error.strerror}.") from error
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
