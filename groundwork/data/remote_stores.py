"""Files far away, one whole file at a time: http(s), and through fsspec s3, gs and others.

What: a `Store` opens one file of a remote folder; `fetch` and `read` take it whole and try again
after a transport error. Which errors are worth another attempt is decided here and nowhere else:
no answer, a broken or cut connection, a server's own failure (5xx, 408, 429) are; an answer that
says no (403, 404) is not.

http is read with the standard library: nothing to install, and nothing that a fork breaks (fsspec's
reader keeps a thread with an event loop). Everything else needs fsspec and its own package, and
takes its settings from the environment as usual (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from groundwork.errors import DataError, UnavailableError, UsageError

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts
_SILENCE = 30.0  # seconds without a byte after which a connection counts as broken
_CHUNK = 1 << 20
_BLOCK = 8 << 20  # one request of an object store
# Answered, and for good: the class of the error says so wherever it comes from.
_REFUSALS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_REFUSING_WORDS = ("Credential", "Validation", "NoRegion", "Token", "Profile")

Result = TypeVar("Result")


class RemoteError(Exception):
    """What one attempt failed with, and whether another one makes sense."""

    def __init__(self, reason: str, *, transport: bool, missing: bool = False) -> None:
        super().__init__(reason)
        self.transport = transport
        self.missing = missing


class Stopped(Exception):
    """The fetch was told to stop."""


class Reader(Protocol):
    """What a store opens."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        ...


class Store(Protocol):
    """One remote folder. Picklable, and usable in a forked process."""

    base: str  # the folder's URL, ending in a slash

    def open(self, name: str) -> Any:
        """Return a context manager that gives (reader, size in bytes or None).

        It raises RemoteError, and so does the reader where it can tell.
        """

    def list_tars(self, pattern: str) -> list[str] | None:
        """Return the sorted names that match; None where the store cannot list."""

    def name_of(self, tail: str) -> str:
        """Turn the end of a URL, behind the base, into a name."""


def open_store(base: str) -> Store:
    """Return the store of a folder's URL. Raises UsageError where a package is missing."""
    base = base.rstrip("/") + "/"
    if urllib.parse.urlsplit(base).scheme.lower() in ("http", "https"):
        return HttpStore(base)
    store = FsspecStore(base)
    store.filesystem()  # now, and not in the first worker
    return store


class HttpStore:
    """A folder on a web server."""

    def __init__(self, base: str) -> None:
        self.base = base

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Reader, int | None]]:
        """Open a file for reading; the connection is closed at the end."""
        # What a person wrote stays as it is, spaces and letters of other scripts apart.
        url = urllib.parse.quote(self.base, safe=":/%?&=@+,;~!$'()*[]") + urllib.parse.quote(name)
        try:
            with urllib.request.urlopen(url, timeout=_SILENCE) as response:
                yield response, response.length
        except urllib.error.HTTPError as error:
            error.close()
            transport = error.code >= 500 or error.code in (408, 429)
            raise RemoteError(
                f"the server answers {error.code} {error.reason}",
                transport=transport,
                missing=error.code in (403, 404, 410),
            ) from error
        except urllib.error.URLError as error:
            trusted = not isinstance(error.reason, ssl.SSLCertVerificationError)
            raise RemoteError(f"no answer ({error.reason})", transport=trusted) from error
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(_told(error), transport=True) from error

    def list_tars(self, pattern: str) -> list[str] | None:
        """Return None: a web server has no list of its files that could be relied upon."""
        return None

    def name_of(self, tail: str) -> str:
        """Undo the percent signs."""
        return urllib.parse.unquote(tail)


class FsspecStore:
    """A folder of an object store, or of anything else that fsspec reads."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._opened: tuple[int, Any] | None = None  # (process, file system)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "_opened": None}

    def filesystem(self) -> Any:
        """Return this process's own file system: fsspec's must not cross a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            scheme = urllib.parse.urlsplit(self.base).scheme.lower()
            wanted = "gcsfs" if scheme in ("gs", "gcs") else "fsspec aiohttp s3fs"
            try:
                import fsspec  # an extra: most data lies here or behind http

                made = fsspec.filesystem(scheme)
            except ImportError as error:
                raise UsageError(
                    f"Reading {self.base} needs a package that is not installed ({error}):"
                    f" pip install {wanted}"
                ) from error
            self._opened = (os.getpid(), made)
        return self._opened[1]

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Reader, int | None]]:
        """Open a file for reading, in requests of some megabytes."""
        with self._translated():
            file = self.filesystem().open(
                self.base + name, "rb", block_size=_BLOCK, cache_type="readahead"
            )
            with file:
                yield file, file.size

    def list_tars(self, pattern: str) -> list[str] | None:
        """Return the names below the base that match a glob pattern."""
        with self._translated():
            filesystem = self.filesystem()
            root = filesystem._strip_protocol(self.base).rstrip("/") + "/"
            found = filesystem.glob(self.base + pattern)
            return sorted(path.removeprefix(root) for path in found)

    def name_of(self, tail: str) -> str:
        """Return the name as it is: keys of object stores are written plainly."""
        return tail

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DataError, UsageError, RemoteError, Stopped):
            raise
        except _REFUSALS as error:
            raise RemoteError(_told(error), transport=False, missing=True) from error
        except Exception as error:
            # Object stores' own classes (botocore, aiohttp) have no ancestor but Exception.
            library = type(error).__module__.partition(".")[0]
            if not isinstance(error, OSError) and library not in ("botocore", "aiohttp", "gcsfs"):
                raise
            refused = any(word in type(error).__name__ for word in _REFUSING_WORDS)
            raise RemoteError(_told(error), transport=not refused) from error


def read(store: Store, name: str) -> bytes:
    """Read a small file whole. Raises RemoteError after the last attempt."""

    def attempt() -> bytes:
        with store.open(name) as (reader, length):
            pieces = list(iter(lambda: reader.read(_CHUNK), b""))
        content = b"".join(pieces)
        _check_whole(len(content), length)
        return content

    return _tried(attempt, threading.Event())


@contextmanager
def _writing() -> Iterator[None]:
    """Tell a disk's errors, which are ours, from those of the connection."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"The cache cannot be written: {error}.") from error


def fetch(
    store: Store, name: str, begin: Callable[[int | None], Any], stop: threading.Event
) -> tuple[int, str]:
    """Read a file into what `begin(size)` opens, and return its size and sha256.

    `begin` is called for every attempt with the size that the server names, and returns a binary
    file open for writing at its start. Raises RemoteError after the last attempt, and Stopped.
    """

    def attempt() -> tuple[int, str]:
        digest = hashlib.sha256()
        count = 0
        with store.open(name) as (reader, length):
            with _writing():
                file = begin(length)
            try:
                while piece := reader.read(_CHUNK):
                    if stop.is_set():
                        raise Stopped
                    with _writing():
                        file.write(piece)
                    digest.update(piece)
                    count += len(piece)
                with _writing():
                    file.truncate()
            finally:
                with _writing():
                    file.close()
        _check_whole(count, length)
        return count, digest.hexdigest()

    return _tried(attempt, stop)


def _tried(attempt: Callable[[], Result], stop: threading.Event) -> Result:
    """Attempt until it works, or until another attempt makes no sense."""
    for pause in PAUSES:
        try:
            return attempt()
        except RemoteError as error:
            if not error.transport:
                raise
        if stop.wait(pause):
            raise Stopped
    try:
        return attempt()
    except RemoteError as error:
        told = f"{error}, {len(PAUSES) + 1} times" if error.transport else str(error)
        raise RemoteError(told, transport=error.transport, missing=error.missing) from error


def _check_whole(count: int, length: int | None) -> None:
    """A connection that ends early does not raise in http.client: count."""
    if length is not None and count < length:
        raise RemoteError(f"it was cut off after {count} of {length} bytes", transport=True)


def _told(error: Exception) -> str:
    """Name an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
