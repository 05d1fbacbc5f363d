"""A folder of fetched shards that never grows beyond a limit, shared by all processes of a machine.

What: an entry is a folder with a tar and its sample index. `fetch` gives an entry, and has it
filled under a temporary name first where it is not there; what has its final name is whole. Locks
(flock, so a killed process holds none) make several workers and ranks fill it once.

Room is made before it is taken: whoever fetches reserves the size by giving the temporary file that
size at once, so the sum of the files' sizes is the truth for every process. The least recently used
entries go first; an entry's time of change says when it was last read. Entries that are wanted soon
carry a time one day ahead: every process sees it, and after a crash it wears off by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from groundwork.errors import DataError

TAR_NAME = "shard.tar"
SAMPLES_NAME = "samples.json"
_AHEAD = 24 * 3600.0  # seconds
_LOCKS = 64  # names share locks: sharing costs a moment's wait, a file for each name would stay
_WAIT = 0.05  # seconds until room is looked for again


class Incoming:
    """An entry that is being filled: `folder` is to receive a tar and a sample index."""

    def __init__(self, folder: Path, reserve: Callable[[Path, dict[str, int]], None]) -> None:
        self.folder = folder
        self.tar = folder / TAR_NAME
        self.samples = folder / SAMPLES_NAME
        self._reserve = reserve

    def reserve(self, **sizes: int) -> None:
        """Make room for `tar` and `samples` of these sizes, in bytes; waits for other fetches."""
        names = {"tar": TAR_NAME, "samples": SAMPLES_NAME}
        self._reserve(self.folder, {names[kind]: size for kind, size in sizes.items()})

    def open_tar(self) -> BinaryIO:
        """Open the tar for writing from its start, without giving up what is reserved."""
        self.tar.touch()
        return self.tar.open("r+b")


class ShardCache:
    """Fetched shards below `folder`, of at most `limit` bytes together."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._entries = folder / "entries"
        self._incoming = folder / "incoming"
        self._locks = folder / "locks"
        self._wanted: set[str] = set()
        try:
            for path in (self._entries, self._incoming, self._locks):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"The cache {folder} cannot be made ({error.strerror}): set data.cache to a folder"
                " that can be written to."
            ) from error

    def open(self, key: str) -> int | None:
        """Return a descriptor of the entry's tar, and note that it was used; None if not there."""
        entry = self._entries / key
        try:
            descriptor = os.open(entry / TAR_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        now = time.time()
        with contextlib.suppress(FileNotFoundError):  # evicted a moment ago; still readable
            if entry.stat().st_mtime < now - 1:
                os.utime(entry, (now, now))
        return descriptor

    def samples(self, key: str) -> bytes | None:
        """Return the entry's sample index; None if it is not there."""
        try:
            return (self._entries / key / SAMPLES_NAME).read_bytes()
        except FileNotFoundError:
            return None

    def fetch(self, key: str, fill: Callable[[Incoming], None]) -> tuple[int, bytes]:
        """Return a descriptor of the tar and its sample index, filled now if need be, by one."""
        with self.lock(key):
            descriptor = self.open(key)
            samples = self.samples(key)
            if descriptor is not None and samples is not None:
                return descriptor, samples
            if descriptor is not None:
                os.close(descriptor)
            with self._new_folder() as folder:
                incoming = Incoming(folder, self._reserve)
                fill(incoming)
                samples = incoming.samples.read_bytes()
                descriptor = os.open(incoming.tar, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self._mark(folder, ahead=key in self._wanted)
                    # Half an entry, as a cleaner of old files leaves it.
                    shutil.rmtree(self._entries / key, ignore_errors=True)
                    folder.rename(self._entries / key)
                except OSError:
                    os.close(descriptor)
                    raise
            # From the descriptor it can be read even if others need its room at once.
            return descriptor, samples

    def want(self, keys: Sequence[str]) -> None:
        """Let these entries go last, and those of the call before like any other."""
        before, self._wanted = self._wanted, set(keys)
        for key in before - self._wanted:
            self._mark(self._entries / key, ahead=False)
        for key in reversed(keys):  # the one that comes first goes last of all
            self._mark(self._entries / key, ahead=True)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a key, against other threads and processes."""
        number = zlib.crc32(os.fsencode(key)) % _LOCKS
        with locked(self._locks / f"{number:02d}"):
            yield

    def _mark(self, entry: Path, *, ahead: bool) -> None:
        moment = time.time() + (_AHEAD if ahead else 0.0)
        with contextlib.suppress(FileNotFoundError):
            os.utime(entry, (moment, moment))

    @contextlib.contextmanager
    def _new_folder(self) -> Iterator[Path]:
        """Make a temporary folder, held by a lock so that nobody takes it for a dead one's."""
        with locked(self._locks / "room"):
            folder = Path(tempfile.mkdtemp(dir=self._incoming))
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # renamed by now, if all went well
            # By name, and not by closing: a process forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _reserve(self, folder: Path, sizes: dict[str, int]) -> None:
        wanted = sum(sizes.values())
        if wanted > self.limit:
            raise DataError(
                f"One shard has {wanted} bytes, more than data.cache_gb={self.limit / 1e9:g}: raise"
                " it to at least four times a shard, or pack smaller shards."
            )
        while True:
            with locked(self._locks / "room"):
                # Its own earlier attempt does not count: it is overwritten.
                own = _size_of(folder)
                if self._make_room(wanted - own):
                    for name, size in sizes.items():
                        with (folder / name).open("ab") as file:
                            file.truncate(size)
                    return
            time.sleep(_WAIT)  # others are fetching; what they have fetched can go

    def _make_room(self, wanted: int) -> bool:
        """Evict until `wanted` more bytes fit; say whether they do."""
        self._sweep()
        used = sum(map(_size_of, self._incoming.iterdir()))
        found = sorted(
            (entry.stat().st_mtime, entry.name, _size_of(entry))
            for entry in self._entries.iterdir()
        )
        used += sum(size for _, _, size in found)
        for _, name, size in found:
            if used + wanted <= self.limit:
                break
            # Renamed first: no reader ever finds half an entry.
            gone = Path(tempfile.mkdtemp(dir=self._incoming)) / name
            (self._entries / name).rename(gone)
            shutil.rmtree(gone.parent, ignore_errors=True)
            used -= size
        return used + wanted <= self.limit

    def _sweep(self) -> None:
        """Remove what killed processes left half done."""
        for folder in self._incoming.iterdir():
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # whole by now, and renamed
                continue
            try:
                with contextlib.suppress(BlockingIOError):  # somebody is filling it
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the flock of a file.

    The descriptor is a new one each time, so that threads exclude each other too.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # By name, and not by closing: a process forked meanwhile has the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; one that goes meanwhile has none."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
