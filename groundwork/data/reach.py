"""Reading what may be out of reach for a while: a store that restarts, a network file system."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from groundwork.data.shards import Sample
from groundwork.errors import UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that are waited for what is out of reach, at most, and between two attempts.
PATIENCE, PAUSE = 300.0, 10.0


class Readable(Protocol):
    """Samples, or labeled ones."""

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample."""


def read_patiently(samples: Readable, shard: int, index: int) -> Sample:
    """Read a sample; wait up to PATIENCE for one that is out of reach, then raise UnavailableError.

    Raises DataError at once for one that is damaged.
    """
    return patiently(lambda: samples.read(shard, index))


def patiently(
    read: Callable[[], T], waiting: Callable[[], object] = lambda: None, what: str = ""
) -> T:
    """Do as read_patiently, with any reading; `waiting` is called before each pause, may raise.

    `what` is read, where errors do not say it.
    """
    began = time.monotonic()
    told = False
    while True:
        try:
            return read()
        except UnavailableError as error:
            if time.monotonic() - began > PATIENCE:
                raise
            if not told:
                sentence = f"{what}: {error}." if what else error
                logger.warning("%s Waiting for up to %.0f s.", sentence, PATIENCE)
            told = True
        waiting()
        time.sleep(PAUSE)
