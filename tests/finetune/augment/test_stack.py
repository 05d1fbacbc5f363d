"""The recipe's `augment.*`: what its keys build, and in which order."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import finetune.augment
from finetune.augment import build
from finetune.augment.settings import Augment
from groundwork.config import parse_overrides, validate
from groundwork.errors import UsageError
from tests.finetune.augment.drawn import SIZE, run


def settings(*overrides: str) -> Augment:
    return validate(Augment, parse_overrides(overrides), prefix="augment.")


def names(augment: Augment, mixing: bool = True) -> list[str]:
    return [type(transform).__name__ for transform in build(augment, mixing).transforms]


EVERYTHING = (
    "mosaic.prob=0.5", "mixup.prob=0.2", "cutmix.prob=0.1", "gridmask.prob=0.3", "crop.prob=0.1",
    "flip.vertical=0.5", "flip.quarter_turn=0.5", "randaugment.num_ops=1", "autoaugment.policy=v0",
    "colour.hue=0.1",
)  # fmt: skip


def test_the_defaults_are_mosaic_affine_flip_and_hsv() -> None:
    assert names(Augment()) == ["Mosaic", "RandomAffine", "RandomHorizontalFlip", "HSV"]


def test_the_order_is_the_one_that_is_stated() -> None:
    assert names(settings(*EVERYTHING)) == [
        "Mosaic", "MixUp", "CutMix", "GridMask", "RandomAffine", "RandomCrop",
        "RandomHorizontalFlip", "RandomVerticalFlip", "RandomQuarterTurn", "RandAugment",
        "AutoAugment", "ColorJitter", "HSV",
    ]  # fmt: skip
    item = run(build(settings(*EVERYTHING), True), 0)
    assert item.pixels.shape == (*SIZE, 3)


def test_the_end_of_training_joins_no_pictures() -> None:
    closed = names(settings(*EVERYTHING), mixing=False)
    assert not {"Mosaic", "MixUp", "CutMix"} & set(closed)
    assert closed[0] == "GridMask"


def test_what_is_off_is_not_in_the_chain() -> None:
    off = ("mosaic.prob=0", "affine.scale=[1,1]", "affine.translate=0", "flip.horizontal=0",
           "hsv.hue=0", "hsv.saturation=0", "hsv.value=0")  # fmt: skip
    assert names(settings(*off)) == []
    # Only the affine takes a window out of a mosaic.
    assert names(settings(*off[1:])) == ["Mosaic", "RandomAffine"]


def test_the_customers_chain_can_be_written_in_keys() -> None:
    augment = settings(
        "mosaic.prob=0.5", "mixup.prob=0.2", "gridmask.prob=0.3", "affine.degrees=10",
        "affine.scale=[0.5,1.5]", "affine.shear=2", "colour.hue=0.1", "colour.saturation=0.4",
        "colour.brightness=0.3", "flip.horizontal=0.5", "hsv.hue=0", "hsv.saturation=0",
        "hsv.value=0",
    )  # fmt: skip
    assert names(augment) == [
        "Mosaic", "MixUp", "GridMask", "RandomAffine", "RandomHorizontalFlip", "ColorJitter",
    ]  # fmt: skip
    mosaic, mixup, _, affine, *_ = build(augment, True).transforms
    assert vars(mosaic)["prob"] == 0.5
    assert vars(mixup)["prob"] == 0.2
    assert vars(affine)["degrees"] == 10


def test_the_rule_reaches_every_transform() -> None:
    rules = [
        vars(transform)["rule"]
        for transform in build(
            settings(*EVERYTHING, "min_visible=0.6", "min_side=5"), True
        ).transforms
        if "rule" in vars(transform)
    ]
    assert len(rules) == 7
    assert {(rule.min_visible, rule.min_side) for rule in rules} == {(0.6, 5.0)}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("mosaic.tiles=5", "augment.mosaic.tiles"),
        ("mosaic.prob=1.5", "augment.mosaic.prob"),
        ("affine.scale=[1.5,0.5]", "the smaller first"),
        ("gridmask.pitch=[0.5,0.1]", "the smaller first"),
        ("autoaugment.policy=v7", "augment.autoaugment.policy"),
        ("mosiac.prob=1", "Did you mean augment.mosaic"),
        ("close=2", "augment.close"),
    ],
)
def test_a_mistake_is_told_with_its_key(override: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        settings(override)


def test_settings_need_no_torch() -> None:
    code = "import finetune.augment.settings, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_and_no_other() -> None:
    for name in finetune.augment.__all__:
        found: Any = getattr(finetune.augment, name)
        assert found.__name__ == name
    with pytest.raises(AttributeError, match="Mosiac"):
        _ = finetune.augment.Mosiac
