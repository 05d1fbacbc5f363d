"""Augmentation of labeled pictures, boxes and pixels together.

A pipeline of one's own is a chain of transforms:

    Compose([Mosaic(prob=0.5), MixUp(prob=0.2), GridMask(prob=0.3),
             RandomAffine(degrees=10, scale=(0.5, 1.5)),
             ColorJitter(hue=0.1, saturation=0.4, brightness=0.3), RandomHorizontalFlip(p=0.5)])

The names below are imported when they are asked for: a recipe's settings need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.augment.affine import RandomAffine
    from finetune.augment.boxes import Rule
    from finetune.augment.contract import Compose, Item, Source, Transform
    from finetune.augment.crop import RandomCrop
    from finetune.augment.flips import (
        RandomHorizontalFlip,
        RandomQuarterTurn,
        RandomVerticalFlip,
    )
    from finetune.augment.gridmask import GridMask
    from finetune.augment.jitter import HSV, ColorJitter
    from finetune.augment.letterbox import Letterbox, letterbox_geometry
    from finetune.augment.mixing import CutMix, MixUp
    from finetune.augment.mosaic import Mosaic
    from finetune.augment.pictures import Pictures
    from finetune.augment.policies import AutoAugment, RandAugment
    from finetune.augment.stack import build

__all__ = [
    "HSV",
    "AutoAugment",
    "ColorJitter",
    "Compose",
    "CutMix",
    "GridMask",
    "Item",
    "Letterbox",
    "MixUp",
    "Mosaic",
    "Pictures",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomQuarterTurn",
    "RandomVerticalFlip",
    "Rule",
    "Source",
    "Transform",
    "build",
    "letterbox_geometry",
]

_MODULES = {
    "affine": ("RandomAffine",),
    "boxes": ("Rule",),
    "contract": (
        "Compose",
        "Item",
        "Source",
        "Transform",
    ),
    "crop": ("RandomCrop",),
    "flips": (
        "RandomHorizontalFlip",
        "RandomQuarterTurn",
        "RandomVerticalFlip",
    ),
    "gridmask": ("GridMask",),
    "jitter": (
        "HSV",
        "ColorJitter",
    ),
    "letterbox": (
        "Letterbox",
        "letterbox_geometry",
    ),
    "mixing": (
        "CutMix",
        "MixUp",
    ),
    "mosaic": ("Mosaic",),
    "pictures": ("Pictures",),
    "policies": (
        "AutoAugment",
        "RandAugment",
    ),
    "stack": ("build",),
}


def __getattr__(name: str) -> Any:
    """Import a name of __all__ from the module that defines it."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"finetune.augment.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
