"""A moving average of the weights of everything a task keeps, by timm's ModelEmaV3.

Averaged weights are often better than the last ones (arXiv 1803.05407; decay with warmup as in
timm). Parameters and floating-point buffers (BatchNorm's statistics) are averaged, whole-number
buffers copied. Where the average is enabled, it is what the run's product is written from.
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from groundwork import settings
from groundwork.errors import CheckpointError


class Ema:
    """The average of a task's product, `{"backbone": ..., "neck": ...}`, updated after each step.

    Build it when the modules are on their device, and before DDP or compile wrap them.
    """

    def __init__(self, config: settings.Ema, product: Mapping[str, nn.Module]) -> None:
        self._live = nn.ModuleDict(product)
        self._average = ModelEmaV3(self._live, decay=config.decay, use_warmup=config.warmup)
        self._average.module.requires_grad_(False)

    def update(self, step: int) -> None:
        """Move the average after the step that counted as number `step`, from 1; 1 copies."""
        self._average.update(self._live, step=step)

    def product(self) -> dict[str, nn.Module]:
        """Return the averaged modules, in eval mode and without gradients."""
        return dict(self._average.module.items())

    def state(self) -> dict[str, Tensor]:
        """Return the average as tensors by name; not copies."""
        return dict(self._average.module.state_dict())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises CheckpointError where names or shapes differ."""
        own = self.state()
        strange = sorted(own.keys() ^ tensors.keys())
        if strange:
            raise CheckpointError(
                f"The checkpoint's moving average is of another model: {len(strange)} of its "
                f"tensors do not fit, such as {strange[0]}."
            )
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise CheckpointError(
                    f"The checkpoint's moving average is of another model: {name} is "
                    f"{tuple(tensors[name].shape)} there and {tuple(tensor.shape)} here."
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
