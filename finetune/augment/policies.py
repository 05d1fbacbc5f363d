"""RandAugment and AutoAugment for detection: which operations a picture goes through.

Sources: RandAugment, Cubuk et al., arXiv 1909.13719, whose fourteen operations are used in the form
that moves boxes. AutoAugment, Zoph et al., arXiv 1906.11172: the policies that were learnt on COCO
and published (google/automl, Apache-2.0); v0 gave the paper's results. All of their operations are
there, those that act inside boxes included.

Differs from the papers: see operations.py. In RandAugment, as in AutoAugment, the level of Color,
Contrast, Brightness and Sharpness is neutral at 5, and Solarize is weakest at 10.
"""

from __future__ import annotations

from typing import Literal

from finetune.augment.boxes import Rule
from finetune.augment.contract import Item, Source
from finetune.augment.operations import Step, operate

Policy = Literal["v0", "v1", "v2", "v3"]

# The fourteen of RandAugment; None is the identity.
_RANDOM = (
    None,
    "AutoContrast",
    "Equalize",
    "Rotate_BBox",
    "Solarize",
    "Color",
    "Posterize",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX_BBox",
    "ShearY_BBox",
    "TranslateX_BBox",
    "TranslateY_BBox",
)

# Each line is a policy's part, its operations as name, probability, level.
_V0 = """
TranslateX_BBox 0.6 4, Equalize 0.8 10
TranslateY_Only_BBoxes 0.2 2, Cutout 0.8 8
Sharpness 0.0 8, ShearX_BBox 0.4 0
ShearY_BBox 1.0 2, TranslateY_Only_BBoxes 0.6 6
Rotate_BBox 0.6 10, Color 1.0 6
"""
_V1 = (
    _V0
    + """
Color 0.0 0, ShearX_Only_BBoxes 0.8 4
ShearY_Only_BBoxes 0.8 2, Flip_Only_BBoxes 0.0 10
Equalize 0.6 10, TranslateX_BBox 0.2 2
Color 1.0 10, TranslateY_Only_BBoxes 0.4 6
Rotate_BBox 0.8 10, Contrast 0.0 10
Cutout 0.2 2, Brightness 0.8 10
Color 1.0 6, Equalize 1.0 2
Cutout_Only_BBoxes 0.4 6, TranslateY_Only_BBoxes 0.8 2
Color 0.2 8, Rotate_BBox 0.8 10
Sharpness 0.4 4, TranslateY_Only_BBoxes 0.0 4
Sharpness 1.0 4, SolarizeAdd 0.4 4
Rotate_BBox 1.0 8, Sharpness 0.2 8
ShearY_BBox 0.6 10, Equalize_Only_BBoxes 0.6 8
ShearX_BBox 0.2 6, TranslateY_Only_BBoxes 0.2 10
SolarizeAdd 0.6 8, Brightness 0.8 10
"""
)
_V2 = """
Color 0.0 6, Cutout 0.6 8, Sharpness 0.4 8
Rotate_BBox 0.4 8, Sharpness 0.4 2, Rotate_BBox 0.8 10
TranslateY_BBox 1.0 8, AutoContrast 0.8 2
AutoContrast 0.4 6, ShearX_BBox 0.8 8, Brightness 0.0 10
SolarizeAdd 0.2 6, Contrast 0.0 10, AutoContrast 0.6 0
Cutout 0.2 0, Solarize 0.8 8, Color 1.0 4
TranslateY_BBox 0.0 4, Equalize 0.6 8, Solarize 0.0 10
TranslateY_BBox 0.2 2, ShearY_BBox 0.8 8, Rotate_BBox 0.8 8
Cutout 0.8 8, Brightness 0.8 8, Cutout 0.2 2
Color 0.8 4, TranslateY_BBox 1.0 6, Rotate_BBox 0.6 6
Rotate_BBox 0.6 10, BBox_Cutout 1.0 4, Cutout 0.2 8
Rotate_BBox 0.0 0, Equalize 0.6 6, ShearY_BBox 0.6 8
Brightness 0.8 8, AutoContrast 0.4 2, Brightness 0.2 2
TranslateY_BBox 0.4 8, Solarize 0.4 6, SolarizeAdd 0.2 10
Contrast 1.0 10, SolarizeAdd 0.2 8, Equalize 0.2 4
"""
_V3 = """
Posterize 0.8 2, TranslateX_BBox 1.0 8
BBox_Cutout 0.2 10, Sharpness 1.0 8
Rotate_BBox 0.6 8, Rotate_BBox 0.8 10
Equalize 0.8 10, AutoContrast 0.2 10
SolarizeAdd 0.2 2, TranslateY_BBox 0.2 8
Sharpness 0.0 2, Color 0.4 8
Equalize 1.0 8, TranslateY_BBox 1.0 8
Posterize 0.6 2, Rotate_BBox 0.0 10
AutoContrast 0.6 0, Rotate_BBox 1.0 6
Equalize 0.0 4, Cutout 0.8 10
Brightness 1.0 2, TranslateY_BBox 1.0 6
Contrast 0.0 2, ShearY_BBox 0.8 0
AutoContrast 0.8 10, Contrast 0.2 10
Rotate_BBox 1.0 10, Cutout 1.0 10
SolarizeAdd 0.8 6, Equalize 0.8 8
"""
_POLICIES = {"v0": _V0, "v1": _V1, "v2": _V2, "v3": _V3}


class RandAugment:
    """Puts a picture through `num_ops` operations, each drawn anew, all at one `magnitude` (0..10).

    Drawn with replacement, the identity among them, as in the paper.
    """

    def __init__(
        self, num_ops: int = 2, magnitude: float = 6.0, *, rule: Rule | None = None
    ) -> None:
        if num_ops < 0 or not 0 <= magnitude <= 10:
            raise ValueError("num_ops is at least 0, and magnitude lies in 0..10.")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item after the drawn operations."""
        for drawn in source.generator.integers(len(_RANDOM), size=self.num_ops).tolist():
            name = _RANDOM[drawn]
            if name is not None:
                item = operate(Step(name, 1.0, self.magnitude), item, source.generator, self.rule)
        return item


class AutoAugment:
    """Puts a picture through one part of a learnt policy, drawn uniformly."""

    def __init__(self, policy: Policy = "v0", *, rule: Rule | None = None) -> None:
        if policy not in _POLICIES:
            raise ValueError(f"policy is one of {', '.join(_POLICIES)}.")
        self.parts = [_part(line) for line in _POLICIES[policy].split("\n") if line]
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item after the drawn part's operations."""
        for step in self.parts[int(source.generator.integers(len(self.parts)))]:
            item = operate(step, item, source.generator, self.rule)
        return item


def _part(line: str) -> list[Step]:
    steps = [step.split() for step in line.split(",")]
    return [Step(name, float(probability), float(level)) for name, probability, level in steps]
