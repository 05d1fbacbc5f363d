"""BatchNorm's statistics measured anew, of a compiled network, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundwork.precise_batchnorm import measure_statistics, measured_statistics


@pytest.mark.parametrize("compiled", [False, True])
def test_every_measurement_finds_the_pictures_statistics(compiled: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    if compiled:
        network.compile(backend="eager")
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    with torch.no_grad():
        for shift in (0.0, 3.0, 7.0):
            images = torch.rand(8, 3, 6, 6) + shift
            network(images)  # whatever graph there is by now
            with measured_statistics(network, lambda: network(images)):  # noqa: B023
                expected = network[0](images).mean((0, 2, 3))
                torch.testing.assert_close(norm.running_mean, expected)
            assert norm.running_mean.abs().max() == 0
    torch.compiler.reset()


def test_the_variance_is_that_of_all_pictures_together() -> None:
    """Of batches that each are of one kind, too (arXiv 2105.07576, section 3)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(2)).eval()
    pictures = torch.rand(10, 2, 5, 5) + torch.arange(10.0).view(10, 1, 1, 1)
    measure_statistics(network, lambda: [network(part) for part in torch.split(pictures, 4)])
    norm = network[0]
    assert isinstance(norm, nn.BatchNorm2d)
    variance, mean = torch.var_mean(pictures, (0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
