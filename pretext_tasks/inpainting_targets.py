"""What inpainting is to predict of a hidden cell: its pixels, or features.

`Pixels`: 8 x 8 x 3 of a cell, normalised patch by patch (MAE, arXiv 2111.06377, section 4.1).
`Latents`: what a slow copy of the network makes of the whole picture, as data2vec predicts (Baevski
et al. 2022, arXiv 2202.03555): not colours, but what the network has come to see.

Histograms of oriented gradients (MaskFeat, arXiv 2112.09133) were a third, and no better (LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from groundwork.backbones.contract import Level
from groundwork.principal import principal_colours

STRIDE = 8  # of the finest cells that are predicted, in pixels


class Target(Protocol):
    """What is predicted of a batch's pictures, and how a prediction is laid out and measured.

    `maps` are the targets, by the side of a cell in pixels.
    """

    maps: dict[int, Tensor]

    @staticmethod
    def cell(channels: int, level: Level) -> int:
        """Return how many values are predicted for a cell of a level, of a picture's channels."""

    @staticmethod
    def laid_out(prediction: Tensor) -> Tensor:
        """Return N cell() H W as a map that can be compared with one of `maps`."""

    def metrics(self, prediction: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return how good a prediction at stride 8 is where `hidden` (bool N 1 H W) is true."""

    def shown(self, prediction: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return pictures, N 3 H W from 0 to 1, of a prediction at stride 8 and of the truth."""


class Patches(NamedTuple):
    """Patches without mean and deviation, N C H W, and these (N C H W, or N 1 H W)."""

    value: Tensor
    mean: Tensor
    deviation: Tensor


class Pixels:
    """Pixels without the mean and deviation of the patch that they are in."""

    def __init__(self, image: Tensor, scales: Iterable[int], patch: int | None, eps: float) -> None:
        """Take N C H W, colours from 0 to 1; above stride 8 pixels are pooled by scale / 8."""
        self._patches = normalise_patches(image, patch, eps)
        value = self._patches.value
        self.maps = {
            scale: value if scale == STRIDE else functional.avg_pool2d(value, scale // STRIDE)
            for scale in scales
        }

    @staticmethod
    def cell(channels: int, level: Level) -> int:
        """Return 8 x 8 values for each channel."""
        return STRIDE**2 * channels

    @staticmethod
    def laid_out(prediction: Tensor) -> Tensor:
        """Return N C 8H 8W."""
        return functional.pixel_shuffle(prediction, STRIDE)

    def metrics(self, prediction: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return hidden_error: the mean absolute error in grey levels (0 to 255)."""
        error = (prediction - self._patches.value).abs() * self._patches.deviation
        return {"hidden_error": 255 * mean_over(error, hidden)}

    def shown(self, prediction: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the picture with the prediction in its holes, and the picture.

        Each patch is given the mean and deviation of the truth back, so that brightness and
        contrast of a hole are not the network's work.
        """
        value, mean, deviation = self._patches
        truth = value * deviation + mean
        restored = torch.where(hidden, prediction * deviation + mean, truth)
        return {"reconstruction": restored, "truth": truth}


class Latents:
    """Features of the whole picture, each channel without its mean and deviation over the batch.

    So a network whose features are the same everywhere has nothing to predict, and learns nothing
    by it; what the slow copy tells apart is what counts.
    """

    def __init__(self, image: Tensor, features: Mapping[int, Tensor]) -> None:
        """Take N C H W, colours from 0 to 1, and features of it by stride."""
        self._image = image
        self.maps = {
            scale: functional.batch_norm(level.float(), None, None, training=True)
            for scale, level in features.items()
        }

    @staticmethod
    def cell(channels: int, level: Level) -> int:
        """Return a value for each channel of the level."""
        return level.channels

    @staticmethod
    def laid_out(prediction: Tensor) -> Tensor:
        """Return the same: a cell's values are its channels."""
        return prediction

    def metrics(self, prediction: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return hidden_cosine: the mean cosine of features and what was predicted."""
        cosine = functional.cosine_similarity(prediction, self.maps[STRIDE], dim=1)
        asked = hidden[:, 0, ::STRIDE, ::STRIDE]
        return {"hidden_cosine": (cosine * asked).sum() / asked.sum()}

    def shown(self, prediction: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the features' main directions as colours, predicted in the holes, and the truth's.

        Directions and colours are of both together, so that the same colour is the same feature.
        """
        wanted = self.maps[STRIDE]
        restored = torch.where(hidden[:, :, ::STRIDE, ::STRIDE], prediction, wanted)
        colours = principal_colours(torch.cat((restored, wanted))) / 255
        first, second = functional.interpolate(colours, scale_factor=STRIDE).chunk(2)
        return {"reconstruction": first, "features": second, "truth": self._image}


def normalise_patches(image: Tensor, patch: int | None, eps: float) -> Patches:
    """Take its own mean and deviation out of every patch of N C H W, over pixels and channels.

    The deviation is sqrt(variance + eps), with the unbiased variance, as MAE's. Without a patch
    the target is the image itself.
    """
    if patch is None:
        return Patches(image, torch.zeros_like(image[:, :1]), torch.ones_like(image[:, :1]))
    n, channels, height, width = image.shape
    patches = image.reshape(n, channels, height // patch, patch, width // patch, patch)
    variance, mean = torch.var_mean(patches, dim=(1, 3, 5))  # N H/patch W/patch
    mean, deviation = spread(mean, patch), spread((variance + eps).sqrt(), patch)
    return Patches((image - mean) / deviation, mean, deviation)


def spread(cells: Tensor, side: int) -> Tensor:
    """Give every cell of N H W its side x side pixels: N 1 H*side W*side."""
    return cells.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)


def mean_over(value: Tensor, hidden: Tensor) -> Tensor:
    """Average N C H W where `hidden` is true. A product, not a choice: nothing waits for sizes."""
    return (value * hidden).sum() / (value.shape[1] * hidden.sum())
