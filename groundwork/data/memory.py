"""What was worked out of pictures once, kept on the disk of this machine.

A task may want something of a picture that takes longer than a view and is the same in each: its
regions, say. Every data worker of every run asks here first, so that it is worked out once a
picture and not once a view, however many workers, epochs and runs there are.

Why SQLite: readers and writers of many processes in one file, none of which sees half a value, and
nothing is lost to a killed process. It wants a disk of this machine, so the file has the machine's
name: nodes that share a home do not share it. What the file cannot give (a full disk, a damaged
file, a lock that is not let go) is worked out again, and told once.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_WAIT = 2.0  # seconds for another process's lock
_TABLE = "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"


class Memory:
    """Bytes by key, in one file of a cache folder. Each process opens it at its first call."""

    def __init__(self, cache: Path) -> None:
        machine = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "machine"
        self.file = cache / f"pictures-{machine}.sqlite"
        self._opened: sqlite3.Connection | None = None
        self._process = 0  # that opened it
        self._failed = False  # told already

    def get(self, key: bytes) -> bytes | None:
        """Return what is kept of a key, or None."""
        row = self._execute("SELECT value FROM kept WHERE key = ?", key)
        return None if row is None else bytes(row[0])

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value."""
        self._execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", key, value)

    def remembered(self, key: bytes, work: Callable[[], bytes]) -> bytes:
        """Return what is kept of a key; where nothing is, do the work and keep what it gives."""
        kept = self.get(key)
        if kept is None:
            kept = work()
            self.put(key, kept)
        return kept

    def close(self) -> None:
        """Close the file, as is necessary before a fork; the next call opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _execute(self, statement: str, *values: bytes) -> Any:
        """Return the first row; None where there is none, or the file does not give it."""
        if self._opened is not None and self._process != os.getpid():
            # SQLite's locks would not be this process's, and writes could be lost.
            raise RuntimeError(f"{self.file} went through a fork: close() it before.")
        try:
            if self._opened is None:
                self._opened, self._process = self._open(), os.getpid()
            return self._opened.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as error:
            if not self._failed:
                logger.warning(
                    "%s cannot be used (%s): what it would keep is worked out anew, which takes "
                    "time. Free the disk, delete the file, or set data.cache.", self.file, error,
                )  # fmt: skip
            self._failed = True
            return None

    def _open(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.file, timeout=_WAIT, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(_TABLE)
        return connection

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is spawned opens it for itself."""
        return {**self.__dict__, "_opened": None}
