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
from finetune.augment.crop import RandomCrop
from finetune.augment.flips import RandomHorizontalFlip, RandomQuarterTurn, RandomVerticalFlip
from finetune.augment.gridmask import GridMask
from finetune.augment.jitter import HSV, ColorJitter
from finetune.augment.mixing import CutMix, MixUp
from finetune.augment.mosaic import Mosaic
from finetune.augment.policies import AutoAugment, RandAugment
from finetune.augment.settings import Augment


def build(settings: Augment, mixing: bool) -> Compose:
    """Build the chain; `mixing` False is the end of training, without joined pictures."""
    rule = Rule(settings.min_visible, settings.min_side)
    joined = _joined(settings, rule) if mixing else []
    chain = [
        *joined,
        *_geometry(settings, rule, bool(joined)),
        *_policies(settings, rule),
        *_colour(settings),
    ]
    return Compose(chain, rule=rule)


def _joined(settings: Augment, rule: Rule) -> list[Transform]:
    chain: list[Transform] = []
    if settings.mosaic.prob:
        chain.append(Mosaic(settings.mosaic.prob, settings.mosaic.tiles, rule=rule))
    if settings.mixup.prob:
        chain.append(MixUp(settings.mixup.prob, settings.mixup.alpha))
    if settings.cutmix.prob:
        chain.append(CutMix(settings.cutmix.prob, settings.cutmix.alpha, rule=rule))
    return chain


def _geometry(settings: Augment, rule: Rule, joined: bool) -> list[Transform]:
    chain: list[Transform] = []
    mask, affine, flip = settings.gridmask, settings.affine, settings.flip
    if mask.prob:
        chain.append(GridMask(mask.prob, mask.ratio, mask.pitch, rule=rule))
    if joined or not affine.neutral:  # only it takes a window out of a mosaic
        bounds = affine.degrees, affine.scale, affine.translate, affine.shear
        chain.append(RandomAffine(*bounds, enclose=affine.enclose, rule=rule))
    if settings.crop.prob:
        chain.append(RandomCrop(settings.crop.prob, rule=rule))
    if flip.horizontal:
        chain.append(RandomHorizontalFlip(flip.horizontal))
    if flip.vertical:
        chain.append(RandomVerticalFlip(flip.vertical))
    if flip.quarter_turn:
        chain.append(RandomQuarterTurn(flip.quarter_turn))
    return chain


def _policies(settings: Augment, rule: Rule) -> list[Transform]:
    chain: list[Transform] = []
    drawn, learnt = settings.randaugment, settings.autoaugment
    if drawn.num_ops:
        chain.append(RandAugment(drawn.num_ops, drawn.magnitude, rule=rule))
    if learnt.policy is not None:
        chain.append(AutoAugment(learnt.policy, rule=rule))
    return chain


def _colour(settings: Augment) -> list[Transform]:
    chain: list[Transform] = []
    colour, hsv = settings.colour, settings.hsv
    if colour.hue or colour.saturation or colour.brightness or colour.contrast:
        strengths = colour.hue, colour.saturation, colour.brightness, colour.contrast
        chain.append(ColorJitter(*strengths))
    if hsv.hue or hsv.saturation or hsv.value:
        chain.append(HSV(hsv.hue, hsv.saturation, hsv.value))
    return chain
