"""This rank's batches, from any position of the stream.

What: a torch DataLoader over positions. An endless sampler in the main process says which positions
make up this rank's next micro-batch; a worker turns each position into a sample (order), bytes
(samples), a picture (decode) and views (the task), and stacks them once, in shared memory.

Why so: the position decides everything, so that batches do not depend on the number of workers or
ranks. Global batch t is stream[start + t*G : start + (t+1)*G]; rank r of R takes its r-th slice of
G/R samples, and micro-batch m of A the m-th part of that. The loader is never given to
accelerator.prepare, which would deal the batches out a second time and lose half of the data.

A picture that cannot be read is replaced by the next one of the stream that can (with the random
numbers of the position it stands in for), and recorded: no batch changes its shape. One that is out
of reach for now (a server that does not answer, a full disk) is no such picture: it is waited for,
and in the end the run stops, to be resumed.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from groundwork.data.decode import Picture, open_picture
from groundwork.data.order import Order, sample_generator
from groundwork.data.reach import read_patiently
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.shards import Sample, Samples
from groundwork.errors import DataError, GroundworkError, UnavailableError, UsageError

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]
Views = Callable[[Picture, np.random.Generator], Arrays]


class PlaceViews(ABC):
    """Views of a sample that may look at its labels and at other samples of the stream.

    Entries named in `ragged` need not be of one length: in the batch they lie one after the other,
    and `<name>_sample` says for every row which sample of the batch it is of.
    """

    ragged: frozenset[str] = frozenset()

    @abstractmethod
    def at(self, place: Place) -> Arrays:
        """Return the entries of the batch of the sample at this place."""


# Batches that each worker makes ahead: enough to hide a slow one, few enough for little memory.
_PREFETCH = 3
# Where so many in a row cannot be read, the data is not damaged here and there: it is not there.
_LONGEST_DAMAGE = 1000
_NOT_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True)
class Replaced:
    """One picture that could not be read, where it lies, why, and whose place was filled."""

    position: int
    source: str
    key: str
    offset: int  # -1 where it is not known
    reason: str


@dataclass(frozen=True)
class Place:
    """A sample with where it stands in the stream, from which its neighbours can be asked for."""

    position: int
    sample: Sample
    picture: Picture
    generator: np.random.Generator
    neighbour: Callable[[int], tuple[Sample, Picture]]  # the readable sample so many places on


@dataclass(frozen=True)
class Batch:
    """A micro-batch: views stacked by name along a new first dimension, and where they are from."""

    views: dict[str, Tensor]
    keys: list[str]  # of the pictures that are really there, stand-ins included
    positions: list[int]
    replaced: list[Replaced]
    worker_seconds: float  # CPU seconds that a worker spent on it, sending included

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory; DataLoader calls this when it pins."""
        views = {name: view.pin_memory() for name, view in self.views.items()}
        return replace(self, views=views)


def positions_of(
    batch_size: int, *, rank: int, world: int, accumulate: int, start: int
) -> Iterator[list[int]]:
    """Yield the positions of one rank's micro-batches, without end.

    `batch_size` is the global batch; it must be divisible by world * accumulate.
    """
    local = batch_size // world
    micro = local // accumulate
    first = start + rank * local
    while True:
        for part in range(accumulate):
            yield list(range(first + part * micro, first + (part + 1) * micro))
        first += batch_size


class Loader:
    """Endless micro-batches of one rank; `accumulate` of them make up its share of a step.

    Iterating starts at `start` (samples consumed by all ranks so far) every time, and ends an
    earlier iteration. close() shuts the workers down; the samples stay open, they are the caller's.

    Raises UsageError for a batch that cannot be divided, DataError for a picture that cannot be
    read where on_error is "raise", for data of which nothing can be read, and for a dead worker.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        views: Views | PlaceViews,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        start: int = 0,
        workers: int = 0,
        on_error: str = "skip",
        reading: Reading = PLAIN,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % (world * accumulate):
            raise UsageError(
                f"batch_size={batch_size} cannot be divided evenly over {world} processes times"
                f" {accumulate} accumulated micro-batches: make it a multiple of"
                f" {world * accumulate}."
            )
        if on_error not in ("skip", "raise"):
            raise ValueError("on_error is 'skip' or 'raise'.")
        if not 0 <= rank < world or start < 0 or workers < 0:
            raise ValueError("rank lies in 0..world-1; start and workers are at least 0.")
        sampler = _MicroBatches(
            samples, order, batch_size, rank=rank, world=world, accumulate=accumulate, start=start
        )
        dataset = _Positions(samples, order, views, seed, on_error == "skip", reading)
        # The kernel's notice is of the end of the thread that forked, not of its process.
        dies_with = threading.current_thread() is threading.main_thread()
        with _without_warnings():
            self._loader: DataLoader[Any] = DataLoader(
                dataset,
                batch_sampler=sampler,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=pin_memory,
                worker_init_fn=partial(_shield_worker, parent=os.getpid(), dies_with=dies_with),
                prefetch_factor=_PREFETCH if workers else None,
                multiprocessing_context=_start_method() if workers else None,
                # torch draws a seed for its workers from this instead of the global generator,
                # whose state is part of a checkpoint. Nothing here uses that seed.
                generator=torch.Generator(),
            )
        self._iterator: Any = None
        self._workers: list[BaseProcess] = []

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._iterator = self._start()
        return self._batches(self._iterator)

    def close(self) -> None:
        """Stop the workers and wait until they are gone. The loader can be iterated again."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and self._workers:
            # What deleting the iterator does, if nothing else happens to hold it: a traceback may.
            iterator._shutdown_workers()
        del iterator
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()  # it ignores SIGTERM
            worker.join()
        if self._workers:
            atexit.unregister(self.close)
        self._workers = []

    def _start(self) -> Any:
        """Start the workers, and remember them."""
        if not self._loader.num_workers:
            return iter(self._loader)
        before = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        # A signal that arrives before a worker has learnt to ignore it waits until it has.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
        try:
            with _without_warnings():
                iterator = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._workers = sorted(
            set(multiprocessing.active_children()) - before, key=lambda worker: worker.pid or 0
        )
        # Workers ignore SIGTERM, with which multiprocessing would end them at exit and wait.
        atexit.register(self.close)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            # torch's handler raises wherever the main thread happens to be when a worker dies.
            # Without it the death is found where a batch is waited for, within seconds.
            signal.signal(signal.SIGCHLD, handler)
        return iterator

    def _batches(self, iterator: Iterator[Batch | GroundworkError]) -> Iterator[Batch]:
        while self._iterator is iterator:
            try:
                item = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:
                self._raise_if_a_worker_died(error)
                raise
            if isinstance(item, GroundworkError):
                self.close()
                raise item from None
            yield item

    def _raise_if_a_worker_died(self, cause: BaseException) -> None:
        """Raise DataError naming the workers that are dead, if there are any."""
        dead = [
            f"data worker {number} (process {worker.pid}, {_death(worker.exitcode)})"
            for number, worker in enumerate(self._workers)
            if not worker.is_alive()
        ]
        if dead:
            self.close()
            raise DataError(
                f"{' and '.join(dead)} died. The usual reason is that the machine ran out of"
                " memory ('dmesg' tells): set data.workers lower, or batch_size, and resume."
            ) from cause


class _MicroBatches(Sampler[list[int]]):
    """The positions of this rank's micro-batches; tells the samples which shards come next."""

    def __init__(self, samples: Samples, order: Order, batch_size: int, **share: int) -> None:
        self._samples = samples
        self._order = order
        self._batch_size = batch_size
        self._share = share

    def __iter__(self) -> Iterator[list[int]]:
        window = None
        for positions in positions_of(self._batch_size, **self._share):
            here = self._order.window_of(positions[0])
            if here != window:
                window = here
                ahead = 2 * self._order.window_shards  # this window and the next
                self._samples.prefetch(self._order.shards_from(positions[0], ahead))
            yield positions


class _Positions(Dataset[Any]):
    """Positions of the stream -> a batch, in a worker (or in the main process without workers)."""

    def __init__(
        self,
        samples: Samples,
        order: Order,
        views: Views | PlaceViews,
        seed: int,
        skip: bool,
        reading: Reading,
    ) -> None:
        self._samples = samples
        self._order = order
        self._views = views
        self._seed = seed
        self._skip = skip
        self._reading = reading
        self._clock: float | None = None

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch | GroundworkError:
        """Make the batch, or return the error: raised in a worker it would drag a traceback."""
        in_worker = torch.utils.data.get_worker_info() is not None
        # A worker's clock runs from the end of the batch before: what it took to send that one is
        # in it. The main process counts this thread and this call alone.
        started = time.thread_time() if not in_worker else (self._clock or 0.0)
        made: list[Arrays] = []
        keys: list[str] = []
        replaced: list[Replaced] = []
        try:
            for position in positions:
                arrays, key, failure = self._make(position)
                made.append(arrays)
                keys.append(key)
                if failure is not None:
                    replaced.append(failure)
            ragged = self._views.ragged if isinstance(self._views, PlaceViews) else frozenset()
            views = _stack(made, keys, ragged)
        except GroundworkError as error:
            return error.with_traceback(None)
        self._clock = time.process_time() if in_worker else time.thread_time()
        return Batch(views, keys, list(positions), replaced, self._clock - started)

    def _make(self, position: int) -> tuple[Arrays, str, Replaced | None]:
        """Return the views of a position, the key of their picture, and what was replaced."""
        first: Replaced | None = None
        tries = min(2 * len(self._order), _LONGEST_DAMAGE)
        for stand_in in range(position, position + tries):
            made = self._try(position, stand_in)
            if not isinstance(made, Replaced):
                return *made, first
            if not self._skip:
                raise DataError(f"{_said(made)} Repair or remove it, or set data.on_error=skip.")
            first = first or made
        assert first is not None
        raise DataError(
            f"{tries} pictures in a row cannot be read. The first is {_said(first)}"
            " Check data.train."
        )

    def _try(self, position: int, stand_in: int) -> tuple[Arrays, str] | Replaced:
        """Make the views of one picture, or say why it cannot be used."""
        shard, index = self._order[stand_in]
        source, key, offset = self._samples.name, f"{index} of shard {shard}", -1
        try:
            sample = read_patiently(self._samples, shard, index)
            source, key, offset = sample.source, sample.key, sample.offset
            picture = open_picture(sample.image, self._reading)
            generator = sample_generator(self._seed, position)
            if isinstance(self._views, PlaceViews):
                neighbour = partial(self._neighbour, position)
                place = Place(position, sample, picture, generator, neighbour)
                return self._views.at(place), key
            return self._views(picture, generator), key
        except UnavailableError:
            raise
        except DataError as error:
            return Replaced(position, source, key, offset, str(error))

    def _neighbour(self, position: int, distance: int) -> tuple[Sample, Picture]:
        """Read the sample `distance` places on, or the next readable one behind it.

        What is unreadable is told where the stream itself comes to it. Raises DataError.
        """
        first = position + distance
        for place in range(first, first + min(len(self._order), _LONGEST_DAMAGE)):
            try:
                sample = read_patiently(self._samples, *self._order[place])
                return sample, open_picture(sample.image, self._reading)
            except UnavailableError:
                raise
            except DataError as error:
                reason = error
        raise DataError(f"No picture can be read from position {first} of the stream on: {reason}")


def _said(replaced: Replaced) -> str:
    reason = replaced.reason.removesuffix(".")
    return f"picture {replaced.key} of {replaced.source}: {reason}."


def _stack(
    made: list[Arrays], keys: list[str], ragged: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Stack every view by name; in a worker straight into shared memory, so it is copied once."""
    stacked: dict[str, Tensor] = {}
    for name, like in made[0].items():
        column = [arrays[name] for arrays in made]
        if name in ragged:
            stacked[name] = torch.from_numpy(np.concatenate(column))
            lengths = [len(array) for array in column]
            stacked[f"{name}_sample"] = torch.from_numpy(np.repeat(np.arange(len(made)), lengths))
            continue
        for array, key in zip(column, keys, strict=True):
            if array.shape != like.shape or array.dtype != like.dtype:
                raise ValueError(
                    f"View '{name}' of {key} is {array.dtype} {array.shape}, that of {keys[0]} is"
                    f" {like.dtype} {like.shape}: the views of a task must not depend on the"
                    " picture's shape."
                )
        # default_collate copies a list of tensors into shared memory when it runs in a worker.
        stacked[name] = default_collate([_as_tensor(array) for array in column])
    return stacked


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor over the array's own memory; over a copy where torch takes no such array."""
    mirrored = any(stride < 0 for stride in array.strides)  # a flip that was not copied
    return torch.from_numpy(array.copy() if mirrored or not array.flags.writeable else array)


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: the batch is made already."""
    return batch


def _shield_worker(worker: int, *, parent: int, dies_with: bool) -> None:
    """Make this process ignore the signals that are meant for the main one, but not outlive it.

    A launcher sends SIGTERM, and a terminal SIGINT, to the whole group of processes: a worker that
    died of it would break the step that the main process still wants to finish and save.
    """
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)
    torch.set_num_threads(1)
    if dies_with and sys.platform.startswith("linux"):
        # torch's own watchdog looks every five seconds, and not while a full pipe blocks it.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave two warnings out that say nothing new to anybody."""
    with warnings.catch_warnings():
        # More workers than cores is slow, not wrong; the number is a recipe's to choose.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        # Python 3.12 warns of every fork beside threads; the workers use none of the parent's.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
        yield


def _start_method() -> str | None:
    """Fork on Linux: workers start in milliseconds and share the memory of indices. Else spawn."""
    return "fork" if sys.platform.startswith("linux") else None


def _death(exitcode: int | None) -> str:
    """Say how a process ended."""
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"
