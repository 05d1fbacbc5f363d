"""The operations of RandAugment and AutoAugment, on a picture and its boxes, by level 0 to 10.

Source: Zoph et al., "Learning Data Augmentation Strategies for Object Detection", arXiv 1906.11172,
and the ranges published with its policies (google/automl, Apache-2.0); names are theirs.
`..._BBox` moves the picture and its boxes. `..._Only_BBoxes` changes what lies in boxes, each
chosen with a third of the probability, and moves no box. Colours are changed by torchvision.

Differs from the source:
- Lengths, there pixels of pictures of about 640, are that share of the longer side.
- Gaps are grey 114, not 128; boxes survive by the rule of boxes.py, cutouts included.
- Posterize keeps 8 bits less 4 * level / 10; as published it would keep 4 * level / 10, which at
  the policies' level 2 is none.
- Contrast turns about the mean grey, as torchvision's; the published one about another value.
- Boxes are changed in their order, not in a random one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from finetune.augment.affine import transformed
from finetune.augment.boxes import Matrix, Rule, area, overlap
from finetune.augment.contract import Item
from finetune.augment.warp import GREY, Pixels, mirrored, warped

Window = tuple[float, float, float, float]

# At level 10, as shares of the longer side: moves, and half the side of a cutout.
_MOVE, _MOVE_IN_BOX, _CUT, _CUT_IN_BOX = (pixels / 640 for pixels in (250, 120, 100, 50))
_CUT_OF_BOX = 0.75  # of the sides of a box
_DEGREES, _SHEAR = 30.0, 0.3

_BOXES_TOO, _IN_BOXES = "_BBox", "_Only_BBoxes"


class Step(NamedTuple):
    """One operation of a policy."""

    name: str
    probability: float
    level: float  # 0 to 10


def _factor(level: float) -> float:
    """Return the factor of Color, Contrast, Brightness and Sharpness; level 5 changes nothing."""
    return 0.1 + 1.8 * level / 10


def _solarize(image: Tensor, level: float) -> Tensor:
    """Invert the values from 25.6 * level up: at level 10 none, at 0 all."""
    threshold = int(25.6 * level)
    changed: Tensor = image if threshold > 255 else functional.solarize(image, threshold)
    return changed


def _solarize_add(image: Tensor, level: float) -> Tensor:
    """Add to the values under 128."""
    added = (image.to(torch.int16) + int(11 * level)).clamp_(max=255).to(torch.uint8)
    return torch.where(image < 128, added, image)


# Tensor (uint8, 3 H W) and level -> tensor.
_COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": lambda image, level: functional.autocontrast(image),
    "Equalize": lambda image, level: functional.equalize(image),
    "Posterize": lambda image, level: functional.posterize(image, 8 - round(0.4 * level)),
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda image, level: functional.adjust_saturation(image, _factor(level)),
    "Contrast": lambda image, level: functional.adjust_contrast(image, _factor(level)),
    "Brightness": lambda image, level: functional.adjust_brightness(image, _factor(level)),
    "Sharpness": lambda image, level: functional.adjust_sharpness(image, _factor(level)),
}
_MAPS = ("TranslateX", "TranslateY", "ShearX", "ShearY", "Rotate")

NAMES = (
    *_COLOURS,
    "Cutout",
    "BBox_Cutout",
    *(name + suffix for name in _MAPS for suffix in (_BOXES_TOO, _IN_BOXES)),
    *(name + _IN_BOXES for name in ("Flip", "Cutout", "Equalize", "Solarize")),
)


def operate(step: Step, item: Item, generator: np.random.Generator, rule: Rule) -> Item:
    """Do one step, where its probability is drawn."""
    if step.name.endswith(_IN_BOXES):
        return _in_boxes(step, item, generator)
    if generator.random() >= step.probability:
        return item
    if step.name in _COLOURS:
        return replace(item, pixels=_coloured(step.name, item.pixels, step.level))
    height, width = item.pixels.shape[:2]
    if step.name == "Cutout":
        reach = step.level / 10 * _CUT * max(height, width)
        return _cut_out(item, (0, 0, width, height), (reach, reach), generator, rule)
    if step.name == "BBox_Cutout":
        return _cut_out_of_box(step.level, item, generator, rule)
    name = step.name.removesuffix(_BOXES_TOO)
    signed = _signed(step.level, generator)
    matrix = _about_centre(name, signed, _MOVE * max(height, width), (height, width))
    return transformed(item, matrix, (height, width), rule)


def _coloured(name: str, pixels: Pixels, level: float) -> Pixels:
    # Contiguous planes: some of torchvision's operations then take a seventh of the time.
    planes = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    # They know grey and RGB: of other channels the first three are RGB, the others greys.
    first = 3 if len(planes) >= 3 else 1
    parts = [planes[:first], *(planes[c : c + 1] for c in range(first, len(planes)))]
    changed = [_COLOURS[name](part, level) for part in parts]
    result: Pixels = torch.cat(changed).permute(1, 2, 0).contiguous().numpy()
    return result


def _signed(level: float, generator: np.random.Generator) -> float:
    return level if generator.random() < 0.5 else -level


def _about_centre(name: str, level: float, move: float, size: tuple[int, int]) -> Matrix:
    """Return a map about the centre of a picture, 2 x 3; `move` is the longest, in pixels."""
    part = level / 10
    linear, shift = np.eye(2), np.zeros(2)
    if name == "Rotate":
        cos, sin = math.cos(math.radians(part * _DEGREES)), math.sin(math.radians(part * _DEGREES))
        linear = np.array([[cos, -sin], [sin, cos]])
    elif name == "ShearX":
        linear[0, 1] = part * _SHEAR
    elif name == "ShearY":
        linear[1, 0] = part * _SHEAR
    else:
        shift[0 if name == "TranslateX" else 1] = part * move
    centre = np.array(size[::-1]) / 2
    return np.column_stack([linear, centre + shift - linear @ centre])


def _cut_out_of_box(level: float, item: Item, generator: np.random.Generator, rule: Rule) -> Item:
    """Hide a rectangle whose sides are a share of a drawn box's, and whose centre lies in it."""
    boxes = item.boxes[item.classes >= 0]
    if not len(boxes):
        return item
    left, top, right, bottom = boxes[int(generator.integers(len(boxes)))].tolist()
    share = level / 10 * _CUT_OF_BOX / 2
    reach = share * (right - left), share * (bottom - top)
    return _cut_out(item, (left, top, right, bottom), reach, generator, rule)


def _cut_out(
    item: Item,
    around: Window,
    reach: tuple[float, float],
    generator: np.random.Generator,
    rule: Rule,
) -> Item:
    pixels = item.pixels.copy()
    hidden = _hide(pixels, around, reach, generator)
    whole = area(item.boxes)
    kept = rule.keeps(item.boxes, whole, whole - overlap(item.boxes, hidden), item.classes)
    return replace(item, pixels=pixels, boxes=item.boxes[kept], classes=item.classes[kept])


def _hide(
    pixels: Pixels, around: Window, reach: tuple[float, float], generator: np.random.Generator
) -> Window:
    """Grey, in place, what lies within `reach` of a point drawn from a window; say what it was."""
    height, width = pixels.shape[:2]
    across, down = generator.uniform(around[0], around[2]), generator.uniform(around[1], around[3])
    left, right = (round(min(max(across + side, 0), width)) for side in (-reach[0], reach[0]))
    top, bottom = (round(min(max(down + side, 0), height)) for side in (-reach[1], reach[1]))
    pixels[top:bottom, left:right] = GREY
    return left, top, right, bottom


def _in_boxes(step: Step, item: Item, generator: np.random.Generator) -> Item:
    """Change what lies in some of the boxes; the boxes stay."""
    pixels = item.pixels
    height, width = pixels.shape[:2]
    name, side = step.name.removesuffix(_IN_BOXES), max(height, width)
    for box in item.boxes[item.classes >= 0]:
        if generator.random() >= step.probability / 3:
            continue
        left, top = (max(int(edge), 0) for edge in np.floor(box[:2]))
        right, bottom = (int(edge) for edge in np.ceil(box[2:]))
        if pixels is item.pixels:
            pixels = pixels.copy()
        inside = pixels[top:bottom, left:right]
        if inside.size:
            inside[:] = _changed(name, inside, step.level, side, generator)
    return replace(item, pixels=pixels)


def _changed(
    name: str, inside: Pixels, level: float, side: int, generator: np.random.Generator
) -> Pixels:
    """Return the changed content of one box, in a picture whose longer side is `side`."""
    size = inside.shape[0], inside.shape[1]
    if name in _COLOURS:
        return _coloured(name, inside, level)
    if name == "Flip":
        return mirrored(inside, axis=1)
    if name == "Cutout":
        result = inside.copy()
        reach = level / 10 * _CUT_IN_BOX * side
        _hide(result, (0, 0, size[1], size[0]), (reach, reach), generator)
        return result
    matrix = _about_centre(name, _signed(level, generator), _MOVE_IN_BOX * side, size)
    return warped(inside, matrix, size)
