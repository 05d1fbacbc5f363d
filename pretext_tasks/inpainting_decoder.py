"""From the pyramid to what is hidden: the light decoders of inpainting.

`Summed` brings all levels to stride 8 at once (in the spirit of SimMIM, arXiv 2111.09886: next to
nothing, so that the work is the backbone's). `Hierarchical` goes up level by level, as the decoder
of SparK (Tian et al. 2023, arXiv 2301.03580, section 3.2) does: what it has at one stride is
doubled and the next finer level is added.

Differs from SparK: one width instead of half as many channels at each step, nearest neighbours
instead of a transposed convolution, one 3x3 convolution a step instead of two, and it ends at
stride 8, each cell of which gives all its pixels, instead of going up to the picture's size.
GroupNorm in both, so that they have no statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Level, Pyramid
from groundwork.necks.yolo12 import Features
from pretext_tasks.inpainting_targets import STRIDE

GROUP = 8  # channels that are normalised together


class Summed(nn.Module):
    """1x1 convolutions to one width, brought to stride 8 (nearest) and summed; one 3x3 convolution.

    Maps of stride 16 and 32 predict from C4 and C5 alone. `cells` tells by stride how many values
    there are for each of a map's cells.
    """

    def __init__(
        self, levels: tuple[Level, Level, Level], width: int, cells: Mapping[int, int]
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in levels)
        self.block = _block(width)
        self.output = nn.Conv2d(width, cells[STRIDE], 1)
        # A head that no loss reaches would hold up DDP: there are only those that are asked for.
        self.deep = nn.ModuleDict(
            {
                str(scale): nn.Sequential(
                    nn.GroupNorm(width // GROUP, width),
                    nn.SiLU(),
                    nn.Conv2d(width, cells[scale], 1),
                )
                for scale in sorted(set(cells) - {STRIDE})
            }
        )

    def forward(self, pyramid: Pyramid | Features) -> dict[int, Tensor]:
        """Return, by stride, N cell H/stride W/stride, finest first."""
        maps = [lateral(level) for lateral, level in zip(self.lateral, pyramid, strict=True)]
        finest, *coarse = self.merged(*maps)
        own = dict(zip(("16", "32"), coarse, strict=True))
        predictions = {STRIDE: self.output(self.block(finest))}
        return predictions | {int(name): head(own[name]) for name, head in self.deep.items()}

    def merged(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what predicts at strides 8, 16 and 32, of maps of one width."""
        size = c3.shape[2:]
        finest = c3 + functional.interpolate(c4, size) + functional.interpolate(c5, size)
        return finest, c4, c5


class Hierarchical(Summed):
    """From C5 up: a 3x3 convolution, twice the size, and the next level added.

    Maps of stride 16 and 32 predict from what has come up to them.
    """

    def __init__(
        self, levels: tuple[Level, Level, Level], width: int, cells: Mapping[int, int]
    ) -> None:
        super().__init__(levels, width, cells)
        self.from_c5, self.from_c4 = _block(width), _block(width)

    def merged(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what predicts at strides 8, 16 and 32, of maps of one width."""
        c4 = c4 + functional.interpolate(self.from_c5(c5), c4.shape[2:])
        c3 = c3 + functional.interpolate(self.from_c4(c4), c3.shape[2:])
        return c3, c4, c5


DECODERS: dict[str, type[Summed]] = {"sum": Summed, "hierarchical": Hierarchical}


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(width // GROUP, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.GroupNorm(width // GROUP, width),
        nn.SiLU(),
    )
