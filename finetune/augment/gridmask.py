"""GridMask: a regular grid of squares is hidden, so that no object can be known by one part alone.

Source: Chen et al., arXiv 2001.04086: a unit of side d holds a hidden square of side (1 - r) d; d
is drawn, and so is where the grid begins. The values are those for ImageNet (section 4.1): r 0.6,
d from 96 to 224 pixels of 224; d is drawn here as a share of the shorter side of source.size.

Boxes keep their edges, since an object reaches as far as before; one of which less than the rule's
share is left to be seen is dropped, since nothing would tell the detector that it is there.

Hidden pixels are grey, and are distorted with the picture by whatever colour is drawn for it,
before or after: colour is applied last, on the device.

Differs from the paper: the grid is not turned, and the probability is constant (there it rises).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from finetune.augment.boxes import Rule, area
from finetune.augment.contract import Item, Source, checked
from finetune.augment.warp import GREY


class GridMask:
    """Hides a grid of squares with the probability `prob`.

    `ratio` is the paper's r; `pitch` bounds the unit's side, as a share of the shorter side of
    source.size.
    """

    def __init__(
        self,
        prob: float = 0.3,
        ratio: float = 0.6,
        pitch: tuple[float, float] = (0.43, 1.0),
        *,
        rule: Rule | None = None,
    ) -> None:
        self.prob = checked("prob", prob)
        self.ratio = checked("ratio", ratio)
        self.pitch = pitch
        self.rule = rule or Rule()

    def __call__(self, item: Item, source: Source) -> Item:
        """Return the item with its grid hidden, or as it is."""
        generator = source.generator
        if generator.random() >= self.prob:
            return item
        unit = max(2, round(min(source.size) * generator.uniform(*self.pitch)))
        hidden = round(unit * (1 - self.ratio))
        rows, columns = (
            _hidden(length, unit, hidden, int(generator.integers(unit)))
            for length in item.pixels.shape[:2]
        )
        pixels = item.pixels.copy()
        for top, bottom in rows:
            for left, right in columns:
                pixels[top:bottom, left:right] = GREY
        # A grid covers of a box the product of what it covers of its two sides.
        covered = _covered(item.boxes[:, [0, 2]], columns) * _covered(item.boxes[:, [1, 3]], rows)
        whole = area(item.boxes)
        kept = self.rule.keeps(item.boxes, whole, whole - covered, item.classes)
        return replace(item, pixels=pixels, boxes=item.boxes[kept], classes=item.classes[kept])


def _hidden(length: int, unit: int, hidden: int, offset: int) -> npt.NDArray[np.int64]:
    """Return the hidden stretches of one axis, K 2: start and end."""
    starts = np.arange(offset - unit, length, unit)
    ends = np.clip(starts + hidden, 0, length)
    starts = np.maximum(starts, 0)
    stretches: npt.NDArray[np.int64] = np.stack([starts, ends], axis=1)[starts < ends]
    return stretches


def _covered(
    sides: npt.NDArray[np.float32], stretches: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return how much of each side, N (from N 2), lies in the stretches."""
    low = np.maximum(sides[:, None, 0], stretches[None, :, 0])
    high = np.minimum(sides[:, None, 1], stretches[None, :, 1])
    length: npt.NDArray[np.float32] = np.maximum(high - low, 0).sum(axis=1).astype(np.float32)
    return length
