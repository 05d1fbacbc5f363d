"""Pictures for small runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def pictures(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """A folder of 22 small pictures: an epoch is no whole number of batches."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(22):
        (folder / f"{i:02d}.jpg").write_bytes(make_jpeg(i, 96, 80))
    return folder


@pytest.fixture
def images(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """Ten pictures, 00.jpg to 09.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number:02d}.jpg").write_bytes(make_jpeg(number))
    return folder
