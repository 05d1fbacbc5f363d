"""What a person looks at: sheets of pictures of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

GAP = 4  # pixels of white between pictures


def save_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Write uint8 N 3 H W pictures side by side as one PNG."""
    n, _, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8
    )
    for i, picture in enumerate(pictures.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
