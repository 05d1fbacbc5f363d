"""Files that are there whole or not at all, and files that grow by whole lines.

A reader never sees half of one, also after a kill or a power cut, and a full disk leaves nothing
behind. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".writing"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same folder; sync and rename what is written there, if anything.

    A program may glob for TEMPORARY_SUFFIX to remove what killed ones left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if temporary.exists():
            sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; text in UTF-8. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole or not at all. Raises OSError."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """A file that a run adds lines to, and can do without.

    A line that cannot be written, on a full disk say, is left out whole; that is told once, until
    there is room again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = False

    def add(self, lines: Iterable[str]) -> None:
        """Add lines, each without its end, all of them or none."""
        left = memoryview("".join(f"{line}\n" for line in lines).encode())
        try:
            with self.path.open("ab", buffering=0) as file:
                # Several ranks may write to one file.
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                whole = file.seek(0, os.SEEK_END)
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(whole)
                    raise
        except OSError as error:
            if not self._told:
                tell(self.path, error)
            self._told = True
        else:
            self._told = False


@contextlib.contextmanager
def optional(path: Path) -> Iterator[None]:
    """Let a run go on, with a warning, where a file cannot be written that it can do without."""
    try:
        yield
    except OSError as error:
        tell(path, error)


def tell(path: Path, error: OSError) -> None:
    """Warn that a file could not be written."""
    logger.warning("%s could not be written (%s). Training goes on.", path, error.strerror or error)
