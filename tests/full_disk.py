"""A disk that is full, as a process sees it: no file of its own may grow beyond a size."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let writes of this process fail where a file would be larger than `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def on_a_full_disk(command: Sequence[str], kib: int) -> list[str]:
    """Return the command line of a program whose files may not be larger than `kib` KiB."""
    return ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command]
