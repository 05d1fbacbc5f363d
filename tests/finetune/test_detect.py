"""Every picture once, whoever looks at it; classes of one name under other numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.detect import _windows, detect_all
from finetune.detector import Limits
from finetune.evaluate import class_numbers, main, measure
from finetune.weights import parts_of, save_detector
from groundwork.data.labels import LabeledSamples, open_labeled
from groundwork.data.shards import Sample
from groundwork.errors import DataError, UnavailableError, UsageError
from tests.commands import run
from tests.finetune.test_finder import lively_detector

NAMES = ("red", "green", "blue")


def write_set(root: Path, sizes: list[tuple[int, int]], names: tuple[str, ...] = NAMES) -> Path:
    """A YOLO set: each picture has a square of each colour, labeled by the colour's name."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 90, (height, width, 3)).astype(np.uint8)
        lines = []
        for colour, name in enumerate(NAMES):
            left, top = 8 + 20 * colour, 6 + 10 * colour
            pixels[top : top + 14, left : left + 14, colour] = 255
            x, y = (left + 7) / width, (top + 7) / height
            lines.append(f"{names.index(name)} {x} {y} {14 / width} {14 / height}\n")
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        (root / "labels" / f"{number}.txt").write_text("".join(lines))
    return root


def opened(root: Path) -> LabeledSamples:
    return open_labeled(str(root), None, cache=root / "cache", cache_bytes=1 << 30)


MIXED = [(96, 64), (64, 96), (80, 80), (200, 60), (96, 64), (73, 57), (90, 60)]


@pytest.mark.parametrize("total", [0, 1, 7, 100, 1000])
def test_windows_hold_every_picture_once_and_are_whole_batches(total: int) -> None:
    places = [(number, 0) for number in range(total)]
    windows = _windows(places, 16)
    assert [entry for window in windows for entry in window] == list(enumerate(places))
    assert all(len(window) <= 64 for window in windows)
    assert total < 256 or all(len(window) % 16 == 0 for window in windows[:-1])
    assert total < 7 or len(windows) > 1  # something to do for two


def test_what_is_found_in_a_picture_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    labeled = opened(write_set(tmp_path / "set", MIXED * 2))
    seen = detect_all(
        lively_detector(), labeled, image_size=96, batch_size=4, limits=Limits(score=0.1)
    )
    assert seen is not None and seen.numbers == list(range(14))
    assert seen.keys[2].endswith("10")  # in the order of the files: 0, 1, 10, 11, ...
    alone = write_set(tmp_path / "alone", MIXED[:1])
    (alone / "images" / "0.png").write_bytes((tmp_path / "set/images/0.png").read_bytes())
    one = detect_all(lively_detector(), opened(alone), image_size=96, limits=Limits(score=0.1))
    assert one is not None and len(one.found[0].scores) > 3
    np.testing.assert_allclose(seen.found[0].boxes, one.found[0].boxes, atol=0.05)


def out_of_reach(samples: Any, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first reads of these samples fail as those of a server that does not answer do."""
    read, left = samples.read, [times]

    def unavailable(shard: int, index: int) -> Sample:
        if left[0]:
            left[0] -= 1
            raise UnavailableError("no answer.")
        found: Sample = read(shard, index)
        return found

    monkeypatch.setattr(samples, "read", unavailable)
    monkeypatch.setattr("groundwork.data.reach.PAUSE", 0.001)


def test_what_is_out_of_reach_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labeled = opened(write_set(tmp_path / "set", MIXED[:2]))
    out_of_reach(labeled, 3, monkeypatch)
    seen = detect_all(lively_detector(), labeled, image_size=96)
    assert seen is not None and seen.numbers == [0, 1]
    assert "no answer. Waiting for up to 300 s." in caplog.text
    out_of_reach(labeled, 10**6, monkeypatch)
    monkeypatch.setattr("groundwork.data.reach.PATIENCE", 0.01)
    with pytest.raises(UnavailableError, match="no answer"):
        detect_all(lively_detector(), labeled, image_size=96)


RANK = """
import json, os, sys, torch, torch.distributed as dist
from pathlib import Path
from finetune.detect import detect_all
from finetune.detector import Limits
from finetune.evaluate import measure
from finetune.weights import detector_from_file
from groundwork.data.labels import open_labeled
from groundwork.errors import DataError
alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
torch.set_num_threads(1)
detector, _ = detector_from_file(Path(sys.argv[1]))
labeled = open_labeled(sys.argv[2], None, cache=Path(sys.argv[2]) / "cache", cache_bytes=1 << 30)
out = Path(f"{sys.argv[3]}-{dist.get_rank()}")
try:
    seen = detect_all(detector, labeled, image_size=96, batch_size=4, limits=Limits(score=0.1),
                      group=dist.group.WORLD)
    boxes = [] if seen is None else [[part.tolist() for part in one] for one in seen.found]
    figures = None if seen is None else measure(seen, labeled.names).to_json()
    out.write_text(json.dumps({"figures": figures, "boxes": boxes}))
except DataError as error:
    out.write_text(str(error))
dist.barrier()  # a process that leaves first may take the other down inside torch
dist.destroy_process_group()
"""


def on_ranks(ranks: int, weights: Path, root: Path, out: Path) -> list[str]:
    """Evaluate on several processes; return what each of them wrote."""
    script = out.with_suffix(".py")
    script.write_text(RANK)
    done = run(ranks, out.parent, str(weights), str(root), str(out), script=str(script))
    assert done.returncode == 0, done.stderr
    return [out.with_name(f"{out.name}-{rank}").read_text() for rank in range(ranks)]


@pytest.mark.dist
def test_batches_of_mixed_frames_score_on_two_ranks_as_on_one_exactly(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", MIXED * 3 + MIXED[:2])  # 23 pictures, windows of 2
    weights = tmp_path / "detector.safetensors"
    save_detector(weights, parts_of(lively_detector()), names=NAMES, image_size=96, metadata={})
    [one] = on_ranks(1, weights, root, tmp_path / "one")
    first, second = on_ranks(2, weights, root, tmp_path / "two")
    told = json.loads(one)
    assert first == one and json.loads(second) == {"figures": None, "boxes": []}
    assert told["figures"]["pictures"] == 23 and told["figures"]["boxes"] == 69
    assert sum(len(scores) for _, scores, _ in told["boxes"]) > 230


@pytest.mark.dist
def test_a_bad_picture_of_one_rank_ends_all_of_them_with_its_name(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", MIXED)
    weights = tmp_path / "detector.safetensors"
    save_detector(weights, parts_of(lively_detector()), names=NAMES, image_size=96, metadata={})
    (root / "images" / "3.png").write_bytes(b"no picture")
    told = on_ranks(2, weights, root, tmp_path / "two")
    assert told[0] == told[1] and "3" in told[0] and "not a picture" in told[0]


def test_the_same_names_in_another_order_give_the_same_figures(tmp_path: Path) -> None:
    detector = lively_detector()
    figures: list[Any] = []
    for order in (NAMES, ("blue", "red", "green")):
        labeled = opened(write_set(tmp_path / order[0], MIXED[:3], order))
        numbers = class_numbers("data", labeled.names, NAMES)
        seen = detect_all(
            detector, labeled, image_size=96, limits=Limits(score=0.1), numbers=numbers
        )
        assert seen is not None
        figures.append(measure(seen, NAMES).to_json())
    assert figures[0] == figures[1]
    assert [one["boxes"] for one in figures[0]["per_class"].values()] == [3, 3, 3]


def test_other_names_are_refused_and_the_difference_is_named() -> None:
    with pytest.raises(DataError, match="only the labels have cyan; only the detector has none"):
        class_numbers("data", ["red", "cyan"], ["red"])


def test_a_size_that_the_detector_cannot_take_is_refused(tmp_path: Path) -> None:
    labeled = opened(write_set(tmp_path / "set", MIXED[:1]))
    with pytest.raises(UsageError, match="100 is not a multiple of 32"):
        detect_all(lively_detector(), labeled, image_size=100)


def test_the_command_scores_another_split_of_the_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    root = tmp_path / "root"
    for split, count in (("train", 2), ("val", 3)):
        made = write_set(tmp_path / split, MIXED[:count])
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (made / kind).rename(root / kind / split)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    weights = tmp_path / "detector.safetensors"
    save_detector(weights, parts_of(lively_detector()), names=NAMES, image_size=96, metadata={})
    for key, folder, pictures in (
        ("data.split=train", "evaluation-train", 2),
        ("data.workers=2", "evaluation-val", 3),
    ):
        assert main([str(weights), f"data.val={root}", key]) == 0, capsys.readouterr().err
        told = json.loads((tmp_path / folder / "results.json").read_text())
        assert told["pictures"] == pictures
    assert main([str(weights), f"data.test={root}"]) == 3
    assert "no split 'test'" in capsys.readouterr().err
