"""Reading what may be out of reach for a while: a store that restarts, a network file system."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from groundwork.data.shards import Sample
from groundwork.errors import UnavailableError

logger = logging.getLogger(__name__)

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
    began = time.monotonic()
    told = False
    while True:
        try:
            return samples.read(shard, index)
        except UnavailableError as error:
            if time.monotonic() - began > PATIENCE:
                raise
            if not told:
                logger.warning("%s Waiting for up to %.0f s.", error, PATIENCE)
            told = True
        time.sleep(PAUSE)
