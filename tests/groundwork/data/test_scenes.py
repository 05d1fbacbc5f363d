"""Claims about the drawn aerial scenes: exact boxes, always the same, kept whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from groundwork.data import scenes
from groundwork.data.scene_drawing import VERSION, draw_scene, draw_thing, plan_scene
from groundwork.data.scene_labels import CLASSES, View, label_things
from groundwork.data.scene_shapes import Shape, rectangle
from groundwork.data.scene_site import Site, Thing
from groundwork.data.scene_vehicles import VEHICLES
from groundwork.errors import DataError, UsageError

ROOT = Path(scenes.__file__).parents[2]
# What scenes 0 to 3 of seed 0 show: classes, and the mean of 2 x 2 quarters. If this test fails
# after a change of the drawing, raise VERSION and write the new figures down here.
GOLDEN: dict[int, tuple[list[int], list[int]]] = {
    0: ([1, 0, 4, 0, 0], [138, 100, 143, 159]),
    1: ([10, 1, 6, 2, 0], [120, 98, 121, 97]),
    2: ([4, 1, 0, 3, 0], [89, 71, 107, 94]),
    3: ([6, 2, 0, 2, 1], [109, 128, 123, 109]),
}


def site_of(*things: Thing, extent: float = 64.0, heading: float = 0.0) -> Site:
    """A site of the given things; 64 m are 256 pixels of 0.25 m."""
    return Site(Random(0), extent, heading, (1.0, 0.0), things=list(things))


def drawn_extent(thing: Thing, site: Site, size: int) -> npt.NDArray[np.float64]:
    """The box, in pixels, of what changes when a thing is drawn alone, at twice the size."""
    canvas = Image.new("RGB", (2 * size, 2 * size), (255, 0, 255))
    draw_thing(ImageDraw.Draw(canvas), thing, View(site, 2 * size))
    changed = (np.asarray(canvas) != (255, 0, 255)).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 2


def test_boxes_lie_within_a_pixel_of_what_each_thing_changes_when_drawn_alone() -> None:
    seen, errors = set(), []
    for index in range(12):
        site = plan_scene(Random(f"boxes {index}"))
        for thing in site.things:
            alone = site_of(thing, extent=site.extent, heading=site.heading)
            boxes, classes = label_things(alone, 160)
            for box, place in zip(boxes, classes, strict=True):
                errors.append(drawn_extent(thing, alone, 160) - box)
                # Where the picture's edge cuts off a slender tip, half a pixel of width is more.
                whole = box.min() > 0 and box.max() < 160
                limit = 1.0 if whole else 2.0
                assert np.abs(errors[-1]).max() <= limit, (index, CLASSES[place], errors[-1])
                seen.add(CLASSES[place])
    assert seen == set(CLASSES)
    # On both sides alike: the boxes are not shifted against the picture.
    assert np.abs(np.mean(errors, axis=0)[:2] + np.mean(errors, axis=0)[2:]).max() < 0.05


def test_boxes_of_a_whole_scene_are_those_of_its_things() -> None:
    scene = draw_scene(3, 5)
    site = plan_scene(Random(f"scene {VERSION} 3 5"))
    alone = [
        tuple(box)
        for thing in site.things
        for box in label_things(site_of(thing, extent=site.extent, heading=site.heading), 256)[0]
    ]
    assert len(scene.boxes) > 0
    assert {tuple(box) for box in scene.boxes} <= set(alone)


def square(x: float, y: float, kind: str | None = "car", turn: float = 0.0) -> Thing:
    """A square of 8 m, 32 pixels."""
    return Thing(kind, Shape([(rectangle(-4, -4, 4, 4), (9, 9, 9))], 1, 1.0), x, y, turn)


def test_a_box_is_cut_at_the_edge_of_the_picture() -> None:
    # The middle of the square lies 3 m (12 pixels) inside the right edge.
    boxes, classes = label_things(site_of(square(29, 0)), 256)
    np.testing.assert_allclose(boxes, [[228, 112, 256, 144]])
    assert classes.tolist() == [0]
    # On its corner, half the diagonal is 4 * sqrt(2) m; the part inside is a kite whose height is
    # the whole diagonal, since its upper and lower corners are inside.
    boxes, _ = label_things(site_of(square(29, 0, turn=math.pi / 4)), 256)
    half = 16 * math.sqrt(2)
    np.testing.assert_allclose(boxes, [[244 - half, 128 - half, 256, 128 + half]], rtol=1e-6)
    # 1 m outside, the upper and lower corners are cut off, and so are more than half of it.
    assert len(label_things(site_of(square(33, 0)), 256)[0]) == 0


def test_the_box_of_a_cut_thing_ends_where_its_visible_part_ends() -> None:
    # A bar of 16 m by 4 m, turned by 45 degrees, whose lower end leaves at the right: the box of
    # the whole, merely clipped, would be higher than what is to be seen.
    bar = Thing("truck", Shape([(rectangle(-8, -2, 8, 2), (9, 9, 9))], 1, 1.0), 30, 0, math.pi / 4)
    site = site_of(bar)
    boxes, _ = label_things(site, 256)
    assert np.abs(boxes[0] - drawn_extent(bar, site, 256)).max() <= 1.0
    # The right edge lies 2 m from its middle; its lower side leaves the picture 2 + 2 * sqrt(2) m
    # below the middle, and the whole would reach 5 * sqrt(2) m.
    assert boxes[0][3] == pytest.approx(128 + 4 * (2 + 2 * math.sqrt(2)), abs=1e-4)


def test_what_is_hidden_by_more_than_half_is_not_labeled() -> None:
    site = site_of(square(0, 0))
    assert len(label_things(site, 256)[0]) == 1
    site.trees = [(0.0, 4.0, 4.0)]  # a crown over less than half
    assert len(label_things(site, 256)[0]) == 1
    site.trees = [(0.0, 0.5, 4.0)]
    assert len(label_things(site, 256)[0]) == 0
    roof = site_of(square(0, 0), square(0, 5, "building"))
    assert sorted(label_things(roof, 256)[1]) == [0, 3]
    roof = site_of(square(0, 0), square(0, 3, "building"))
    assert label_things(roof, 256)[1].tolist() == [3]


def test_clutter_and_specks_are_not_labeled() -> None:
    assert len(label_things(site_of(square(0, 0, None)), 256)[0]) == 0
    assert len(label_things(site_of(square(0, 0), extent=64 * 9), 256)[0]) == 0


def test_a_scene_depends_on_its_seed_and_index_alone() -> None:
    first = draw_scene(7, 11)
    draw_scene(7, 12)
    again = draw_scene(7, 11)
    assert first.picture.shape == (256, 256, 3)
    assert [array.dtype.name for array in first] == ["uint8", "float32", "int64"]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (draw_scene(7, 12).picture != first.picture).any()
    assert (draw_scene(8, 11).picture != first.picture).any()


def test_the_size_is_only_a_resolution() -> None:
    small, large = draw_scene(1, 4, 128), draw_scene(1, 4, 256)
    assert small.picture.shape == (128, 128, 3)
    assert len(small.boxes) >= 5
    same = [np.abs(large.boxes / 2 - box).max(axis=1).min() < 1e-3 for box in small.boxes]
    assert np.mean(same) >= 0.8  # whether half of a thing is to be seen is counted in pixels
    coarse = np.asarray(Image.fromarray(large.picture).resize((8, 8), Image.Resampling.BOX), int)
    fine = np.asarray(Image.fromarray(small.picture).resize((8, 8), Image.Resampling.BOX), int)
    assert np.abs(coarse - fine).mean() < 8


def test_a_change_of_the_drawing_raises_the_version() -> None:
    for index, (classes, quarters) in GOLDEN.items():
        scene = draw_scene(0, index)
        assert np.bincount(scene.classes, minlength=len(CLASSES)).tolist() == classes
        shrunk = Image.fromarray(scene.picture).convert("L").resize((2, 2), Image.Resampling.BOX)
        assert np.abs(np.asarray(shrunk, int).ravel() - quarters).max() <= 2
    assert VERSION == 1 and len(GOLDEN) == 4


def test_colour_does_not_give_the_class_away() -> None:
    random = Random(0)
    means = []
    for make in VEHICLES.values():
        colours = [part[1] for _ in range(600) for part in make(random).parts[:1]]
        means.append(np.mean(colours, axis=0))
    spread = np.max(means, axis=0) - np.min(means, axis=0)
    assert spread.max() < 16, means  # of 255; the standard error of each mean is about 3


def test_every_class_is_common_and_boxes_lie_inside() -> None:
    counts: npt.NDArray[np.int64] = np.zeros(len(CLASSES), np.int64)
    for index in range(60):
        scene = draw_scene(2, index, 128)
        counts += np.bincount(scene.classes, minlength=len(CLASSES))
        assert scene.boxes.min(initial=0) >= 0 and scene.boxes.max(initial=0) <= 128
        assert ((scene.boxes[:, 2:] - scene.boxes[:, :2]) >= 4).all()
    assert counts.min() >= 20, dict(zip(CLASSES, counts.tolist(), strict=True))


def test_scenes_are_drawn_once_and_say_what_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = scenes.open_scenes(tmp_path, count=5, size=96, seed=4)
    assert "drawn pictures, not photographs: 5 aerial scenes" in caplog.text
    assert str(tmp_path) in caplog.text
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    second = scenes.open_scenes(tmp_path, count=5, size=96, seed=4)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == written
    assert first.fingerprint == second.fingerprint and len(second) == 5
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert f"scenes-v{VERSION}-" in folder.name
    scene, sample = draw_scene(4, 2, 96), second.read(0, 2)
    picture = np.asarray(Image.open(io.BytesIO(sample.image)), int)
    assert np.abs(picture - scene.picture).mean() < 6
    with tarfile.open(next(folder.glob("*.tar"))) as shard:
        member = shard.extractfile("scene-000002.json")
        assert member is not None
        labels = json.load(member)
    np.testing.assert_allclose(labels["boxes"], scene.boxes, atol=0.006)
    assert labels["classes"] == scene.classes.tolist()
    assert labels["names"] == [CLASSES[place] for place in scene.classes]


def test_many_processes_draw_what_one_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scenes.open_scenes(tmp_path / "one", count=7, size=64)
    monkeypatch.setattr(scenes, "_SCENES_A_PROCESS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    two = scenes.open_scenes(tmp_path / "two", count=7, size=64)
    assert [one.read(0, i).image for i in range(7)] == [two.read(0, i).image for i in range(7)]


def test_a_drawing_process_that_dies_is_told_of_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "_SCENES_A_PROCESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="ended early"):
        scenes.open_scenes(tmp_path, count=4, size=64)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def start(cache: Path, count: int) -> subprocess.Popen[bytes]:
    program = (
        "import sys; from pathlib import Path; from groundwork.data.scenes import open_scenes; "
        "print(open_scenes(Path(sys.argv[1]), int(sys.argv[2]), 64).fingerprint, flush=True)"
    )
    command = [sys.executable, "-c", program, str(cache), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def test_a_kill_leaves_no_half_set_and_the_next_one_clears_up(tmp_path: Path) -> None:
    process = start(tmp_path, 4000)
    deadline = time.monotonic() + 60
    left: list[Path] = []
    try:
        while not left and time.monotonic() < deadline:
            left = [path for path in tmp_path.glob(".scenes-*") if path.is_dir()]
            time.sleep(0.02)
        assert left and process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert [path.name for path in tmp_path.glob("scenes-*")] == []
    half = left[0].with_name(left[0].name.replace("4000x", "3x"))
    left[0].rename(half)
    assert len(scenes.open_scenes(tmp_path, 3, 64)) == 3
    assert not half.exists()


def test_two_processes_at_once_make_one_set(tmp_path: Path) -> None:
    processes = [start(tmp_path, 12) for _ in range(2)]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert answers == {f"{scenes.open_scenes(tmp_path, 12, 64).fingerprint}\n".encode()}
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_objects_are_balanced_labeled_and_from_scenes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "OBJECTS_OF_A_CLASS", {"train": 3, "val": 2})
    seeds: dict[str, set[int]] = {"train": set(), "val": set()}
    split = "train"

    def noted(seed: int, index: int) -> scenes.Scene:
        seeds[split].add(seed)
        return draw_scene(seed, index)

    monkeypatch.setattr(scenes, "draw_scene", noted)
    train = scenes.open_scene_objects(tmp_path, "train")
    split = "val"
    val = scenes.open_scene_objects(tmp_path, "val")
    for objects, each in ((train, 3), (val, 2)):
        samples = [objects.read(0, i) for i in range(len(objects))]
        assert sorted(str(s.label) for s in samples) == sorted(CLASSES * each)
        assert Image.open(io.BytesIO(samples[0].image)).size == (128, 128)
    assert not seeds["train"] & seeds["val"]
    for used in (*seeds["train"], *seeds["val"]):
        with pytest.raises(UsageError, match="seed"):
            scenes.open_scenes(tmp_path, seed=used)


def test_mistakes_are_told_of(tmp_path: Path) -> None:
    for wrong in ({"count": 0}, {"size": 8}, {"seed": -1}):
        with pytest.raises(UsageError, match="Drawn scenes need"):
            scenes.open_scenes(tmp_path, **wrong)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be kept"):
        scenes.open_scenes(tmp_path / "file", count=1, size=32)


def test_drawing_needs_no_torch() -> None:
    program = "import sys, groundwork.data.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
