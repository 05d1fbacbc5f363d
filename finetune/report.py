"""What a person looks at: the pictures that training sees, with their boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from finetune.draw import draw_boxes

GAP = 4  # pixels of white between pictures
COLUMNS = 4


def save_boxes(path: Path, seen: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write pictures side by side as one PNG; `seen` is what Training.seen gives."""
    pictures = []
    for number, picture in enumerate(seen["picture"].permute(0, 2, 3, 1).numpy()):
        own = seen["boxes_sample"] == number
        boxes, classes = seen["boxes"][own].numpy(), seen["classes"][own].numpy()
        pictures.append(np.asarray(draw_boxes(Image.fromarray(picture), boxes, classes, names)))
    height, width, _ = pictures[0].shape
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + GAP), columns * (width + GAP), 3), 255, np.uint8)
    for number, drawn in enumerate(pictures):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = drawn
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
