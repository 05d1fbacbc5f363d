"""Kinds of regions from what a network has learned so far: clusters of its features.

At chosen points of a run a copy of the network is taken. It looks at every view as it was cut,
without the drawn colours; a region's features are the mean over its box, in P3, P4 or P5 by the
box's size. Once enough regions of a level have been seen, their features are whitened (along 32
principal directions) and split by spherical k-means; from then on a region's kind is the cluster
that the copy sees it in. The network learns to tell it of the coloured view, so that its features
come to hold what regions that look alike have in common.

Source: DeepCluster (Caron et al. 2018, arXiv 1807.05520), clusters of whitened features as the
classes that the network is trained on next, made anew at times. Differs from the paper: features
are of regions, not of pictures; the copy stays as it is between two such points, so that no pass
over the data is needed and a region is of nearly the same kind in all its views; k-means is over
the first regions that the copy has seen.

With several processes each makes clusters of its own views; DDP's broadcast of buffers makes the
main process's everybody's at the next forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from groundwork.backbones.contract import Level
from groundwork.modes import evaluating
from groundwork.necks.yolo12 import Features

_LIMITS = (32.0, 64.0)  # pixels: the side up to which a region is looked at in P3, and in P4
_SEEN = 2048  # regions of a level that clusters are made of
_DIRECTIONS = 32  # of a level's features that are kept
_ROUNDS = 20  # of k-means
_BINS = 3  # of a box's side, of two samples each
_FLOOR = 1e-4  # of the largest variance: no direction is divided by less


class Clusters(nn.Module):
    """A copy of a network, images N C H W -> Features, and the clusters of its features."""

    def __init__(self, network: nn.Module, levels: Sequence[Level], count: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.strides = [level.stride for level in levels]
        self.levels = nn.ModuleList(LevelClusters(level.channels, count) for level in levels)
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))  # copies so far
        self.taken: Tensor

    @property
    def count(self) -> int:
        """How many clusters there are, in all levels."""
        return sum(level.count for level in self.by_level)

    @torch.no_grad()
    def take(self, network: nn.Module) -> None:
        """Copy the network as it is now, and forget the clusters."""
        self.network.load_state_dict(network.state_dict())
        self.taken += 1
        for level in self.by_level:
            level.filled.zero_()
            level.ready.fill_(False)

    @torch.no_grad()
    def kinds(self, image: Tensor, row: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return each box's cluster, G from 0 to count - 1, and whether it has one yet, G bool.

        `image` N C H W, normalised; `row` G says in which image a box is, `boxes` G 4 in pixels.
        Boxes of a level without clusters are kept for making them.
        """
        with evaluating(self.network):
            features: Features = self.network(image)
        side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        of_level = torch.bucketize(side, side.new_tensor(_LIMITS))
        places = torch.cat((row[:, None].to(boxes.dtype), boxes), 1)
        found, known, first = torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool), 0
        for index, level in enumerate(self.by_level):
            own = (of_level == index).nonzero().squeeze(1)
            bins = roi_align(
                features[index].float(), places[own], _BINS, 1 / self.strides[index], 2, True
            )
            described = bins.mean((2, 3))
            if level.ready:
                found[own] = first + level.nearest(described)
                known[own] = True
            else:
                level.keep(described)
            first += level.count
        return found, known

    @torch.no_grad()
    def update(self) -> None:
        """Make the clusters of levels of which enough has been seen."""
        for level in self.by_level:
            if not level.ready and level.filled == _SEEN:
                level.make()

    @property
    def by_level(self) -> list[LevelClusters]:
        """The clusters of P3, P4 and P5."""
        return [level for level in self.levels if isinstance(level, LevelClusters)]


class LevelClusters(nn.Module):
    """The clusters of one level."""

    seen: Tensor
    filled: Tensor
    ready: Tensor
    mean: Tensor
    turn: Tensor
    centres: Tensor

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        kept = min(_DIRECTIONS, channels)
        self.count = count
        self.register_buffer("seen", torch.zeros(_SEEN, channels))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # rows of `seen`
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("turn", torch.zeros(channels, kept))
        self.register_buffer("centres", torch.zeros(count, kept))

    def keep(self, features: Tensor) -> None:
        """Keep features G C for making clusters, up to `_SEEN`."""
        filled = int(self.filled)
        features = features[: _SEEN - filled]
        self.seen[filled : filled + len(features)] = features
        self.filled += len(features)

    def make(self) -> None:
        """Make the clusters of what was kept."""
        self.mean.copy_(self.seen.mean(0))
        centred = self.seen - self.mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        kept = self.turn.shape[1]
        variances, directions = variances[-kept:], directions[:, -kept:]
        floor = (variances[-1] * _FLOOR).clamp(min=torch.finfo(variances.dtype).tiny)
        self.turn.copy_(directions / variances.maximum(floor).sqrt())
        self.centres.copy_(spherical_kmeans(self._whitened(self.seen), self.count))
        self.ready.fill_(True)

    def nearest(self, features: Tensor) -> Tensor:
        """Return the cluster of each of features G C."""
        return (self._whitened(features) @ self.centres.T).argmax(1)

    def _whitened(self, features: Tensor) -> Tensor:
        return functional.normalize((features - self.mean) @ self.turn, dim=1)


def spherical_kmeans(points: Tensor, count: int) -> Tensor:
    """Return `count` centres, of length 1, of points P C of length 1, P >= count.

    Starts from points at equal distances in the list. A cluster that lost all its points goes on
    from the point that its centre suits least.
    """
    centres = points[torch.arange(count, device=points.device) * len(points) // count]
    for _ in range(_ROUNDS):
        similar, own = (points @ centres.T).max(1)
        sums = torch.zeros_like(centres).index_add_(0, own, points)
        empty = torch.bincount(own, minlength=count) == 0
        worst = points[similar.argsort()[: int(empty.sum())]]
        sums[empty] = worst
        centres = functional.normalize(sums, dim=1)
    return centres
