"""What was worked out of pictures once, kept on the disk of this machine.

A task may want something of a picture that takes longer than a view and is the same in each: its
regions, say. Every data worker of every run asks here first, so that it is worked out once a
picture and not once a view, however many workers, epochs and runs there are.

Why SQLite: readers and writers of many processes in one file, none of which sees half a value, and
nothing is lost to a killed process. It wants a disk of this machine, so the file has the machine's
name: nodes that share a home do not share it. What the file cannot give (a full disk, a damaged
file, a lock that is not let go) is worked out again.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sqlite3
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_WAIT = 10.0  # seconds for another process's lock
_TABLE = "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"


class Memory:
    """Bytes by key, in one file of a cache folder. Each process opens it at its first call."""

    def __init__(self, cache: Path) -> None:
        machine = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "machine"
        self.file = cache / f"pictures-{machine}.sqlite"
        self._opened: tuple[int, sqlite3.Connection | None] | None = None  # by which process
        self._inherited: list[Any] = []  # a parent's: closing it here could cut off the parent

    def get(self, key: bytes) -> bytes | None:
        """Return what is kept of a key, or None."""
        try:
            connection = self._connection()
            if connection is None:
                return None
            row = connection.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return None if row is None else bytes(row[0])

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value."""
        try:
            connection = self._connection()
            if connection is not None:
                connection.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, value))
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Close this process's connection; the next call opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid() and opened[1] is not None:
            opened[1].close()

    def _connection(self) -> sqlite3.Connection | None:
        # A connection must not go through a fork: the child opens one of its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self._inherited.append(self._opened)
            self._opened = os.getpid(), self._open()
        return self._opened[1]

    def _open(self) -> sqlite3.Connection:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise sqlite3.OperationalError(str(error)) from error
        connection = sqlite3.connect(self.file, timeout=_WAIT, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(_TABLE)
        return connection

    def _give_up(self, error: sqlite3.Error) -> None:
        """Do without the file in this process from now on."""
        self._opened = os.getpid(), None
        logger.warning(
            "%s cannot be used (%s): what it would keep is worked out at every view. Free the "
            "disk, delete the file, or set data.cache.", self.file, error,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is spawned opens it for itself."""
        return {"file": self.file, "_opened": None, "_inherited": []}
