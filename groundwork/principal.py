"""Feature maps as colours, by their principal components."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ROBUST = 0.02  # of the values at either end are clipped before colours are stretched


def principal_colours(maps: Tensor) -> Tensor:
    """Return the three main directions of N C H W as uint8 N 3 H W, stretched over all pictures."""
    n, channels, height, width = maps.shape
    # A view for a person must not end a run whose features are not finite: its guard will.
    cells = maps.permute(0, 2, 3, 1).reshape(-1, channels).double().nan_to_num(0.0, 0.0, 0.0)
    cells = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    values = cells @ directions[:3].T  # n H W, at most 3
    values = functional.pad(values, (0, 3 - values.shape[1]))
    low, high = (values.quantile(q, dim=0) for q in (_ROBUST, 1 - _ROBUST))
    stretched = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (
        (stretched * 255).round().to(torch.uint8).reshape(n, height, width, 3).permute(0, 3, 1, 2)
    )
