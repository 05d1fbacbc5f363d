"""A copy of a network that follows it slowly, as BYOL's target does (arXiv 2006.07733)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(
    target: Iterable[nn.Module], online: Iterable[nn.Module], momentum: float, progress: float
) -> None:
    """Move the parameters of `target` towards those of `online` (section 3.3).

    They keep `momentum` of themselves at the beginning (progress 0) and all at the end (1).
    """
    keep = 1 - (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2
    torch._foreach_lerp_(_parameters(target), _parameters(online), 1 - keep)


def _parameters(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]
