"""Regions: boxes follow the view, the detector's loss is the second stage's, all of it is kept."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from finetune.assign import Targets
from finetune.detector import Detector, build_detector, own_width
from finetune.losses import DetectionLoss
from finetune.recipe import LossKeys
from finetune.weights import load_init
from groundwork.backbones import build_backbone, load_parts
from groundwork.backbones.contract import Backbone
from groundwork.backbones.product import save_product
from groundwork.data.decode import open_picture
from groundwork.data.memory import Memory
from groundwork.data.reading import Reading
from groundwork.errors import UsageError
from pretext_tasks.contract import remembering
from pretext_tasks.crops import Turn
from pretext_tasks.regions import Regions, RegionsConfig, RegionsViews, _in_view
from pretext_tasks.stable_regions import KINDS, RegionKeys, stable_regions
from pretext_tasks.together import TogetherViews

PLAIN: dict[str, Any] = {"flip": 0.0, "crop_scale": (1.0, 1.0)}


def _picture() -> bytes:
    """One dark square on a light ground, left of the middle."""
    image = Image.new("RGB", (128, 128), "#c8c0b8")
    ImageDraw.Draw(image).rectangle((16, 48, 47, 79), fill="#302040")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _entries(seed: int = 0, **changes: Any) -> dict[str, Any]:
    views = Regions.views(RegionsConfig(**PLAIN | changes), 128)
    return views(open_picture(_picture()), np.random.Generator(np.random.Philox(key=[0, seed])))


def _batch(count: int = 2) -> dict[str, Tensor]:
    entries = [_entries(seed) for seed in range(count)]
    return {k: torch.from_numpy(np.stack([one[k] for one in entries])) for k in entries[0]}


@pytest.fixture
def make_task(tiny_backbone: Callable[[], Backbone]) -> Callable[..., Regions]:
    def make(**changes: Any) -> Regions:
        torch.manual_seed(0)
        return Regions(tiny_backbone(), RegionsConfig(**changes))

    return make


def test_a_box_is_where_its_region_is_in_the_view() -> None:
    entries = _entries()
    assert entries["count"] == 1
    np.testing.assert_allclose(entries["boxes"][0], (16, 48, 48, 80), atol=1.5)
    assert not entries["boxes"][1:].any()


@pytest.mark.parametrize("seed", range(6))
def test_a_box_follows_turns_and_crops(seed: int) -> None:
    entries = _entries(seed, flip=0.5, rotate=0.75, crop_scale=(0.6, 1.0))
    dark = entries["image"].sum(2) < 300
    assert entries["count"] >= 1
    for left, top, right, bottom in entries["boxes"][: entries["count"]].round().astype(int):
        inside = dark[top:bottom, left:right]
        assert inside.mean() > 0.85
        assert inside.sum() > 0.85 * dark.sum()


def test_the_loss_is_the_second_stages(make_task: Callable[..., Regions]) -> None:
    task, batch = make_task(), _batch()
    output = task(batch)
    detector = Detector(task.backbone, task.neck or torch.nn.Identity(), task.head)
    image = task.coloured(batch["image"], batch["colour"])
    boxes = torch.cat([b[:n] for b, n in zip(batch["boxes"], batch["count"], strict=True)])
    targets = Targets(torch.tensor([0, 1]), boxes, batch["kinds"][:, 0])
    wanted = DetectionLoss(LossKeys())(detector, detector(image), (128, 128), targets)
    torch.testing.assert_close(output.loss, wanted.total)
    assert output.metrics["regions"] == 1
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    torch.testing.assert_close(output.metrics["side"], sides.min())
    parts = {"classification", "localisation", "distribution"}
    assert set(output.metrics) == {"regions", "side", *parts}


def test_a_batch_without_regions_teaches_that_there_is_nothing(
    make_task: Callable[..., Regions],
) -> None:
    task, batch = make_task(), _batch()
    batch["count"] = torch.zeros_like(batch["count"])
    output = task(batch)
    output.loss.backward()
    assert output.metrics["localisation"] == 0 and output.loss > 0
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_a_region_is_learned(make_task: Callable[..., Regions]) -> None:
    task, batch = make_task(), _batch()
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
    detector = Detector(task.backbone, task.neck or torch.nn.Identity(), task.head).eval()
    boxes, scores = detector.predict(task.coloured(batch["image"], batch["colour"]))
    best = boxes[0, scores[0].max(1).values.argmax()]
    torch.testing.assert_close(best, batch["boxes"][0, 0], atol=8.0, rtol=0)


def test_the_width_is_the_one_that_fine_tuning_gives() -> None:
    assert own_width("yolo12s") == "s"
    assert own_width("timm/test_resnet") == "n"
    task = Regions(build_backbone("yolo12s"), RegionsConfig())
    assert task.neck is not None and task.neck.letter == "s"


def test_a_second_pretraining_starts_from_neck_and_boxes_too(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    torch.manual_seed(0)
    first = Regions(build_backbone("yolo12n"), RegionsConfig())
    save_product(path, first.product(), {"task": "regions"})
    second = Regions(build_backbone("yolo12n"), RegionsConfig())
    classes = {k: v.clone() for k, v in second.head.classes.state_dict().items()}
    said = load_parts(second.product(), path)
    parts = [one.split(" of the ")[1] for one in said]
    assert parts[0].startswith("neck") and parts[1].startswith("head's box branch")
    assert first.neck is not None and second.neck is not None
    for one, other in ((first.neck, second.neck), (first.head.boxes, second.head.boxes)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    kept = second.head.classes.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in classes.items())

    wide = Regions(build_backbone("yolo12n"), RegionsConfig(neck="s"))
    assert all("of another width" in one for one in load_parts(wide.product(), path))
    save_product(path, {"backbone": first.backbone}, {"task": "byol"})
    assert load_parts(second.product(), path) == [
        "The neck is not in the file and left as initialised.",
        "The head's box branch is not in the file and left as initialised.",
    ]


@pytest.mark.parametrize("classes", [3, KINDS, 80])
def test_fine_tuning_starts_from_all_but_the_class_branch(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    task = Regions(build_backbone("yolo12n"), RegionsConfig())
    save_product(tmp_path / "pretrained.safetensors", task.product(), {"task": "regions"})
    detector = build_detector("yolo12n", classes)
    report = load_init(detector, tmp_path / "pretrained.safetensors")
    assert report.loaded == {"backbone", "neck", "head's box branch"}
    assert all(part.missing == part.unexpected == [] for part in report.parts)
    picture = torch.rand(1, 3, 64, 64)
    own = Detector(task.backbone, task.neck or torch.nn.Identity(), task.head).eval()(picture)
    torch.testing.assert_close(detector.eval()(picture).boxes, own.boxes)


def test_one_class_for_all_where_kinds_are_not_wanted() -> None:
    assert Regions(build_backbone("yolo12n"), RegionsConfig(kinds=False)).head.num_classes == 1
    assert not _entries(kinds=False)["kinds"].any()


def test_a_size_that_no_backbone_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        Regions.views(RegionsConfig(), 100)


def test_a_picture_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []

    def search(pixels: Any, keys: Any) -> Any:
        searched.append(pixels.shape)
        return stable_regions(pixels, keys)

    monkeypatch.setattr("pretext_tasks.regions.stable_regions", search)
    config, memory = RegionsConfig(**PLAIN), Memory(tmp_path)
    plain = RegionsViews(config, 64)(open_picture(_picture()), np.random.default_rng(0))
    searched.clear()
    for keeping in (memory, memory, Memory(tmp_path)):  # of another worker, or another run
        views = remembering(RegionsViews(config, 64), keeping)
        entries = views(open_picture(_picture()), np.random.default_rng(0))
        np.testing.assert_array_equal(entries["boxes"], plain["boxes"])
    assert searched == [(128, 128, 3)]
    Image.new("RGB", (600, 300)).save(file := io.BytesIO(), "PNG")
    for _ in range(2):  # without a region, too; and searched no larger than at the first resolution
        assert views(open_picture(file.getvalue()), np.random.default_rng(0))["count"] == 0
    assert searched == [(128, 128, 3), (192, 384, 3)]


def test_what_changes_regions_is_not_taken_from_memory(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    image = open_picture(_picture())
    first = RegionsViews(RegionsConfig(), 64, memory).regions(image)
    none = RegionsViews(RegionsConfig(regions=RegionKeys(votes=1000.0)), 64, memory).regions(image)
    assert len(first) == 1 and len(none) == 0
    exchanged = open_picture(_picture(), Reading(bands=(3, 2, 1)))
    assert exchanged.digest() != image.digest() == open_picture(_picture()).digest()


def test_tasks_beside_it_share_the_memory(tmp_path: Path) -> None:
    views = TogetherViews((("a", RegionsViews(RegionsConfig(), 64)), ("b", lambda *_: {})))
    shared = remembering(views, Memory(tmp_path))
    assert isinstance(shared, TogetherViews)
    assert isinstance(shared.parts[0][1], RegionsViews) and shared.parts[0][1].memory is not None
    assert pickle.loads(pickle.dumps(shared.parts[0][1])) == shared.parts[0][1]


def test_a_region_of_which_little_is_seen_is_left_out() -> None:
    picture = open_picture(_picture())  # 128 x 128
    regions = np.array([[0, 0, 32, 32], [60, 60, 70, 70], [96, 0, 98, 64]], np.float32)
    regions /= 128
    turn = Turn(mirrored=False, quarters=0)

    def seen(*box: float) -> list[list[float]]:
        found: list[list[float]] = _in_view(regions, picture, box, turn, 64).tolist()  # type: ignore[arg-type]
        return found

    assert seen(0, 0, 128, 128) == [[0, 0, 16, 16], [30, 30, 35, 35]]  # the third is 1 px wide
    assert seen(16, 0, 80, 64)[0] == [0, 0, 16, 32]  # half of the first
    assert len(seen(17, 0, 81, 64)) == 0  # less; of the second a sixth
    mirrored = _in_view(regions, picture, (0, 0, 64, 64), Turn(True, 1), 64)  # then a quarter turn
    np.testing.assert_allclose(mirrored[0], [0, 0, 32, 32])


def test_kinds_follow_the_drawn_colours() -> None:
    grey = _entries(colour={"probability": 0.0, "grayscale": 1.0, "blur": 0.0})
    plain = _entries(colour={"probability": 0.0, "grayscale": 0.0, "blur": 0.0})
    assert grey["count"] == plain["count"] == 1
    # Large (16); darker; redder (2) and bluer (4) than the ground, until both are grey.
    assert plain["kinds"][0] == 22 and grey["kinds"][0] == 16
