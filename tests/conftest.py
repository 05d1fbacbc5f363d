"""Fixtures that every test may use."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import forked
from tests.commands import environment
from tests.no_network.sitecustomize import outside

ROOT = Path(__file__).resolve().parent.parent


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    host = outside(event, arguments)
    if host is not None:
        pytest.fail(f"The test wanted to reach {host}.")


sys.addaudithook(_refuse)


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


@pytest.fixture
def forked_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs that a command of several stages starts be forked ones (tests/forked.py)."""

    def run_command(command: Sequence[str], log: Path | None = None) -> int:
        assert command[0] == sys.executable
        done = forked.finished(command[1:], Path.cwd(), environment(root=True), seconds=240)
        if log is None:
            sys.stdout.write(done.stdout)
            sys.stderr.write(done.stderr)
        else:
            with log.open("a") as file:
                file.write(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr("groundwork.stages.run_command", run_command)
    monkeypatch.setattr("pretrain.few_labels.run_command", run_command)


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """A COCO root: 10 train, 4 val and 3 test pictures with bright squares of two classes."""
    root = tmp_path / "labeled"
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4), ("test", 3)):
        (root / "images" / split).mkdir(parents=True)
        document: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
        }
        for number in range(count):
            pixels = generator.integers(0, 80, (64, 80, 3)).astype(np.uint8)
            name = f"{number:02d}.png"
            document["images"].append({"id": number, "file_name": name, "width": 80, "height": 64})
            for label in (1, 2):
                side = int(generator.integers(12, 24))
                left = int(generator.integers(0, 80 - side))
                top = int(generator.integers(0, 64 - side))
                pixels[top : top + side, left : left + side, 0 if label == 1 else 2] = 255
                document["annotations"].append(
                    {
                        "id": len(document["annotations"]) + 1,
                        "image_id": number,
                        "category_id": label,
                        "bbox": [left, top, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(pixels).save(root / "images" / split / name)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(document))
    return root
