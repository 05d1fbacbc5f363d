"""What a person is told when something is wrong: one sentence, and the exit code of the process.

Every error says what is wrong, where, and what to do. Only a run.py turns one into an exit.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Of a file that is out of reach for now: a network file system, or this machine, is at its limits.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN",
        "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN", "ESHUTDOWN", "EMFILE", "ENFILE", "ENOMEM",
        "ENOSPC", "EDQUOT",
    )
    if hasattr(errno, name)
)  # fmt: skip


class GroundworkError(Exception):
    """An error whose text is meant for a person; shown without a traceback."""

    exit_code = 1


class UsageError(GroundworkError):
    """A mistake in a command or a recipe, found before data, device or model is touched."""

    exit_code = 2


class DataError(GroundworkError):
    """Pictures, shards or labels that cannot be used."""

    exit_code = 3


class UnavailableError(DataError):
    """Data that cannot be reached now: no fault of the picture, which may be read later."""


def not_read(error: OSError, sentence: str, folder: Path | None = None) -> DataError:
    """Return the error for a file that could not be read: its own fault, or one that passes.

    `folder` is that of the whole set: where it is gone or empty as well, the file is not to blame.
    """
    passing = error.errno in _PASSING or (
        error.errno in (errno.ENOENT, errno.EIO) and folder is not None and _gone(folder)
    )
    return (UnavailableError if passing else DataError)(sentence)


def _gone(folder: Path) -> bool:
    """Tell whether a folder cannot be listed, or is empty, as where a disk is not mounted."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


class CheckpointError(GroundworkError):
    """A checkpoint or weights file that is missing, damaged or of another shape."""

    exit_code = 4


class DivergedError(GroundworkError):
    """Training that produced non-finite gradients for too long, or features that collapsed."""

    exit_code = 5


class StoppedError(GroundworkError):
    """Training that was asked to stop and saved a checkpoint first (EX_TEMPFAIL)."""

    exit_code = 75
