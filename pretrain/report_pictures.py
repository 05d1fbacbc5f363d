"""What features see, as pictures: their main directions as colours, and nearest neighbours.

The first three principal components of a level's cells over a few pictures are red, green and blue
(the view of DINOv2, arXiv 2304.07193, figure 1): parts of one colour are alike to the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.modes import evaluating
from groundwork.precise_batchnorm import measured_statistics
from groundwork.principal import principal_colours
from pretrain.feature_maps import feature_maps


@dataclass(frozen=True)
class Seen:
    """Pictures uint8 N 3 side side: the pictures shown, and each level's colours over them."""

    pictures: Tensor
    levels: dict[str, Tensor]
    neighbours: Tensor  # queries x (1 + k), each row a query and the pictures most like it


@torch.no_grad()
def look(
    backbone: Backbone, pixels: Tensor, *, shown: int = 8, queries: int = 6, k: int = 5
) -> Seen:
    """Show what a backbone makes of uint8 N side side C; BatchNorm is measured on them."""
    with (
        evaluating(backbone),
        measured_statistics(backbone, lambda: feature_maps(backbone, None, pixels)),
    ):
        maps = feature_maps(backbone, None, pixels)
    pictures = colour.shown(pixels)
    side = pictures.shape[2]
    colours = {
        name: functional.interpolate(principal_colours(level[:shown].cpu()), size=side)
        for name, level in zip(("C3", "C4", "C5"), maps, strict=True)
    }
    pooled = functional.normalize(maps.p5.mean((2, 3)).cpu(), dim=1)
    likeness = pooled @ pooled.T
    asked = torch.arange(min(queries, len(pixels))) * (len(pixels) // max(queries, 1) or 1)
    nearest = likeness[asked].topk(min(k + 1, len(pixels)), dim=1).indices
    # A picture is most like itself, but for a copy of it.
    rest = torch.stack([row[row != query][:k] for row, query in zip(nearest, asked, strict=True)])
    return Seen(pictures[:shown], colours, torch.cat((asked[:, None], rest), 1))
