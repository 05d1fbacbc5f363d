"""Every fine-tuning recipe that is shipped resolves, and says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune import recipe as recipes
from finetune.augment import (
    ColorJitter,
    Compose,
    GridMask,
    MixUp,
    Mosaic,
    RandomAffine,
    RandomHorizontalFlip,
    build,
)
from groundwork.errors import UsageError

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_and_says_what_it_is(path: Path) -> None:
    assert recipes.resolve(path.stem, []) == recipes.resolve(str(path), [])
    header = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert {"Command:", "Measured:", "Cost:"} <= set(header.replace("#", "").split())


def settings_of(chain: Compose) -> list[tuple[str, dict[str, Any]]]:
    """Name each transform with all that it was given; rules and colours by their own settings."""
    return [
        (type(one).__name__, {k: getattr(v, "__dict__", v) for k, v in vars(one).items()})
        for one in chain.transforms
    ]


def test_the_full_stack_is_the_customers_chain() -> None:
    chain = Compose(
        [
            Mosaic(prob=0.5), MixUp(prob=0.2), GridMask(prob=0.3),
            RandomAffine(degrees=10, scale=(0.5, 1.5), enclose="ellipse"),
            ColorJitter(hue=0.1, saturation=0.4, brightness=0.3), RandomHorizontalFlip(p=0.5),
        ]
    )  # fmt: skip
    ours = settings_of(build(recipes.resolve("full_stack", []).augment, True))
    # Colour is numbers until the end, so its place in the chain is free.
    assert sorted(ours, key=str) == sorted(settings_of(chain), key=str)


@pytest.mark.parametrize("prefix", recipes.FIXED)
def test_a_resumed_run_stays_the_same_model_on_the_same_stream(prefix: str) -> None:
    old = recipes.resolve(None, ["data.train=pictures"])
    changed = {
        "backbone": "backbone.name=yolo12s", "detector": "detector.objectness=true",
        "seed": "seed=5", "image_size": "image_size=320", "optim.name": "optim.name=sgd",
        "data.window_shards": "data.window_shards=3", "data.bands": "data.bands=[1]",
        "data.value_range": "data.value_range=[0,4095]", "ema.": "ema.enabled=false",
        "batchnorm": "batchnorm=file", "freeze": "freeze.backbone=0.5",
        "phases": "phases=[{until: 1.0, batch_size: 8}]", "augment": "augment.mosaic.prob=0.25",
    }[prefix]  # fmt: skip
    with pytest.raises(UsageError, match=f"cannot change {prefix}"):
        recipes.refuse_changes(old, recipes.resolve(None, ["data.train=pictures", changed]))
    harmless = recipes.resolve(None, ["data.train=pictures", "log.every_steps=3"])
    assert recipes.refuse_changes(old, harmless) == ["log.every_steps: 10 -> 3"]


@pytest.mark.parametrize("wrong", ["mixup={alpha: 0.0001}", "cutmix.alpha=1e7", "affine.shear=90"])
def test_what_a_transform_refuses_the_recipe_refuses(wrong: str) -> None:
    with pytest.raises(UsageError, match=f"augment.{wrong[:5]}"):
        recipes.resolve(None, [f"augment.{wrong}"])


def test_one_key_of_a_section_leaves_the_others_as_they_are() -> None:
    recipe = recipes.resolve(None, ["ema.decay=0.5", "schedule.warmup=0.2"])
    assert recipe.ema.enabled and recipe.ema.decay == 0.5
    assert recipe.schedule.final == 0.01 and recipe.schedule.warmup == 0.2


def test_scorings_that_never_come_cannot_end_a_run() -> None:
    with pytest.raises(UsageError, match=r"eval\.patience counts scorings"):
        recipes.resolve(None, ["eval.patience=3", "eval.times=0"])
