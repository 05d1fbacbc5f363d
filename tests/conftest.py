"""Fixtures that every test may use."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real pictures beside the checkout; tests that need them are skipped without them."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real pictures (../shared/data) are not here")
    return path


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    """Make a small JPEG with smooth structure that differs from seed to seed."""

    def make(seed: int, width: int = 64, height: int = 48) -> bytes:
        generator = np.random.default_rng(seed)
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        return file.getvalue()

    return make
