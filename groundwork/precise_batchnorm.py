"""BatchNorm's statistics measured anew on pictures at hand (precise BN, arXiv 2105.07576, 3).

Running statistics lag behind the weights, and those of another input (views, masked pictures, other
data) do not fit the pictures that a network is to see next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def measured_statistics(network: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Give every BatchNorm the statistics of what it sees while `run` runs; old ones come back.

    Each batch is normalised by itself; mean and variance are those of all pictures together. `run`
    is to call the network in eval mode: hooks measure, since SyncBatchNorm in train mode would wait
    for ranks that do not measure.
    """
    norms = _norms(network)
    old = [{name: one.clone() for name, one in norm.named_buffers()} for norm in norms]
    try:
        measure_statistics(network, run)
        yield
    finally:
        with torch.no_grad():
            for norm, buffers in zip(norms, old, strict=True):
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)


def measure_statistics(network: nn.Module, run: Callable[[], object]) -> None:
    """Give every BatchNorm the statistics of what it sees while `run` runs, for good."""
    norms = _norms(network)
    if not norms:
        return
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    counts = [torch.zeros((), dtype=torch.int64) for _ in norms]

    def listen(norm: nn.Module, inputs: tuple[Tensor, ...], total: Tensor, count: Tensor) -> None:
        values = inputs[0].detach().float()
        axes = [axis for axis in range(values.ndim) if axis != 1]
        variance, mean = torch.var_mean(values, dim=axes, correction=0)
        _put(norm, mean, variance)
        mean, variance = mean.double().cpu(), variance.double().cpu()
        total += len(values) * torch.stack([mean, variance + mean**2])
        count += len(values)

    hooks = [
        norm.register_forward_pre_hook(partial(listen, total=total, count=count))
        for norm, total, count in zip(norms, sums, counts, strict=True)
    ]
    try:
        # A compiled network does not hear of hooks that came after it was compiled.
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for norm, total, count in zip(norms, sums, counts, strict=True):
        if count:
            mean, square = total / count
            _put(norm, mean, (square - mean**2).clamp(min=0))


def _norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


@torch.no_grad()
def _put(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)
