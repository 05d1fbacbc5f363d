"""Self-training: what the teacher is sure of is taught, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.augment import Rule
from finetune.detector import Detections, build_detector
from finetune.head import anchors_of
from finetune.weights import detector_from_file, load_init
from groundwork.backbones import build_backbone, load_parts
from groundwork.backbones.contract import Backbone
from groundwork.backbones.product import save_product
from groundwork.config import validate
from groundwork.data.decode import open_picture
from groundwork.data.reading import PLAIN, Reading
from groundwork.errors import CheckpointError, UsageError
from pretext_tasks.regions import Regions, RegionsConfig
from pretext_tasks.self_training import SelfTraining, SelfTrainingConfig
from pretext_tasks.together import together
from tests.record_golden import write_detector

MakeBatch = Callable[..., dict[str, Tensor]]
MakeTask = Callable[..., SelfTraining]

BOX = torch.tensor([[8.0, 8.0, 40.0, 40.0]])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "detector.safetensors"
    write_detector(file)
    return file


@pytest.fixture
def make_task(weights: Path, tiny_backbone: Callable[[], Backbone]) -> MakeTask:
    def make(**changes: Any) -> SelfTraining:
        torch.manual_seed(0)
        keys = {"weights": str(weights)}
        return SelfTraining(tiny_backbone(), SelfTrainingConfig.model_validate(keys | changes))

    return make


@pytest.fixture
def batch(make_batch: MakeBatch) -> dict[str, Tensor]:
    return make_batch(SelfTraining, SelfTrainingConfig(weights="named"))


def _finding(task: SelfTraining, monkeypatch: pytest.MonkeyPatch, *found: Detections) -> None:
    monkeypatch.setattr(task, "_found", lambda batch: list(found))


def _one(box: Tensor, score: float = 0.9, label: int = 1) -> Detections:
    return Detections(box, torch.full((len(box),), score), torch.full((len(box),), label))


NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))


def test_the_teacher_does_not_change(make_task: MakeTask, batch: dict[str, Tensor]) -> None:
    task = make_task().train()
    assert task.teacher is not None
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task(batch).loss.backward()
    assert not any(module.training for module in task.teacher.modules())
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(torch.equal(value, before[k]) for k, value in task.teacher.state_dict().items())
    own = [p for p in task.parameters() if p.requires_grad]
    assert own and all(parameter.grad is not None for parameter in own)


def test_the_student_learns_the_teachers_boxes(
    make_task: MakeTask, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task().train()
    _finding(task, monkeypatch, _one(BOX), _one(BOX, label=0), _one(BOX), NOTHING)
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        output = task(batch)
        output.loss.backward()
        optimizer.step()
    assert output.metrics["taught"].item() == pytest.approx(0.75)
    assert output.metrics["taught_score"].item() == pytest.approx(0.9)
    image = task.coloured(batch["view"], batch["colour"])
    raw = task.head(task.through(task.backbone(image)))
    best = raw.classes.sigmoid().amax(1)  # N C
    assert best[0, 1] > best[0, 0] and best[1, 0] > best[1, 1]
    assert best[3].max() < min(best[0, 1], best[1, 0])


def test_a_batch_in_which_nothing_is_found_teaches_that_there_is_nothing(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    output = make_task(score=0.99, unsure=0.98)(batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.metrics["taught"].item() == output.metrics["taught_score"].item() == 0
    assert output.metrics["localisation"].item() == 0
    assert output.metrics["classification"].item() > 0


def test_what_is_found_without_being_sure_is_neither_taught_nor_denied(
    make_task: MakeTask, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points inside the box have a loss for its class where nothing is found, and not here."""
    task = make_task().eval()
    losses = {}
    for name, score in (("sure", 0.5), ("unsure", 0.3)):
        _finding(task, monkeypatch, *[_one(BOX, score)] * 4)
        output = task(batch)
        losses[name] = output.metrics["classification"].item()
        assert output.metrics["taught"].item() == (name == "sure")
    _finding(task, monkeypatch, *[NOTHING] * 4)
    losses["nothing"] = task(batch).metrics["classification"].item()
    # 84 points a view and two classes: 16 + 1 + 1 points lie inside the box, of one class.
    raw = task.head(task.through(task.backbone(task.coloured(batch["view"], batch["colour"]))))
    costs = torch.nn.functional.softplus(raw.classes)
    anchors = anchors_of(64, 64, raw.boxes)
    within = ((anchors.points > 8) & (anchors.points < 40)).all(1)
    assert within.sum() == 18
    expected = 0.5 * (costs.sum() - costs[:, within, 1].sum())
    assert losses["unsure"] == pytest.approx(expected.item(), rel=1e-4)
    assert losses["nothing"] == pytest.approx(0.5 * costs.sum().item(), rel=1e-4)


def test_a_class_may_have_a_score_of_its_own(
    make_task: MakeTask, weights: Path, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = detector_from_file(weights)[1].names
    task = make_task(score={names[1]: 0.7, names[0]: 0.3}, unsure=0.2)
    found = [_one(BOX, 0.5, label) for label in (0, 1, 0, 1)]
    _finding(task, monkeypatch, *found)
    assert task(batch).metrics["taught"].item() == 0.5
    assert [bool(task._sure(one)) for one in found] == [True, False, True, False]
    # The classes' order is the checkpoint's, whatever the file that is named on a resume says.
    other = make_task(score={names[1]: 0.7, names[0]: 0.3}, unsure=0.2)
    about = json.loads(bytes(other.metadata_bytes.tolist()))
    turned = json.dumps({**about, "names": [names[1], names[0]]}).encode()
    other.metadata_bytes.copy_(torch.tensor(list(turned), dtype=torch.uint8))
    assert [bool(other._sure(one)) for one in found] == [False, True, False, True]
    with pytest.raises(UsageError, match=f"task.score names {names[0]}; the classes of"):
        make_task(score={names[0]: 0.5})
    with pytest.raises(UsageError, match=r"unsure=0\.2 is above dog=0\.1"):
        validate(SelfTrainingConfig, {"score": {"cat": 0.3, "dog": 0.1}, "unsure": 0.2})


def test_the_teacher_sees_no_drawn_colours_and_boxes_end_with_the_view(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    task = make_task()
    first = task._found(batch)
    other = batch | {"colour": batch["colour"].flip(0)}
    assert not torch.equal(
        task.coloured(batch["view"], batch["colour"]), task.coloured(other["view"], other["colour"])
    )
    for one, two in zip(first, task._found(other), strict=True):
        assert torch.equal(one.boxes, two.boxes)
        assert len(one.boxes) > 0 and one.boxes.min() >= 0 and one.boxes.max() <= 64


def test_the_teacher_may_see_the_same_view_larger(make_task: MakeTask) -> None:
    """It is cut anew and not enlarged; its boxes are in pixels of the student's view."""
    generator = np.random.default_rng(0)
    views = SelfTraining.views(SelfTrainingConfig(weights="named", teacher_size=128), 64)
    samples = []
    for number in range(4):
        noise = generator.integers(0, 256, (200, 240, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        drawn = np.random.Generator(np.random.Philox(key=[0, number]))
        samples.append(views(open_picture(file.getvalue()), drawn))
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    large, view = batch["teacher_view"], batch["view"]
    assert large.shape[1:] == (128, 128, 3) and view.shape[1:] == (64, 64, 3)
    large_as_one, as_one = (one.permute(0, 3, 1, 2).float() for one in (large, view))
    smaller = torch.nn.functional.avg_pool2d(large_as_one, 2)
    enlarged = torch.nn.functional.interpolate(as_one, scale_factor=2, mode="bilinear")
    assert (smaller - as_one).abs().mean() < 15  # the same cut, the same turn
    assert (enlarged - large_as_one).abs().mean() > 20  # with what the small one has lost
    found = make_task(teacher_size=128)._found(batch)
    alone = make_task()._found({"view": large, "colour": batch["colour"]})
    assert sum(len(one.boxes) for one in found) > 0
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes / 2)
        assert torch.equal(one.scores, other.scores)
    task = make_task(teacher_size=128)
    assert task(batch).loss.isfinite()
    assert task.warnings(256, PLAIN) == []
    assert (
        "sees views of task.teacher_size=160" in make_task(teacher_size=160).warnings(64, PLAIN)[0]
    )


def test_what_is_too_small_for_the_student_is_neither_taught_nor_denied(
    make_task: MakeTask, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task().eval()
    small = torch.tensor([[12.0, 12.0, 12.0 + Rule().min_side - 0.5, 40.0]])
    losses = []
    for found in (_one(small), _one(small, 0.2), NOTHING):
        _finding(task, monkeypatch, *[found] * 4)
        output = task(batch)
        assert output.metrics["taught"].item() == 0
        losses.append(output.metrics["classification"].item())
    assert losses[0] == losses[1] < losses[2]


def test_the_middle_side_of_what_is_taught_is_told(
    make_task: MakeTask, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    _finding(
        task,
        monkeypatch,
        _one(BOX),
        _one(BOX / 2),
        _one(BOX * torch.tensor([1, 1, 1, 0.4])),
        NOTHING,
    )
    assert task(batch).metrics["side"].item() == pytest.approx(16.0)
    _finding(task, monkeypatch, *[NOTHING] * 4)  # says nothing of how large things are
    assert task(batch).metrics["side"].item() == pytest.approx(16.0)


def test_a_box_outside_the_view_is_not_taught(
    make_task: MakeTask, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    boxes = torch.cat((BOX, BOX - 60, BOX + torch.tensor([56.0, 0.0, 56.0, 0.0])))
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    read = boxes.expand(4, 3, 4), scores.expand(4, 3, 1)
    assert task.teacher is not None
    monkeypatch.setattr(task.teacher.head, "read", lambda *_: read)
    for one in task._found(batch):
        assert torch.equal(one.boxes, BOX)


def test_fine_tuning_starts_from_the_whole_student(
    weights: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """The class branch is for the teacher's classes, and the file says which."""
    task = SelfTraining(build_backbone("yolo12n"), SelfTrainingConfig(weights=str(weights)))
    assert set(task.product()) == {"backbone", "neck", "head"}
    file = tmp_path / "pretrained.safetensors"
    save_product(file, task.product(), task.metadata())
    detector = build_detector("yolo12n", 2)
    begun = load_init(detector, file, classes=("a", "b"))
    assert "head's class branch" in begun.loaded
    assert task.teacher is not None
    mine, taught = task.head.state_dict(), task.teacher.head.state_dict()
    last = "classes.0.2.weight"
    assert torch.equal(detector.head.state_dict()[last], mine[last])
    assert not torch.equal(mine[last], taught[last])
    other = load_init(build_detector("yolo12n", 2), file, classes=("b", "a"))
    assert "head's class branch" not in other.loaded
    assert "the file's classes are a, b, and these are b, a" in other.sentence()


def test_the_student_is_a_detector_as_it_is(
    weights: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """Its file can be scored, finds boxes, and teaches the next student."""
    task = SelfTraining(build_backbone("yolo12n"), SelfTrainingConfig(weights=str(weights))).eval()
    file = tmp_path / "pretrained.safetensors"
    save_product(file, task.product(), task.metadata())
    detector, about = detector_from_file(file)
    assert about.names == ("a", "b")
    assert about.image_size == 64
    mine = task.head(task.through(task.backbone(torch.ones(1, 3, 64, 64))))
    for one, other in zip(detector(torch.ones(1, 3, 64, 64)), mine, strict=True):
        assert one is other is None or torch.equal(one, other)
    next_task = SelfTraining(build_backbone("yolo12n"), SelfTrainingConfig(weights=str(file)))
    assert next_task.metadata() == task.metadata()


def test_half_precision_does_not_move_the_boxes(
    make_task: MakeTask, batch: dict[str, Tensor]
) -> None:
    """Only the network is run in it: of the same logits come the same boxes, to the last bit."""
    task = make_task().eval()
    assert task.teacher is not None
    raw = task.teacher(torch.rand(4, 3, 64, 64))
    task.teacher.register_forward_hook(lambda *_: raw)
    whole = task._found(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = task._found(batch)
    for one, other in zip(whole, half, strict=True):
        assert torch.equal(one.boxes, other.boxes)


def test_a_teacher_that_was_trained_on_other_pictures_is_told(make_task: MakeTask) -> None:
    """It was trained at 64 px, on pictures read as they are."""
    task = make_task()
    assert task.warnings(64, PLAIN) == task.warnings(96, PLAIN) == []
    assert "trained at 64 px and sees views of image_size=256" in task.warnings(256, PLAIN)[0]
    assert "data.bands=None" in task.warnings(64, Reading(bands=(3, 2, 1)))[0]


def test_classes_are_those_of_the_checkpoint_whatever_the_file_says_later(
    make_task: MakeTask,
) -> None:
    first, second = make_task(), make_task()
    other = json.dumps({"names": ["bee", "a"], "image_size": 1024}).encode()
    second.metadata_bytes = torch.tensor(list(other), dtype=torch.uint8)
    assert second.metadata()["names"] == ["bee", "a"]
    second.load_state_dict(first.state_dict())
    assert second.metadata()["names"] == ["a", "b"]


def test_a_student_starts_from_the_boxes_of_regions(weights: Path, tmp_path: Path) -> None:
    regions = Regions(build_backbone("yolo12n"), RegionsConfig())
    file = tmp_path / "pretrained.safetensors"
    save_product(file, regions.product(), {})
    task = SelfTraining(build_backbone("yolo12n"), SelfTrainingConfig(weights=str(weights)))
    said = load_parts(task.product(), file, task.metadata()["names"])
    assert "left as initialised" not in said[0] + said[1]
    assert said[2] == "The head's class branch is not in the file and left as initialised."
    for name, value in regions.head.boxes.state_dict().items():
        assert torch.equal(value, task.head.boxes.state_dict()[name])
    save_product(file, task.product(), {"names": ["b", "a"]})
    assert "the file's classes are b, a" in load_parts(task.product(), file, ["a", "b"])[2]


def test_two_heads_are_refused(weights: Path, tiny_backbone: Callable[[], Backbone]) -> None:
    kind = together("two", {"regions": Regions, "self_training": SelfTraining})
    config = kind.Config.model_validate({"self_training": {"weights": str(weights)}})
    with pytest.raises(UsageError, match="regions and self_training each train a head"):
        kind(tiny_backbone(), config)


def test_pictures_show_what_is_taught(
    make_task: MakeTask, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    _finding(task, monkeypatch, _one(BOX), NOTHING, NOTHING, NOTHING)
    shown = task.pictures(batch)
    assert set(shown) == {"taught", "found"}
    assert shown["taught"][0, :, 8, 20].tolist() == [0, 255, 0]


def test_a_file_that_is_no_detector_of_these_pictures_is_refused(
    tiny_backbone: Callable[[], Backbone], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"unsure=0\.5 is above score=0\.4"):
        validate(SelfTrainingConfig, {"unsure": 0.5}, prefix="task.")
    with pytest.raises(UsageError, match=r"task\.weights is not set"):
        SelfTraining.views(SelfTrainingConfig(), 64)
    with pytest.raises(UsageError, match=r"task\.weights is not set"):
        SelfTraining(tiny_backbone(), SelfTrainingConfig())
    file = tmp_path / "pretrained.safetensors"
    save_product(file, {"backbone": build_backbone("yolo12n")}, {})
    with pytest.raises(CheckpointError, match=r"task\.weights=.*holds a backbone and no detector"):
        SelfTraining(tiny_backbone(), SelfTrainingConfig(weights=str(file)))
