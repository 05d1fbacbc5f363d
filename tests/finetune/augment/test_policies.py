"""The operations and the policies made of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finetune.augment import AutoAugment, Item, RandAugment, Rule, Source
from finetune.augment import policies as module
from finetune.augment.operations import NAMES, Step, operate
from tests.finetune.augment.drawn import SIZE, Dealer, covered, extent, picture

RULE = Rule()
MAPS = [name for name in NAMES if name.endswith("_BBox")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 2.0, 10.0])
def test_every_operation_keeps_size_and_type_at_every_level(name: str, level: float) -> None:
    item = picture(0)
    before = item.pixels.copy()
    for seed in range(5):
        generator = np.random.default_rng(seed)
        result = operate(Step(name, 1.0, level), item, generator, RULE)
        assert result.pixels.shape == item.pixels.shape
        assert result.pixels.dtype == np.uint8
        assert result.pixels.flags.c_contiguous
        assert len(result.boxes) == len(result.classes) <= 4
    assert np.array_equal(item.pixels, before)


@pytest.mark.parametrize("name", MAPS)
def test_an_operation_that_moves_the_picture_moves_its_boxes(name: str) -> None:
    for seed in range(6):

        def transform(item: Item, source: Source, name: str = name) -> Item:
            return operate(Step(name, 1.0, 8), item, source.generator, RULE)

        item = transform(picture(0), Dealer(seed))
        assert len(item.boxes)
        for box, label in zip(item.boxes, item.classes.tolist(), strict=True):
            seen = extent(covered(transform, seed, label))
            assert seen is not None
            assert ((seen - box) * (-1, -1, 1, 1)).max() <= 1.0


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_Only_BBoxes")])
def test_an_operation_in_boxes_changes_nothing_outside_them(name: str) -> None:
    item = picture(0)
    texture = np.random.default_rng(0).integers(0, 256, item.pixels.shape, dtype=np.uint8)
    item = Item(texture, item.boxes, item.classes)
    outside = np.ones(texture.shape[:2], bool)
    for left, top, right, bottom in item.boxes.astype(int).tolist():
        outside[top:bottom, left:right] = False
    changed = 0
    for seed in range(20):
        result = operate(Step(name, 1.0, 8), item, np.random.default_rng(seed), RULE)
        assert np.array_equal(result.pixels[outside], texture[outside])
        assert np.array_equal(result.boxes, item.boxes)
        for left, top, right, bottom in item.boxes.astype(int).tolist():
            here = slice(top, bottom), slice(left, right)
            changed += not np.array_equal(result.pixels[here], texture[here])
    # Each box with a third; few pixels may be equalised to what they were.
    assert 0.1 < changed / 80 < 0.48


@pytest.mark.parametrize(("level", "unchanged_under"), [(0.0, 0), (5.0, 128), (10.0, 256)])
def test_solarize_inverts_from_its_level_up(level: float, unchanged_under: int) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    item = Item(ramp, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    values = operate(Step("Solarize", 1.0, level), item, np.random.default_rng(0), RULE).pixels
    expected = [value if value < unchanged_under else 255 - value for value in range(256)]
    assert values[0, :, 0].tolist() == expected


def test_a_cutout_drops_the_box_that_it_hides() -> None:
    small = np.array([[50, 50, 54, 54]], np.float32)
    item = Item(np.zeros((*SIZE, 3), np.uint8), small, np.zeros(1, np.int64))
    outcomes = set()
    for seed in range(60):
        result = operate(Step("Cutout", 1.0, 10), item, np.random.default_rng(seed), RULE)
        visible = (result.pixels[50:54, 50:54, 0] == 0).mean()
        assert bool(len(result.boxes)) == (visible >= 0.25)
        outcomes.add(len(result.boxes))
    assert outcomes == {0, 1}


@pytest.mark.parametrize(("policy", "parts"), [("v0", 5), ("v1", 20), ("v2", 15), ("v3", 15)])
def test_policies_are_made_of_known_operations(policy: str, parts: int) -> None:
    made = AutoAugment(policy)  # type: ignore[arg-type]
    assert len(made.parts) == parts
    steps = [step for part in made.parts for step in part]
    assert {step.name for step in steps} <= set(NAMES)
    assert all(0 <= step.probability <= 1 and 0 <= step.level <= 10 for step in steps)
    assert {len(part) for part in made.parts} == ({2, 3} if policy == "v2" else {2})


def test_v1_begins_with_v0() -> None:
    assert AutoAugment("v1").parts[:5] == AutoAugment("v0").parts


def test_one_part_is_drawn_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    done: Counter[Step] = Counter()

    def note(step: Step, item: Item, *_: object) -> Item:
        done[step] += 1
        return item

    monkeypatch.setattr(module, "operate", note)
    source, item = Dealer(0), picture(0)
    for _ in range(1000):
        AutoAugment("v0")(item, source)
    assert len(done) == 10
    assert all(140 < count < 260 for count in done.values())
    done.clear()
    for _ in range(1000):
        RandAugment(3, 7)(item, source)
    assert len(done) == 13  # the fourteenth is the identity
    assert sum(done.values()) / 3000 == pytest.approx(13 / 14, abs=0.03)
    assert {(step.probability, step.level) for step in done} == {(1.0, 7)}


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="v0, v1, v2, v3"):
        AutoAugment("v9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="magnitude"):
        RandAugment(2, 11)
