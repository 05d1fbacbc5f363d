"""A convolutional backbone that sees the visible cells alone, as if hidden ones were not there.

SparK (Tian et al. 2023, arXiv 2301.03580, section 3.1) gives a convolutional network what a
transformer has by dropping tokens: after every operation hidden cells are empty (0), so that no
picture content grows into a hole from layer to layer, and normalisation counts visible cells only,
so that its statistics are those of pictures without holes and fit what fine-tuning shows. Dense
operations with hidden cells set back to 0 compute the same as sparse convolution.

BatchNorm gathers the visible cells, normalises them and puts them into zeros; activations, sums and
chains behind it keep a 0. Convolutions with a bias and pooling are emptied at their own output.
Area attention leaves hidden cells out of its keys.

Differs from the paper: attention is no part of it; hidden cells are no keys, which is what
dropping their tokens does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from groundwork.backbones.contract import Backbone
from groundwork.backbones.yolo12 import AreaAttention
from groundwork.errors import UsageError

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def check_backbone(backbone: Backbone) -> None:
    """Raise UsageError where a backbone has weights, or filters, that are not known here."""
    for name, module in backbone.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        own += [key for key, _ in module.named_buffers(recurse=False)]  # a blur's kernel
        # Large YOLOv12 stages own a vector that scales a sum: 0 stays 0.
        if own and own != ["gamma"] and not isinstance(module, (nn.Conv2d, *_NORMS)):
            raise UsageError(
                f"task.encoder=sparse knows convolution, BatchNorm and area attention; "
                f"{backbone.name} has {type(module).__name__} ({name}). Use task.encoder=dense, or "
                "a backbone such as yolo12n or timm/resnet18."
            )


@contextmanager
def visible_only(backbone: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Run the backbone on visible cells alone; `hidden` is bool N S S, block by block.

    A block's side is a multiple of 32 px, so that every feature map has whole cells in it. What the
    backbone returns is 0 where hidden.
    """
    cells = _Cells(hidden)
    hooks = []
    norms: list[nn.Module] = []
    attentions: list[AreaAttention] = []
    try:
        for module in backbone.modules():
            if isinstance(module, _NORMS):
                # In place of the method, which is what a call looks for first.
                module.forward = partial(_normalised, module, cells)  # type: ignore[method-assign]
                norms.append(module)
            elif isinstance(module, AreaAttention):
                module.visible = cells.at
                attentions.append(module)
            elif isinstance(module, _POOLS) or (
                isinstance(module, nn.Conv2d) and module.bias is not None
            ):
                hooks.append(module.register_forward_hook(partial(_emptied, cells)))
        # A compiled network does not hear of what was hooked up after it was compiled.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            del norm.forward
        for attention in attentions:
            attention.visible = None


class _Cells:
    """Where visible cells are, for maps of every size; computed once for each."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._visible: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

    def at(self, height: int, width: int) -> Tensor:
        """Return bool N H W, true where a cell is visible."""
        if (height, width) not in self._visible:
            self._visible[height, width] = self._at(height, width)
        return self._visible[height, width]

    def _at(self, height: int, width: int) -> Tensor:
        _, rows, columns = self._hidden.shape
        if height % rows or width % columns:
            raise UsageError(
                f"task.encoder=sparse: the backbone has a feature map of {height} x {width}, which "
                f"{rows} x {columns} blocks do not divide (squeeze-and-excitation has 1 x 1): use "
                "task.encoder=dense."
            )
        tall = self._hidden.repeat_interleave(height // rows, 1)
        return ~tall.repeat_interleave(width // columns, 2)

    def rows(self, height: int, width: int) -> Tensor:
        """Return the places of visible cells in N H W laid out flat. Waits for the device once."""
        if (height, width) not in self._rows:
            self._rows[height, width] = self.at(height, width).flatten().nonzero().squeeze(1)
        return self._rows[height, width]


def _normalised(norm: nn.Module, cells: _Cells, x: Tensor) -> Tensor:
    """N C H W -> the same shape: visible cells normalised by their own statistics, 0 elsewhere."""
    n, channels, height, width = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view where x is channels_last
    rows = cells.rows(height, width)
    seen = flat.index_select(0, rows).view(1, len(rows), 1, channels).permute(0, 3, 1, 2)
    done = type(norm).forward(norm, seen).permute(0, 2, 3, 1).reshape(len(rows), channels)
    out: Tensor = done.new_zeros(n * height * width, channels).index_copy(0, rows, done)
    return out.view(n, height, width, channels).permute(0, 3, 1, 2)


def _emptied(cells: _Cells, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
    emptied: Tensor = out * cells.at(out.shape[2], out.shape[3]).unsqueeze(1)
    return emptied
