"""The recipe's `augment.*`: one section for each transform, keys named like its arguments.

A probability of 0, or strengths that change nothing, leave a transform out. Nothing here imports
torch: a mistake in a recipe is told at once. `finetune.augment.build` makes the chain of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from groundwork.config import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Angle = Annotated[float, Field(ge=0, le=89.9)]
Alpha = Annotated[float, Field(ge=1e-3, le=1e6)]  # of a Beta distribution
Scale = Annotated[float, Field(gt=0)]


class MosaicSettings(Section):
    """Four or nine pictures on one canvas (mosaic.py)."""

    prob: Probability = 1.0
    tiles: Literal[4, 9] = 4


class MixUpSettings(Section):
    """Two pictures blended (mixing.py); the weight is drawn from Beta(alpha, alpha)."""

    prob: Probability = 0.0
    alpha: Alpha = 32.0


class CutMixSettings(Section):
    """A rectangle of one picture pasted into another (mixing.py)."""

    prob: Probability = 0.0
    alpha: Alpha = 1.0


class GridMaskSettings(Section):
    """A grid of grey squares (gridmask.py); `pitch` is a range of shares of the shorter side."""

    prob: Probability = 0.0
    ratio: float = Field(default=0.6, gt=0, lt=1)
    pitch: tuple[Scale, Scale] = (0.43, 1.0)

    @model_validator(mode="after")
    def _pitch_is_a_range(self) -> GridMaskSettings:
        if self.pitch[0] > self.pitch[1]:
            raise ValueError("pitch must be two numbers, the smaller first")
        return self


class AffineSettings(Section):
    """Rotation, scale, translation and shear in one sampling (affine.py); angles in degrees."""

    degrees: float = Field(default=0.0, ge=0, le=180)
    scale: tuple[Scale, Scale] = (0.5, 1.5)
    translate: Probability = 0.1
    shear: Angle = 0.0
    enclose: Literal["corners", "ellipse"] = "corners"

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AffineSettings:
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale must be two numbers, the smaller first")
        return self

    @property
    def neutral(self) -> bool:
        """Whether it leaves a picture as it is."""
        return self.scale == (1.0, 1.0) and not (self.degrees or self.translate or self.shear)


class CropSettings(Section):
    """A crop that keeps at least one box to a drawn part (crop.py)."""

    prob: Probability = 0.0


class FlipSettings(Section):
    """Probabilities of flips and of a turn by 90, 180 or 270 degrees (flips.py)."""

    horizontal: Probability = 0.5
    vertical: Probability = 0.0
    quarter_turn: Probability = 0.0


class ColourSettings(Section):
    """Strengths of ColorJitter (jitter.py), hue in turns."""

    hue: float = Field(default=0.0, ge=0, le=0.5)
    saturation: Strength = 0.0
    brightness: Strength = 0.0
    contrast: Strength = 0.0


class HsvSettings(Section):
    """Strengths of HSV (jitter.py), hue in turns."""

    hue: float = Field(default=0.015, ge=0, le=0.5)
    saturation: Strength = 0.7
    value: Strength = 0.4


class RandAugmentSettings(Section):
    """`num_ops` operations of one `magnitude`, drawn for each picture (policies.py); 0 is none."""

    num_ops: int = Field(default=0, ge=0)
    magnitude: float = Field(default=6.0, ge=0, le=10)  # at 5 colour and contrast stay


class AutoAugmentSettings(Section):
    """A learnt policy (policies.py); None is none."""

    policy: Literal["v0", "v1", "v2", "v3"] | None = None


class Augment(Section):
    """Every transform of a labeled picture; the YOLO family's defaults, but for `min_visible`."""

    mosaic: MosaicSettings = MosaicSettings()
    mixup: MixUpSettings = MixUpSettings()
    cutmix: CutMixSettings = CutMixSettings()
    gridmask: GridMaskSettings = GridMaskSettings()
    affine: AffineSettings = AffineSettings()
    crop: CropSettings = CropSettings()
    flip: FlipSettings = FlipSettings()
    randaugment: RandAugmentSettings = RandAugmentSettings()
    autoaugment: AutoAugmentSettings = AutoAugmentSettings()
    colour: ColourSettings = ColourSettings()
    hsv: HsvSettings = HsvSettings()
    # Share of the budget, at its end, without mosaic, MixUp and CutMix: pictures as they are.
    close: Probability = 0.1
    # Which boxes survive a cut (boxes.py): share of the area, and pixels of each side.
    min_visible: Probability = 0.25
    min_side: Strength = 2.0
