"""What every transform promises: boxes stay on their objects, and the generator decides all."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from finetune.augment import (
    HSV,
    AutoAugment,
    ColorJitter,
    Compose,
    CutMix,
    GridMask,
    Item,
    Letterbox,
    MixUp,
    Mosaic,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomQuarterTurn,
    RandomVerticalFlip,
    Rule,
    Transform,
)
from groundwork.colour import PARAMETERS
from tests.finetune.augment.drawn import (
    FIRST,
    OBJECTS,
    SIZE,
    Dealer,
    covered,
    empty,
    extent,
    picture,
    run,
)

# Their boxes touch their objects on every side; those of the others only hold them.
TIGHT: dict[str, Callable[[], Transform]] = {
    "mosaic of four": lambda: Mosaic(1.0),
    "mosaic of nine": lambda: Mosaic(1.0, 9),
    "mosaic and scale": lambda: Compose([Mosaic(1.0), RandomAffine(0, shear=0)]),
    "mosaic, letterboxed": lambda: Compose([Mosaic(1.0)]),
    "mixup": lambda: MixUp(1.0),
    "mixup in a mosaic": lambda: Compose([Mosaic(1.0), MixUp(1.0), RandomAffine(0, shear=0)]),
    "cutmix": lambda: CutMix(1.0),
    "scale": lambda: RandomAffine(0, shear=0),
    "crop": lambda: RandomCrop(1.0),
    "horizontal flip": lambda: RandomHorizontalFlip(1.0),
    "vertical flip": lambda: RandomVerticalFlip(1.0),
    "quarter turn": lambda: RandomQuarterTurn(1.0),
    "letterbox": lambda: Letterbox(),
    "colour": lambda: ColorJitter(),
    "hsv": lambda: HSV(),
}
LOOSE: dict[str, Callable[[], Transform]] = {
    "rotation and shear": lambda: RandomAffine(30, shear=10),
    "rotation in a mosaic": lambda: Compose([Mosaic(1.0), RandomAffine(10)]),
    "gridmask": lambda: GridMask(1.0, pitch=(0.1, 0.5)),
    "randaugment": lambda: RandAugment(2, 9),
    "autoaugment v0": lambda: AutoAugment("v0"),
    "autoaugment v1": lambda: AutoAugment("v1"),
    "autoaugment v2": lambda: AutoAugment("v2"),
    "autoaugment v3": lambda: AutoAugment("v3"),
    "everything": lambda: customers(),
}
ALL = TIGHT | LOOSE
# What decides by the values of all pixels changes everywhere when one object is taken away.
BY_CONTENT = [name for name in ALL if "augment" in name]


def customers() -> Compose:
    return Compose([Mosaic(prob=0.5), MixUp(prob=0.2), GridMask(prob=0.3), RandomAffine(degrees=10, scale=(0.5,1.5)), ColorJitter(hue=0.1, saturation=0.4, brightness=0.3), RandomHorizontalFlip(p=0.5)])  # fmt: skip # noqa: E501


def test_the_chain_that_was_asked_for_gives_the_size_that_training_sees() -> None:
    for seed in range(10):
        for size in ((96, 96), (64, 160), (160, 96)):
            item = run(customers(), seed, size=size)
            assert item.pixels.shape == (*size, 3)
            check(item)


def check(item: Item) -> None:
    """Hold an item against its contract."""
    assert item.pixels.dtype == np.uint8
    assert item.pixels.ndim == 3
    assert item.boxes.dtype == np.float32
    assert item.classes.dtype == np.int64
    assert item.boxes.shape == (len(item.classes), 4)
    assert item.colour.dtype == np.float32
    assert item.colour.shape == (PARAMETERS,)
    height, width = item.pixels.shape[:2]
    left, top, right, bottom = item.boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    assert (right - left >= 2).all()
    assert (bottom - top >= 2).all()


@pytest.mark.parametrize("name", ALL)
def test_items_keep_their_contract(name: str) -> None:
    for seed in range(10):
        check(run(ALL[name](), seed))


@pytest.mark.parametrize("name", [name for name in ALL if name not in BY_CONTENT])
def test_a_box_holds_its_object_and_one_that_is_tight_touches_it_on_every_side(name: str) -> None:
    transform = ALL[name]()
    survivors = 0
    for seed in range(8):
        item = run(transform, seed)
        survivors += len(item.boxes)
        for box, label in zip(item.boxes, item.classes.tolist(), strict=True):
            if np.count_nonzero(item.classes == label) > 1:
                continue  # the same picture was dealt twice
            seen = extent(covered(transform, seed, label))
            if seen is None and name == "everything":
                continue  # the grid hid one part of it, the window cut off the other
            assert seen is not None, (seed, label)
            outwards = (seen - box) * (-1, -1, 1, 1)
            assert outwards.max() <= 1.0, (seed, label)
            if name in TIGHT:
                assert outwards.min() >= -1.5, (seed, label)
    assert survivors > 8


@pytest.mark.parametrize("name", ["mosaic of four", "cutmix", "gridmask"])
def test_a_box_that_is_dropped_had_less_than_the_rule_asks_to_be_seen(name: str) -> None:
    transform = ALL[name]()  # one that does not scale: an object has as many pixels as before
    dropped = 0
    for seed in range(30):
        item = run(transform, seed)
        for label in set(range(10 * FIRST, 10 * FIRST + OBJECTS)) - set(item.classes.tolist()):
            seen, whole = (covered(one, seed, label) for one in (transform, Letterbox()))
            span = extent(seen)
            narrow = span is not None and (span[2:] - span[:2]).min() < 2
            assert narrow or seen.sum() < 0.25 * whole.sum()
            dropped += 1
    assert dropped


def with_crowd(item: Item) -> Item:
    """Put a crowd of class 0 over the whole picture."""
    height, width = item.pixels.shape[:2]
    boxes = np.concatenate([item.boxes, np.array([[0, 0, width, height]], np.float32)])
    return replace(item, boxes=boxes, classes=np.append(item.classes, ~0))


@pytest.mark.parametrize("name", ALL)
def test_a_crowd_changes_nothing_but_is_there_as_long_as_it_can_be_seen(name: str) -> None:
    class Crowded(Dealer):
        def other(self) -> Item:
            return with_crowd(super().other())

    for seed in range(12):
        plain = run(ALL[name](), seed)
        crowded = ALL[name]()(with_crowd(picture(FIRST)), Crowded(seed))
        objects = crowded.classes >= 0
        assert np.array_equal(plain.pixels, crowded.pixels)
        assert np.array_equal(plain.boxes, crowded.boxes[objects])
        assert np.array_equal(plain.classes, crowded.classes[objects])
        # Whatever of a picture can be seen lies in its crowd.
        centres = (plain.boxes[:, :2] + plain.boxes[:, 2:]) / 2
        crowds = crowded.boxes[~objects]
        for centre in centres:
            assert ((crowds[:, :2] <= centre) & (centre <= crowds[:, 2:])).all(1).any()


def test_the_ellipse_of_a_box_holds_a_disc_tightly() -> None:
    down, across = np.mgrid[:128, :128] + 0.5
    disc = (across - 60) ** 2 / 30**2 + (down - 70) ** 2 / 18**2 <= 1
    pixels = np.full((128, 128, 3), 114, np.uint8)
    pixels[disc] = 250
    item = Item(pixels, np.array([[30, 52, 90, 88]], np.float32), np.zeros(1, np.int64))
    transform = RandomAffine(45, (0.8, 1.0), 0.0, 5.0, enclose="ellipse")
    for seed in range(20):
        moved = transform(item, Dealer(seed))
        seen = extent(moved.pixels[:, :, 0] > 180)
        assert seen is not None
        assert np.abs(seen - moved.boxes[0]).max() <= 1.5


@pytest.mark.parametrize("name", ALL)
def test_the_generator_decides_and_no_global_state_does(name: str) -> None:
    results = []
    before = torch.random.get_rng_state(), numpys_state()
    for state in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            random.seed(state)
            results.append([run(ALL[name](), seed) for seed in range(6)])
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == numpys_state()
    for one, same in zip(*results, strict=True):
        assert np.array_equal(one.pixels, same.pixels)
        assert np.array_equal(one.boxes, same.boxes)
        assert np.array_equal(one.classes, same.classes)
        assert np.array_equal(one.colour, same.colour)
    if name not in ("horizontal flip", "vertical flip", "letterbox"):  # nothing is left to draw
        assert any(
            one.pixels.tobytes() + one.colour.tobytes()
            != two.pixels.tobytes() + two.colour.tobytes()
            for one, two in pairwise(results[0])
        )


def numpys_state() -> str:
    return repr(np.random.get_state(legacy=False))


@pytest.mark.parametrize("name", ALL)
def test_a_picture_without_boxes_stays_without(name: str) -> None:
    class Empty(Dealer):
        def other(self) -> Item:
            return empty()

    for seed in range(12):
        item = ALL[name]()(empty(), Empty(seed))
        check(item)
        assert item.boxes.shape == (0, 4)


@pytest.mark.parametrize("name", ALL)
def test_what_was_given_is_never_written_into(name: str) -> None:
    class Kept(Dealer):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.given: list[tuple[Item, bytes]] = []

        def other(self) -> Item:
            item = super().other()
            self.given.append((item, stamp(item)))
            return item

    for seed in range(12):
        item, source = picture(FIRST), Kept(seed)
        source.given.append((item, stamp(item)))
        ALL[name]()(item, source)
        assert all(stamp(given) == before for given, before in source.given)


def stamp(item: Item) -> bytes:
    arrays = item.pixels, item.boxes, item.classes, item.colour
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize(
    "transform",
    [
        Mosaic(0.0),
        MixUp(0.0),
        CutMix(0.0),
        GridMask(0.0),
        RandomCrop(0.0),
        RandomHorizontalFlip(0.0),
        RandomVerticalFlip(0.0),
        RandomQuarterTurn(0.0),
        RandAugment(0),
        Compose([]),
        RandomAffine(0, (1.0, 1.0), 0.0, 0.0),
        ColorJitter(0, 0, 0, 0),
        HSV(0, 0, 0),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_nothing_changes_at_probability_or_strength_zero(transform: Transform) -> None:
    given = picture(FIRST)
    pixels = np.full((*SIZE, 3), 9, np.uint8)  # of the size of training
    item = Item(pixels, given.boxes, given.classes)
    source = Dealer(0)
    for _ in range(5):
        result = transform(item, source)
        assert np.array_equal(result.pixels, item.pixels)
        assert np.array_equal(result.boxes, item.boxes)
        assert np.array_equal(result.classes, item.classes)
        assert np.allclose(result.colour, item.colour, atol=1e-6)
    assert source.dealt == 0


def test_probabilities_are_kept() -> None:
    for probability in (0.2, 0.5):
        source = Dealer(1)
        changed = 0
        for _ in range(400):
            changed += MixUp(probability)(item := picture(FIRST), source) is not item
        assert abs(changed / 400 - probability) < 0.08


def test_a_stricter_rule_keeps_fewer_boxes() -> None:
    def count(rule: Rule) -> int:
        chain = Compose([Mosaic(1.0, rule=rule), RandomAffine(0, rule=rule)], rule=rule)
        return sum(len(run(chain, seed).boxes) for seed in range(15))

    assert count(Rule(0.01, 0.5)) > count(Rule(0.25, 2.0)) > count(Rule(0.9, 12.0)) > 0
