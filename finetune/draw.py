"""Boxes drawn on pictures: each class in a colour of its own, its name where there is room.

What: `draw_boxes` for a picture, `draw_box` for one box of a sheet that is being laid out,
`draw_labels` for the labels of a picture made smaller, `sheet_of` and `save_boxes` for several
pictures side by side. Why in one place: labels, training's pictures and predictions then look
alike, so that whoever compares them sees what differs in the boxes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture

TEXT = 13  # pixels: height of the smallest text
_LINE = 2  # pixels: the thinnest outline
_GAP = 4  # pixels of white between pictures
# A picture's longer side over its outlines' width and its text's height, so that what is looked at
# as a whole can still be seen; small objects are common in large pictures, hence no more than that.
_SIDE_OVER_LINE, _SIDE_OVER_TEXT = 800, 100
_BOX_OVER_LINE = 12  # an outline leaves most of a small box to be seen

Colour = tuple[int, int, int]


def as_image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Make a picture of uint8 H W C, for a person: of C the first three are RGB, or it is grey."""
    channels = slice(3) if pixels.shape[2] >= 3 else [0, 0, 0]
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, channels]))


def scaled(picture: Picture, side: int) -> tuple[Image.Image, float]:
    """Return a picture whose longer side is `side` pixels, and by what its sides were multiplied.

    Raises DataError for pixels that cannot be decoded.
    """
    scale = side / max(picture.width, picture.height)
    size = max(1, round(picture.height * scale)), max(1, round(picture.width * scale))
    return as_image(picture.cut([picture.whole], size)[0]), scale


def draw_labels(
    image: Image.Image, scale: float, labels: Annotations, names: Sequence[str]
) -> Image.Image:
    """Return a copy of an RGB picture with its labels drawn, as `scaled` gave it."""
    classes = np.where(labels.crowd, ~labels.classes, labels.classes)
    return draw_boxes(image, labels.boxes * scale, classes, names)


def draw_boxes(
    image: Image.Image,
    boxes: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    names: Sequence[str],
    scores: npt.NDArray[Any] | None = None,
) -> Image.Image:
    """Return a copy of an RGB picture with its boxes drawn, the best of them last.

    `boxes` is N 4 (left, top, right, bottom in pixels), `classes` N (of a crowd of class c ~c),
    `scores` N in 0..1.
    """
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    order = np.arange(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    for place in order.tolist():
        number = int(classes[place])
        text = f"{names[~number]} (crowd)" if number < 0 else names[number]
        number = max(number, ~number)
        text = text if scores is None else f"{text} {scores[place]:.2f}"
        draw_box(pen, boxes[place].tolist(), text, colour_of(number))
    return drawn


def save_boxes(path: Path, seen: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write pictures side by side as one PNG; `seen` is what Training.seen gives."""
    pictures = []
    for number, picture in enumerate(seen["picture"].permute(0, 2, 3, 1).numpy()):
        own = seen["boxes_sample"] == number
        boxes, classes = seen["boxes"][own].numpy(), seen["classes"][own].numpy()
        pictures.append(draw_boxes(Image.fromarray(picture), boxes, classes, names))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(pictures).save(path)


def sheet_of(pictures: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Lay pictures side by side, each in a cell as large as the largest."""
    columns = min(columns, len(pictures))
    width, height = (max(one.size[axis] for one in pictures) + _GAP for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for number, one in enumerate(pictures):
        sheet.paste(one, (number % columns * width, number // columns * height))
    return sheet


def draw_box(pen: ImageDraw.ImageDraw, box: Sequence[float], text: str, colour: Colour) -> None:
    """Draw a box (left, top, right, bottom in pixels), and what it is where there is room."""
    left, top, right, bottom = box
    longer = max(pen.im.size)
    line = min(longer // _SIDE_OVER_LINE, int(min(right - left, bottom - top) / _BOX_OVER_LINE))
    far = (max(left, right - 1), max(top, bottom - 1))  # Pillow draws the far edge too
    pen.rectangle((left, top, *far), outline=colour, width=max(_LINE, line))
    height = max(TEXT, longer // _SIDE_OVER_TEXT)
    font = ImageFont.load_default(height)
    length = pen.textlength(text, font)
    if length <= max(right - left, longer / 8):
        start = max(0.0, min(left, pen.im.size[0] - length))  # not cut off at the right
        draw_tag(pen, (start, max(0.0, top - height)), text, colour, font)


def draw_tag(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont | None = None,
    margin: float = 0,
) -> float:
    """Write on a ground of a class's colour, from `place` (left, top); return the text's length."""
    font = font or ImageFont.load_default(TEXT)
    height = font.size if isinstance(font, ImageFont.FreeTypeFont) else TEXT
    left, top = place
    length = pen.textlength(text, font)
    pen.rectangle((left - margin, top, left + length + margin, top + height), fill=colour)
    pen.text((left, top - 1), text, ink_on(colour), font)
    return length


def colour_of(number: int) -> Colour:
    """Return a class's colour: hues a golden angle apart, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 1.0, 1.0 - number % 2 * 0.15)
    return round(red * 255), round(green * 255), round(blue * 255)


def ink_on(colour: Colour) -> str:
    """Return what can be read on a colour (luma of ITU-R BT.601)."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
