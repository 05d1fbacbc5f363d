"""The chain that a recipe's `augment.*` asks for.

The order, which is that of the customary pipelines: Mosaic, MixUp, CutMix (pictures are joined),
GridMask, RandomAffine (one sampling, which also takes its window out of a mosaic), RandomCrop,
flips and quarter turn, RandAugment, AutoAugment, ColorJitter, HSV (numbers for the device), and the
letterbox that ends every chain. What a recipe turns off is not in the chain.
"""

from __future__ import annotations

from finetune.augment.affine import RandomAffine
from finetune.augment.boxes import Rule
from finetune.augment.contract import Compose, Transform
from finetune.augment.flips import RandomHorizontalFlip, RandomQuarterTurn, RandomVerticalFlip
from finetune.augment.jitter import HSV, ColorJitter
from finetune.augment.mosaic import Mosaic
from finetune.augment.settings import Augment


def build(settings: Augment, mixing: bool) -> Compose:
    """Build the chain; `mixing` False is the end of training, without joined pictures."""
    rule = Rule(settings.min_visible, settings.min_side)
    chain: list[Transform] = []
    if mixing and settings.mosaic.prob:
        chain.append(Mosaic(settings.mosaic.prob, settings.mosaic.tiles, rule=rule))
    affine = settings.affine
    if not affine.neutral or (mixing and settings.mosaic.prob):
        chain.append(
            RandomAffine(
                affine.degrees,
                affine.scale,
                affine.translate,
                affine.shear,
                enclose=affine.enclose,
                rule=rule,
            )
        )
    flip = settings.flip
    if flip.horizontal:
        chain.append(RandomHorizontalFlip(flip.horizontal))
    if flip.vertical:
        chain.append(RandomVerticalFlip(flip.vertical))
    if flip.quarter_turn:
        chain.append(RandomQuarterTurn(flip.quarter_turn))
    colour = settings.colour
    if colour.hue or colour.saturation or colour.brightness or colour.contrast:
        chain.append(ColorJitter(colour.hue, colour.saturation, colour.brightness, colour.contrast))
    hsv = settings.hsv
    if hsv.hue or hsv.saturation or hsv.value:
        chain.append(HSV(hsv.hue, hsv.saturation, hsv.value))
    return Compose(chain)
