"""What a teacher finds in whole pictures: looked for once, and taken along by every view."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw

from finetune.augment import Rule
from finetune.detect import detect_all
from finetune.detector import Limits
from finetune.weights import detector_from_file
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.config import validate
from groundwork.data.decode import Picture, open_picture
from groundwork.data.labels import open_labeled
from groundwork.data.memory import Memory
from groundwork.errors import CheckpointError, UsageError
from pretext_tasks.crops import Turn, in_view
from pretext_tasks.found_once import MOST, FoundOnce, Teacher, digest_of
from pretext_tasks.one_view import OneView
from pretext_tasks.self_training import SelfTraining, SelfTrainingConfig
from tests.record_golden import write_detector

BOXES = [(20, 10, 60, 40), (100, 50, 150, 90), (10, 70, 30, 95)]  # of a 160 x 100 picture


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "detector.safetensors"
    write_detector(file)
    return file


@pytest.fixture
def picture() -> Picture:
    image = Image.new("RGB", (160, 100))
    for box, colour in zip(BOXES, ((255, 0, 0), (0, 255, 0), (0, 0, 255)), strict=True):
        left, top, right, bottom = box
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return open_picture(file.getvalue())


def _config(weights: Path, **keys: Any) -> SelfTrainingConfig:
    return SelfTrainingConfig.model_validate({"weights": str(weights), "find": "picture"} | keys)


def _teacher(weights: Path, **changes: Any) -> Teacher:
    keys: dict[str, Any] = {"image_size": 64, "looks": 1, "score": 0.1, "iou": 0.5}
    return Teacher(weights, digest_of(weights), **(keys | changes))


def _finding(monkeypatch: pytest.MonkeyPatch, score: float = 0.9) -> list[int]:
    """Let teachers find BOXES, of classes 0, 1 and 2; return where looks are counted."""
    looks = [0]

    def find(teacher: Teacher, picture: Picture) -> npt.NDArray[np.float32]:
        looks[0] += 1
        sides = [picture.width, picture.height] * 2
        rows = [[*np.divide(box, sides), score, n] for n, box in enumerate(BOXES)]
        return np.array(rows, np.float32)

    monkeypatch.setattr(Teacher, "find", find)
    return looks


def test_boxes_lie_in_every_view_where_the_picture_shows_them(
    weights: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _finding(monkeypatch)
    keys = _config(weights, crop_scale=(0.3, 1.0), rotate=0.75)
    views = FoundOnce(OneView(keys, 96), _teacher(weights))
    seen = [0, 0, 0]
    for seed in range(60):
        made = views(picture, np.random.default_rng(seed))
        count = int(made["count"])
        assert made["boxes"].shape == (MOST, 4) and not made["boxes"][count:].any()
        for box, score, label in zip(
            made["boxes"][:count], made["scores"][:count], made["classes"][:count], strict=True
        ):
            if box[2] - box[0] < 3 or box[3] - box[1] < 3:
                continue
            y, x = np.nonzero(made["view"][..., label] > 127)
            painted = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert np.abs(painted - box).max() <= 1.0, (seed, label)
            assert score in (0.0, np.float32(0.9))
            seen[int(label)] += 1
    assert min(seen) > 10


def test_a_box_that_is_mostly_outside_has_no_score(
    weights: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _finding(monkeypatch)
    least = Rule().min_visible
    views = FoundOnce(OneView(_config(weights), 64), _teacher(weights))

    def of(left: float) -> dict[str, Any]:
        monkeypatch.setattr(OneView, "place", lambda *_: ((left, 0, 160, 100), Turn(False, 0)))
        return views(picture, np.random.default_rng(0))

    enough, little = 60 - 40 * (least + 0.05), 60 - 40 * (least - 0.05)
    assert of(enough)["scores"][:3].tolist() == pytest.approx([0.9, 0.9, 0.0])
    assert of(little)["scores"][:2].tolist() == pytest.approx([0.0, 0.9])
    gone = of(61.0)  # the first and third are outside
    assert gone["count"] == 1 and gone["classes"][0] == 1


def test_in_view_tells_the_shown_share() -> None:
    boxes = np.array([[0.0, 0.0, 0.5, 1.0], [0.4, 0.0, 0.6, 1.0]], np.float32)
    seen, shown = in_view(boxes, 100, 50, (50.0, 0.0, 100.0, 50.0), Turn(False, 0))
    assert shown.tolist() == pytest.approx([0.0, 0.5])
    np.testing.assert_allclose(seen[1], [0, 0, 0.2, 1], atol=1e-6)
    turned, _ = in_view(boxes, 100, 50, (50.0, 0.0, 100.0, 50.0), Turn(True, 1))
    np.testing.assert_allclose(turned[1], [0, 0, 1, 0.2], atol=1e-6)


def test_a_picture_is_looked_at_once(
    weights: Path, picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = _finding(monkeypatch)
    memory = Memory(tmp_path)
    views = FoundOnce(OneView(_config(weights), 64), _teacher(weights))
    fresh = [views(picture, np.random.default_rng(seed)) for seed in range(3)]
    assert looks == [3]
    kept = views.with_memory(memory)
    for seed, made in enumerate(fresh):
        again = kept(picture, np.random.default_rng(seed))
        assert made.keys() == again.keys()
        for name, value in made.items():
            np.testing.assert_array_equal(value, again[name])
    assert looks == [4]
    # Another detector, or another way to look, finds other things.
    for changes in ({"looks": 2}, {"image_size": 96}, {"score": 0.2}, {"iou": 0.6}):
        other = FoundOnce(OneView(_config(weights), 64), _teacher(weights, **changes))
        other.with_memory(memory)(picture, np.random.default_rng(0))
    assert looks == [8]


@pytest.mark.parametrize("looks", [1, 4])
def test_what_is_found_is_what_evaluation_finds(
    weights: Path, picture: Picture, labeled: Path, looks: int
) -> None:
    detector, _ = detector_from_file(weights)
    samples = open_labeled(str(labeled), "val", cache=labeled, cache_bytes=10**9)
    seen = detect_all(detector, samples, image_size=96, looks=looks, limits=Limits(0.1, 0.5, MOST))
    assert seen is not None
    teacher = _teacher(weights, image_size=96, looks=looks, score=0.1, iou=0.5)
    for number, wanted in enumerate(seen.found):
        one = open_picture(samples.read(number, 0).image)
        got = teacher.find(one)
        sides = np.array([one.width, one.height] * 2)
        kept = (wanted.boxes[:, 2:] > wanted.boxes[:, :2]).all(1)
        assert len(got) == kept.sum() > 0
        np.testing.assert_allclose(got[:, :4] * sides, wanted.boxes[kept], atol=0.05)
        np.testing.assert_allclose(got[:, 4], wanted.scores[kept], atol=1e-3)
    samples.close()
    found = _teacher(weights, looks=looks).find(picture)
    assert found.dtype == np.float32 and found.shape[1] == 6 and len(found) > 0
    assert (found[:, :2] < found[:, 2:4]).all() and found[:, :4].min() >= 0
    assert found[:, :4].max() <= 1 and found[:, 4].min() > 0.1
    assert set(found[:, 5].tolist()) <= {0.0, 1.0}


def test_where_nothing_is_found_nothing_is_kept(
    weights: Path, picture: Picture, tmp_path: Path, tiny_backbone: Callable[[], Backbone]
) -> None:
    teacher = _teacher(weights, score=0.99)
    views = FoundOnce(OneView(_config(weights), 64), teacher).with_memory(Memory(tmp_path))
    for _ in range(2):
        made = views(picture, np.random.default_rng(0))
        assert made["count"] == 0 and not made["scores"].any()
    batch = {name: torch.from_numpy(value[None]) for name, value in made.items()}
    output = SelfTraining(tiny_backbone(), _config(weights))(batch)
    assert output.metrics["taught"] == 0 and output.loss.isfinite()


def test_the_task_teaches_it(
    weights: Path, picture: Picture, tiny_backbone: Callable[[], Backbone]
) -> None:
    keys = _config(weights, score=0.4, looks=2, colour=Colour())
    views = SelfTraining.views(keys, 64)
    assert isinstance(views, FoundOnce)
    assert views.teacher.image_size == detector_from_file(weights)[1].image_size == 64
    made = [views(picture, np.random.default_rng(seed)) for seed in range(2)]
    batch = {name: torch.from_numpy(np.stack([one[name] for one in made])) for name in made[0]}
    task = SelfTraining(tiny_backbone(), keys).train()
    output = task(batch)
    output.loss.backward()
    sure = [float((one["scores"][: one["count"]] >= 0.4).sum()) for one in made]
    assert 0 < output.metrics["taught"].item() <= sum(sure) / 2
    assert not any("teacher." in name for name in task.state_dict())
    assert task.metadata()["detector"]["num_classes"] == 2
    assert set(task.pictures(batch)) == {"taught", "found"}


def test_another_file_on_a_resume_is_refused(
    weights: Path, tiny_backbone: Callable[[], Backbone]
) -> None:
    task = SelfTraining(tiny_backbone(), _config(weights))
    kept = task.state_dict()
    SelfTraining(tiny_backbone(), _config(weights)).load_state_dict(kept)
    teacher = _teacher(weights)
    weights.write_bytes(
        weights.read_bytes().replace(b'"a"', b'"c"').replace(b'\\"a\\"', b'\\"c\\"')
    )
    with pytest.raises(CheckpointError, match=r"another file than the one that this run began"):
        SelfTraining(tiny_backbone(), _config(weights)).load_state_dict(kept)
    with pytest.raises(CheckpointError, match=r"another file than the one that training began"):
        teacher.find(open_picture(_png()))


def test_keys_that_do_not_go_together_are_refused(weights: Path) -> None:
    with pytest.raises(UsageError, match="looks is about find=picture"):
        validate(SelfTrainingConfig, {"weights": str(weights), "looks": 4})


def test_a_recipe_may_name_a_file_that_is_made_later(
    weights: Path, tiny_backbone: Callable[[], Backbone]
) -> None:
    keys = _config(weights.with_name("later.safetensors"))
    assert isinstance(SelfTraining.views(keys, 64), FoundOnce)
    with pytest.raises(CheckpointError, match=r"later\.safetensors"):
        SelfTraining(tiny_backbone(), keys)


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()
