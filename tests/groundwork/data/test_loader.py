"""The loader gives the same batches to everybody, replaces what is bad, and never hangs."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from groundwork.data.decode import Picture
from groundwork.data.loader import Arrays, Batch, Loader
from groundwork.data.order import Order
from groundwork.data.shards import Sample
from groundwork.errors import DataError, UnavailableError, UsageError

ROOT = Path(__file__).resolve().parents[3]


class Numbered:
    """Pictures that are one grey each, so that a view tells which picture it is of."""

    name = "numbered"
    fingerprint = "0"

    def __init__(self, sizes: list[int], bad: dict[tuple[int, int], bytes | None] | None = None):
        self.shard_sizes: npt.NDArray[np.int64] = np.asarray(sizes, np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.shard_sizes)))
        self.bad = bad or {}
        self.prefetched: list[list[int]] = []

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def read(self, shard: int, index: int) -> Sample:
        number = int(self.starts[shard]) + index
        content: bytes | None = self.bad.get((shard, index), b"")
        if content is None:
            raise DataError(f"shard {shard} is cut off before picture {index}.")
        if not content:
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (number, number, number)).save(file, "PNG")
            content = file.getvalue()
        return Sample(
            key=f"picture-{number}", image=content, label=None, source=f"shard-{shard}", offset=512
        )

    def prefetch(self, shards: Sequence[int]) -> None:
        self.prefetched.append(list(shards))

    def close(self) -> None:
        pass


def views(picture: Picture, generator: np.random.Generator) -> Arrays:
    return {
        "image": picture.pixels()[:4, 3::-1],
        "drawn": generator.random(2, dtype=np.float32),
        "number": np.array(7, np.int64),
    }


def slow_views(picture: Picture, generator: np.random.Generator) -> Arrays:
    time.sleep(0.05)
    return views(picture, generator)


def busy_views(picture: Picture, generator: np.random.Generator) -> Arrays:
    until = time.thread_time() + 0.01
    while time.thread_time() < until:
        pass
    return views(picture, generator)


def make(samples: Numbered, **changed: object) -> Loader:
    order = Order(samples.shard_sizes, seed=5, window_shards=2)
    wanted: dict[str, object] = {"seed": 5, "batch_size": 8, **changed}
    maker = wanted.pop("views", views)
    return Loader(samples, order, maker, **wanted)  # type: ignore[arg-type]


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(loader):
        return list(islice(loader, count))


def numbers(batches: list[Batch]) -> list[int]:
    return [number for batch in batches for number in batch.views["image"][:, 0, 0, 0].tolist()]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.positions == b.positions
        and a.keys == b.keys
        and a.replaced == b.replaced
        and a.views.keys() == b.views.keys()
        and all(torch.equal(a.views[name], b.views[name]) for name in a.views)
        for a, b in zip(left, right, strict=True)
    )


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def workers_of(loader: Loader) -> list[int]:
    return [worker.pid or 0 for worker in loader._workers]


def test_a_batch_holds_what_it_says() -> None:
    samples = Numbered([4, 0, 5, 3])
    batch = take(make(samples), 1)[0]
    assert batch.positions == list(range(8))
    assert batch.views["image"].dtype == torch.uint8
    assert batch.views["image"].shape == (8, 4, 4, 3)
    assert batch.views["drawn"].shape == (8, 2)
    assert batch.views["number"].tolist() == [7] * 8
    assert batch.keys == [f"picture-{number}" for number in numbers([batch])]
    assert batch.replaced == [] and batch.worker_seconds > 0


def test_every_epoch_gives_every_picture_once() -> None:
    batches = take(make(Numbered([4, 0, 5, 3])), 6)  # 48 samples are four epochs of 12
    seen = numbers(batches)
    for epoch in range(4):
        assert sorted(seen[epoch * 12 : epoch * 12 + 12]) == list(range(12))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    bad: dict[tuple[int, int], bytes | None] = {(0, 1): b"<html>", (2, 2): None}
    alone = take(make(Numbered([4, 0, 5, 3], bad)), 6)
    assert same(take(make(Numbered([4, 0, 5, 3], bad), workers=workers), 6), alone)


def test_two_ranks_and_accumulation_see_the_batches_of_one_process() -> None:
    samples = Numbered([4, 0, 5, 3])
    alone = take(make(samples), 3)
    ranks = [take(make(samples, rank=rank, world=2, accumulate=2), 6) for rank in (0, 1)]
    for step, whole in enumerate(alone):
        parts = [batch for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
        assert [len(part.keys) for part in parts] == [2] * 4
        for name, view in whole.views.items():
            assert torch.equal(torch.cat([part.views[name] for part in parts]), view)


def test_a_loader_started_later_goes_on_identically() -> None:
    samples = Numbered([4, 0, 5, 3])
    assert same(take(make(samples, start=24), 2), take(make(samples), 5)[3:])


def test_a_run_stopped_on_two_ranks_goes_on_on_one_and_on_four() -> None:
    samples = Numbered([4, 0, 5, 3], {(2, 1): b"<html>"})
    alone = take(make(samples), 6)
    ranks = [take(make(samples, rank=rank, world=2, workers=2), 2) for rank in (0, 1)]
    stopped = [number for pair in zip(*ranks, strict=True) for number in numbers(list(pair))]
    on_one = take(make(samples, start=16), 2)
    on_four = [take(make(samples, rank=rank, world=4, start=32), 2) for rank in range(4)]
    rest = [number for step in zip(*on_four, strict=True) for number in numbers(list(step))]
    assert stopped + numbers(on_one) + rest == numbers(alone)


def test_a_loader_can_be_iterated_again() -> None:
    loader = make(Numbered([9]), workers=1)
    first = list(islice(loader, 2))
    again = take(loader, 2)
    assert same(first, again)


def test_a_bad_picture_is_replaced_by_the_next_good_one() -> None:
    bad: dict[tuple[int, int], bytes | None] = {(0, 3): b"", (0, 5): b"<html>", (0, 7): None}
    bad[(0, 3)] = b"\xff\xd8\xff"
    clean = take(make(Numbered([12]), batch_size=12), 2)
    batches = take(make(Numbered([12], bad), batch_size=12), 2)
    stream = numbers(clean)
    gone = {3, 5, 7}
    expected = [
        next(number for number in [*stream[place:], 0] if number not in gone)
        for place in range(len(stream))
    ]
    if stream[-1] in gone:  # its stand-in lies beyond what was taken
        expected[-1] = numbers(batches)[-1]
    assert numbers(batches) == expected
    replaced = [one for batch in batches for one in batch.replaced]
    assert [one.position for one in replaced] == [p for p, n in enumerate(stream) if n in gone]
    assert len(replaced) == 6
    for one in replaced:
        number = stream[one.position]
        assert f"{number}" in one.key
        assert (one.source, one.offset) == (("shard-0", 512) if number != 7 else ("numbered", -1))
        assert one.reason
    # The stand-in gets the random numbers of the place that it fills.
    for whole, batch in zip(clean, batches, strict=True):
        assert torch.equal(whole.views["drawn"], batch.views["drawn"])


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_the_picture_and_keeps_its_class_over_the_worker(workers: int) -> None:
    loader = make(Numbered([12], {(0, 5): b"<html>"}), on_error="raise", workers=workers)
    with pytest.raises(DataError, match=r"picture-5 of shard-0.*'\. Repair or remove") as caught:
        take(loader, 3)
    assert type(caught.value) is DataError
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_read_is_an_error_not_a_search_without_end(
    workers: int,
) -> None:
    bad: dict[tuple[int, int], bytes | None] = {(0, index): b"x" for index in range(5)}
    with pytest.raises(DataError, match="10 pictures in a row"):
        take(make(Numbered([5], bad), workers=workers), 1)


class Unreachable(Numbered):
    """A server that gives no answer, for the first `failures` attempts at every picture."""

    def __init__(self, sizes: list[int], failures: int):
        super().__init__(sizes)
        self.failures = failures
        self.attempts: Counter[tuple[int, int]] = Counter()

    def read(self, shard: int, index: int) -> Sample:
        self.attempts[shard, index] += 1
        if self.attempts[shard, index] <= self.failures:
            raise UnavailableError("shard-0.tar cannot be fetched: no answer.")
        return super().read(shard, index)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_out_of_reach_is_waited_for(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundwork.data.reach.PAUSE", 0.001)
    whole = take(make(Numbered([12])), 2)
    assert same(take(make(Unreachable([12], failures=2), workers=workers), 2), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_stays_out_of_reach_ends_the_run_and_is_no_bad_picture(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundwork.data.reach.PAUSE", 0.001)
    monkeypatch.setattr("groundwork.data.reach.PATIENCE", 0.05)
    with pytest.raises(UnavailableError, match="no answer"):
        take(make(Unreachable([12], failures=10**6), workers=workers), 1)


def test_one_good_picture_fills_every_place() -> None:
    bad: dict[tuple[int, int], bytes | None] = {(0, index): b"x" for index in range(1, 5)}
    batches = take(make(Numbered([5], bad)), 5)
    assert set(numbers(batches)) == {0}
    assert sum(len(batch.replaced) for batch in batches) == 32


def test_a_mistake_in_the_views_is_not_taken_for_a_bad_picture() -> None:
    def broken(picture: Picture, generator: np.random.Generator) -> Arrays:
        return {"image": np.zeros(int(generator.integers(1, 1000)), np.uint8)}

    with pytest.raises(ValueError, match="must not depend on the picture's shape"):
        take(make(Numbered([5]), views=broken), 1)


def test_the_shards_of_this_window_and_the_next_are_announced() -> None:
    samples = Numbered([2] * 6)
    take(make(samples, batch_size=4), 6)
    order = Order(samples.shard_sizes, seed=5, window_shards=2)
    assert samples.prefetched == [order.shards_from(4 * step, 4) for step in range(6)]


@pytest.mark.parametrize(("world", "accumulate"), [(3, 1), (2, 3), (16, 1)])
def test_a_batch_that_cannot_be_divided_is_refused(world: int, accumulate: int) -> None:
    with pytest.raises(UsageError, match="batch_size=8 cannot be divided"):
        make(Numbered([5]), world=world, accumulate=accumulate)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_tells_the_cpu_time_that_was_spent_on_it_and_not_the_waiting(workers: int) -> None:
    samples = Numbered([12])
    busy = take(make(samples, views=busy_views, workers=workers), 4)
    assert all(0.08 <= batch.worker_seconds < 0.3 for batch in busy[1:])
    waiting = take(make(samples, views=slow_views, workers=workers), 2)
    assert all(batch.worker_seconds < 0.1 for batch in waiting[1:])


def test_the_global_generator_of_torch_is_left_alone() -> None:
    before = torch.get_rng_state()
    take(make(Numbered([5]), workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_ignore_the_signals_for_the_main_process_and_go_when_closed() -> None:
    loader = make(Numbered([12]), workers=2)
    batches = iter(loader)
    next(batches)
    workers = workers_of(loader)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert len(list(islice(batches, 12))) == 12  # more than was ready before
    os.kill(workers[0], signal.SIGTERM)
    assert all(alive(worker) for worker in workers)
    loader.close()
    assert not any(alive(worker) for worker in workers)
    assert list(batches) == []


def test_closing_twice_or_unused_does_nothing() -> None:
    loader = make(Numbered([12]), workers=1)
    loader.close()
    next(iter(loader))
    loader.close()
    loader.close()


@pytest.mark.slow
def test_a_killed_worker_is_named_with_the_usual_reason() -> None:
    loader = make(Numbered([12]), workers=2, views=slow_views)
    batches = iter(loader)
    next(batches)
    victim, other = workers_of(loader)
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"process {victim}, killed by SIGKILL.*memory"):
        for _ in batches:
            pass
    assert time.monotonic() - start < 20
    assert not alive(other)


PROGRAM = """
    import sys, time
    from tests.groundwork.data.test_loader import Numbered, make, slow_views, workers_of
    if __name__ == "__main__":
        loader = make(Numbered([12]), workers=2, views=slow_views)
        batches = iter(loader)
        next(batches)
        print(*workers_of(loader), flush=True)
        if sys.argv[1] == "leave":
            raise SystemExit(0)
        if sys.argv[1] == "fail":
            raise RuntimeError("on purpose")
        time.sleep(60)
"""


def start_program(tmp_path: Path, how: str) -> tuple[subprocess.Popen[str], list[int]]:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(program), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    workers = [int(text) for text in process.stdout.readline().split()]
    assert len(workers) == 2
    return process, workers


def wait_until_gone(workers: list[int], seconds: float) -> Iterator[int]:
    until = time.monotonic() + seconds
    while any(alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    return (worker for worker in workers if alive(worker))


@pytest.mark.slow
def test_no_worker_outlives_a_killed_main_process(tmp_path: Path) -> None:
    process, workers = start_program(tmp_path, "sleep")
    with process:
        process.kill()
    assert list(wait_until_gone(workers, 60)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("leave", 0), ("fail", 1)])
def test_a_program_that_forgets_to_close_ends_at_once_all_the_same(
    tmp_path: Path, how: str, code: int
) -> None:
    process, workers = start_program(tmp_path, how)
    start = time.monotonic()
    with process:
        assert process.wait(timeout=20) == code
        assert process.stderr is not None
        said = process.stderr.read()
    assert time.monotonic() - start < 10
    assert list(wait_until_gone(workers, 60)) == []
    assert not re.search("Exception ignored|leaked", said)
