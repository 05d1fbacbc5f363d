"""What benchmarks.worker_speed measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import worker_speed
from groundwork.errors import UsageError


def test_both_are_measured(make_jpeg: Callable[..., bytes]) -> None:
    found = worker_speed.measure([make_jpeg(seed, 320, 240) for seed in range(2)])
    # Decoding is the difference of two times, and of two small pictures less than their noise.
    spent = {name: ms for name, ms in found["milliseconds"].items() if name != "ours: decode"}
    assert min(spent.values()) > 0


def test_the_views_of_both_are_drawn(make_jpeg: Callable[..., bytes]) -> None:
    sheet = worker_speed.side_by_side([make_jpeg(seed, 320, 240) for seed in range(2)])
    assert sheet.width > 1000
    assert sheet.getcolors(100) is None  # not one flat area


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no"):
        worker_speed.read_pictures(tmp_path, 3)


def test_pictures_are_read_over_again_where_there_are_too_few(
    tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    for seed in range(2):
        (tmp_path / f"{seed}.jpg").write_bytes(make_jpeg(seed))
    pictures = worker_speed.read_pictures(tmp_path, 5)
    assert pictures == [make_jpeg(seed % 2) for seed in range(5)]
