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
