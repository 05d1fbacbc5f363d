"""The stream is a permutation every epoch, the same for everybody, and cheap to open."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.loader import positions_of
from groundwork.data.order import Order, sample_generator
from groundwork.errors import DataError

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
WINDOWS = st.integers(1, 5)
SEEDS = st.integers(0, 2**63)


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    return [order[epoch * len(order) + place] for place in range(len(order))]


@settings(deadline=None, max_examples=150)
@given(SIZES, SEEDS, WINDOWS)
def test_every_epoch_is_a_permutation_of_all_samples(
    sizes: list[int], seed: int, window: int
) -> None:
    order = Order(sizes, seed=seed, window_shards=window)
    everything = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    for epoch in (0, 1, 5):
        assert sorted(epoch_of(order, epoch)) == everything


@settings(deadline=None, max_examples=100)
@given(
    SIZES,
    SEEDS,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 60),
    st.integers(0, 4),
)
def test_ranks_together_see_what_one_process_sees_from_any_start(
    sizes: list[int], seed: int, world: int, accumulate: int, each: int, start: int, steps: int
) -> None:
    order = Order(sizes, seed=seed, window_shards=3)
    batch = world * accumulate * each
    alone = positions_of(batch, rank=0, world=1, accumulate=1, start=start)
    ranks = [
        positions_of(batch, rank=rank, world=world, accumulate=accumulate, start=start)
        for rank in range(world)
    ]
    for _ in range(steps):
        whole = [order[position] for position in next(alone)]
        parts = [order[p] for rank in ranks for _ in range(accumulate) for p in next(rank)]
        assert parts == whole
    # Another number of ranks goes on where these stopped, with nothing lost or doubled.
    consumed = start + steps * batch
    resumed = positions_of(batch, rank=0, world=1, accumulate=1, start=consumed)
    assert next(resumed) == next(alone)


@settings(deadline=None, max_examples=100)
@given(SIZES, SEEDS, WINDOWS, st.integers(0, 80), st.integers(1, 40))
def test_a_resumed_stream_goes_on_identically(
    sizes: list[int], seed: int, window: int, consumed: int, further: int
) -> None:
    whole = Order(sizes, seed=seed, window_shards=window)
    unbroken = [whole[position] for position in range(consumed + further)]
    resumed = Order(sizes, seed=seed, window_shards=window)
    assert [resumed[consumed + place] for place in range(further)] == unbroken[consumed:]


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, WINDOWS, st.lists(st.integers(0, 200), max_size=30))
def test_the_order_of_asking_changes_nothing(
    sizes: list[int], seed: int, window: int, positions: list[int]
) -> None:
    asked = Order(sizes, seed=seed, window_shards=window)
    for position in positions:
        fresh = Order(sizes, seed=seed, window_shards=window)
        assert asked[position] == fresh[position]


@settings(deadline=None, max_examples=100)
@given(SIZES, SEEDS, WINDOWS, st.integers(0, 60))
def test_the_shards_said_to_come_next_are_those_that_come(
    sizes: list[int], seed: int, window: int, position: int
) -> None:
    order = Order(sizes, seed=seed, window_shards=window)
    filled = sum(size > 0 for size in sizes)
    ahead = order.shards_from(position, 100)
    assert len(ahead) == len(set(ahead)) == filled
    assert order.shards_from(position, 2) == ahead[:2]
    assert order[position][0] in ahead[: order.window_shards]
    assert order.window_shards < 2 * window


def test_epochs_and_seeds_differ() -> None:
    sizes = [5] * 20
    order = Order(sizes, seed=1)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(Order(sizes, seed=2), 0)
    # The window's shuffle differs too, not only the shards.
    one = Order([50], seed=1)
    assert epoch_of(one, 0) != epoch_of(one, 1)


def test_a_window_touches_only_its_own_shards() -> None:
    order = Order([10] * 35, seed=3, window_shards=16)
    stream = epoch_of(order, 0)
    # 35 shards are two windows of at least 16: 17 and 18.
    first, last = {s for s, _ in stream[:170]}, {s for s, _ in stream[170:]}
    assert len(first) == 17 and len(last) == 18 and not first & last
    assert order.window_of(169) == (0, 0) and order.window_of(170) == (0, 1)
    assert order.window_of(350) == (1, 0)
    assert order.window_shards == 18


def test_the_shuffle_inside_a_window_is_thorough() -> None:
    order = Order([100] * 4, seed=0, window_shards=4)
    rows = [shard * 100 + index for shard, index in epoch_of(order, 0)]
    # Neighbours of a uniform permutation of n lie n/3 apart on average: 133 here.
    assert 115 < np.abs(np.diff(rows)).mean() < 151


def test_the_stream_is_what_it_always_was() -> None:
    # A change here changes every resumed run: numpy's or ours.
    order = Order([3, 0, 2, 4], seed=7, window_shards=2)
    assert [order[position] for position in range(9)] == [
        *[(3, 3), (2, 0), (0, 2), (3, 1), (0, 1), (2, 1), (0, 0), (3, 2), (3, 0)],
    ]
    assert sample_generator(7, 3).integers(0, 1000, 4).tolist() == [524, 482, 293, 724]


def test_a_samples_numbers_depend_on_its_seed_and_position_alone() -> None:
    draws = {
        tuple(sample_generator(seed, position).integers(0, 2**32, 2).tolist())
        for seed in range(20)
        for position in range(50)
    }
    assert len(draws) == 1000
    assert sample_generator(3, 9).random() == sample_generator(3, 9).random()
    uniform = [sample_generator(0, position).random() for position in range(2000)]
    assert abs(float(np.mean(uniform)) - 0.5) < 0.03  # neighbours in the key are independent
    assert abs(float(np.corrcoef(uniform[:-1], uniform[1:])[0, 1])) < 0.08


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]])
def test_no_pictures_at_all_is_said(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="no picture to read"):
        Order(sizes, seed=0)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Order([3, -1], seed=0)
    with pytest.raises(ValueError, match="window_shards"):
        Order([3], seed=0, window_shards=0)
    with pytest.raises(IndexError, match="before the start"):
        Order([3], seed=0)[-1]


def test_a_hundred_million_samples_open_at_once_and_small() -> None:
    sizes = np.full(100_000, 1000)

    def opened() -> float:
        start = time.process_time()
        order = Order(sizes, seed=0)
        for position in (0, 1, 99_999_999, 100_000_000, 5_000_000_000):
            order[position]
        return time.process_time() - start

    assert min(opened() for _ in range(3)) < 0.5
    tracemalloc.start()
    opened()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
