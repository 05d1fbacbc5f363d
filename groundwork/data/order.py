"""Which sample comes when: one endless stream, a pure function of (seed, epoch, index).

The stream is epoch after epoch, each a permutation of every sample. Shards are permuted first, then
the samples inside a window of consecutive shards of that permuted order, so that a reader touches
few shards at a time and memory does not grow with the number of samples: what is held is one number
a shard and one a sample of the windows in use. The state of the data is therefore one integer, the
number of samples consumed, and any number of ranks and workers sees the same stream.

A window is at least `window_shards` shards, and all windows of an epoch have the same number of
them, or one more: no window is left so small that its samples are hardly shuffled. A folder of
pictures has one picture a shard: permuting its shards is a full shuffle already, to which the
window adds nothing.

Random numbers are Philox's (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
a counter-based generator: a key and a place in a huge counter name a stream of their own, so that
no stream has to be advanced to reach another. The three uses below never share a counter.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from groundwork.errors import DataError

# The counter's highest word says what the numbers are for; the key says which.
_FOR_SAMPLE, _FOR_SHARDS, _FOR_WINDOW = 0, 1, 2
# Batches straddle epochs and windows, and a look ahead comes back: the last two are kept.
_KEPT = 2

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Epoch(NamedTuple):
    """One epoch: the permuted shards, and where each window's samples start in the epoch."""

    shards: npt.NDArray[np.int64]  # shards in the order of this epoch
    starts: npt.NDArray[np.int64]  # windows + 1


class _Window(NamedTuple):
    """One window: its shards, where each ends when they are laid in a row, and the shuffle."""

    shards: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    shuffle: npt.NDArray[Any]  # uint32, or int64 where a window has more samples than that


class Order:
    """The endless stream over shards of these sizes: position -> (shard, index in that shard).

    Raises DataError where there is no sample at all. Shards of size 0 are passed over.
    """

    def __init__(self, shard_sizes: npt.ArrayLike, *, seed: int, window_shards: int = 16) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any():
            raise ValueError("shard_sizes must be a row of counts, none of them negative.")
        if window_shards < 1 or seed < 0:
            raise ValueError("window_shards must be at least 1, and seed at least 0.")
        self.seed = seed
        self.samples = int(sizes.sum())  # in one epoch
        if self.samples == 0:
            raise DataError(
                f"There is no picture to read: {len(sizes)} shards, none of which holds a sample."
                " Check data.train."
            )
        self._sizes = sizes
        self._filled = np.flatnonzero(sizes)
        self._windows = max(1, len(self._filled) // window_shards)
        self.window_shards = -(-len(self._filled) // self._windows)  # of the largest window
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._opened: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of samples in one epoch; the stream itself has no end."""
        return self.samples

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (shard, index in the shard) of any position >= 0 of the endless stream."""
        epoch, number, offset = self._find(position)
        window = self._window(epoch, number)
        row = int(window.shuffle[offset])
        place = int(np.searchsorted(window.ends, row, side="right"))
        start = int(window.ends[place - 1]) if place else 0
        return int(window.shards[place]), row - start

    def window_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, window in that epoch) of a position."""
        epoch, number, _ = self._find(position)
        return epoch, number

    def shards_from(self, position: int, count: int) -> list[int]:
        """Return the next shards to be touched, at most `count`, each once.

        They are the shards of the window that `position` lies in, whole, since its samples are
        shuffled over all of them; then those of the windows after it, into the next epoch.
        """
        found: dict[int, None] = {}
        count = min(count, len(self._filled))
        epoch, number, _ = self._find(position)
        while len(found) < count:
            found.update(dict.fromkeys(self._shards_of(epoch, number).tolist()))
            epoch, number = (epoch, number + 1) if number + 1 < self._windows else (epoch + 1, 0)
        return list(found)[:count]

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, window, offset of the position in the window)."""
        if position < 0:
            raise IndexError(f"Position {position} lies before the start of the stream.")
        epoch, offset = divmod(position, self.samples)
        starts = self._epoch(epoch).starts
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, number, offset - int(starts[number])

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            generator = _generator(self.seed, epoch, use=_FOR_SHARDS)
            shards = generator.permutation(self._filled)
            firsts = np.arange(self._windows) * len(shards) // self._windows
            in_windows = np.add.reduceat(self._sizes[shards], firsts)
            found = _Epoch(shards, np.concatenate(([0], np.cumsum(in_windows))))
            _keep(self._epochs, epoch, found)
        return found

    def _shards_of(self, epoch: int, number: int) -> npt.NDArray[np.int64]:
        shards = self._epoch(epoch).shards
        first = number * len(shards) // self._windows
        return shards[first : (number + 1) * len(shards) // self._windows]

    def _window(self, epoch: int, number: int) -> _Window:
        found = self._opened.get((epoch, number))
        if found is None:
            shards = self._shards_of(epoch, number)
            ends = np.cumsum(self._sizes[shards])
            count = int(ends[-1])
            # Half the memory where the count allows it: a window may hold millions of samples.
            rows: npt.NDArray[Any] = np.arange(
                count, dtype=np.uint32 if count < 2**32 else np.int64
            )
            _generator(self.seed, epoch, number, use=_FOR_WINDOW).shuffle(rows)
            found = _Window(shards, ends, rows)
            _keep(self._opened, (epoch, number), found)
        return found


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """Return the generator of everything random about the sample at this position of the stream.

    Keyed by the position and never by a worker: the same sample gets the same numbers however many
    ranks and workers there are.
    """
    return _generator(seed, position, use=_FOR_SAMPLE)


def _generator(seed: int, number: int, part: int = 0, *, use: int) -> np.random.Generator:
    key = np.array([seed, number], dtype=np.uint64)
    counter = np.array([0, 0, part, use], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def _keep(kept: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Put a value in, and drop the oldest where more than a few are kept."""
    kept[key] = value
    while len(kept) > _KEPT:
        kept.popitem(last=False)
