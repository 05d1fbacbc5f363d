"""Colour, blur, solarisation and normalisation of a whole batch, on the device.

What: a worker draws one image's colour distortion as a few numbers (`draw`); the device applies
the numbers of a batch to its uint8 images at once (`apply`). Why so: it takes the colour off the
data workers, where torchvision's chain costs several times the decoding, and nothing on the
device needs a random key.

Brightness, contrast, saturation, hue and grayscale are linear in the pixel x and in the image's
mean colour m, in whatever order they come, so that the chain of one image is

    x' = A x + B m        A, B: 3 x 3, known in the worker; m: known on the device

and costs one batched matrix product, into which the normalisation is folded. Then the values are
clamped, once, to what 0..1 becomes; then come blur and solarisation.

Sources: the distortions and their order are SimCLR's (arXiv 2002.05709, appendix A) and BYOL's
(arXiv 2006.07733, appendix B, whose blur has a kernel of a tenth of the side and sigma 0.1..2);
their definitions are torchvision's ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize.

Differs from torchvision's chain:
- It clamps (and rounds) after every operation; here once, at the end.
- The mean grey that contrast turns about is that of the values before clamping.
- Hue is a rotation about the grey axis of RGB, which keeps the sum of the channels; torchvision
  shifts the hue in HSV, which keeps the largest and the smallest. Angle and direction are the
  same, and at thirds of a turn both just exchange the channels. (The rotation in YIQ, which keeps
  the luma, spreads blue too far: by 11 % at SimCLR's strength, where this one stays within 8 %.)
- The Gaussian ends at three sigma (rounded up), where 0.3 % of its weight is left.
A test bounds the difference: mean within 0.01, spread (standard deviation) within 10 %.

Pictures of more than three channels have RGB in the first three. Every other channel (and each of
one or two) is a picture in grey of its own: brightness and contrast change it, saturation and hue
leave it, as they leave greys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from groundwork.config import Section

# One image's numbers: A beside B (3 x 6), the blur's sigma (0: none), solarise (0 or 1).
PARAMETERS = 20

_SIGMA, _SOLARISE = 18, 19
_GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as Pillow's and torchvision's
# A rotation about the grey axis (1, 1, 1), by Rodrigues: ALONG + cos * ACROSS + sin * TURN.
_ALONG = np.full((3, 3), 1 / 3)
_ACROSS = np.eye(3) - _ALONG
_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
_AT_ONCE = 8  # images on the CPU: few enough to stay in its caches (0.21 ms each, 0.27 at 32)

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]


class Colour(Section):
    """What is drawn: probabilities and strengths. The defaults are BYOL's (table 6), view 1.

    The blur's probability is 1 there; here 0.5, which is SimCLR's.
    """

    probability: Probability = 0.8  # that brightness, contrast, saturation and hue are changed
    brightness: Strength = 0.4  # the factor is uniform in 1 - strength .. 1 + strength
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # uniform in -hue .. hue, in turns
    grayscale: Probability = 0.2
    blur: Probability = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, uniform
    solarise: Probability = 0.0  # values from 0.5 up are inverted

    @model_validator(mode="after")
    def _sigma_is_a_range(self) -> Colour:
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError("blur_sigma must be two positive numbers, the smaller first")
        return self


def draw(config: Colour, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw one image's distortion: PARAMETERS float32 values, for `apply`."""
    chain = np.eye(3, 6)  # A beside B
    if generator.random() < config.probability:
        # As ColorJitter does: all four, in an order of their own for every image.
        for operation in generator.permutation(4):
            chain = _jitter(operation, config, chain, generator)
    if generator.random() < config.grayscale:
        chain = np.broadcast_to(_GREY @ chain, (3, 6))
    sigma = generator.uniform(*config.blur_sigma) if generator.random() < config.blur else 0.0
    solarise = generator.random() < config.solarise
    parameters = np.empty(PARAMETERS, np.float32)
    parameters[:_SIGMA] = chain.ravel()
    parameters[_SIGMA], parameters[_SOLARISE] = sigma, solarise
    return parameters


def matrix_of(parameters: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the 3 x 3 matrix by which a distortion that `draw` gave multiplies RGB (A above)."""
    return parameters[:_SIGMA].reshape(3, 6)[:, :3]


def apply(
    images: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    visible: Tensor | None = None,
) -> Tensor:
    """Colour and normalise a batch by the numbers that `draw` gave.

    `images` are uint8, N H W C, C as in `mean`; `parameters` float32, N PARAMETERS; `visible` bool,
    N H W: where it is False a pixel does not count for its image's mean colour (an image without a
    visible pixel has a black mean). Returns float32, N C H W, contiguous on the CPU, channels_last
    on CUDA. Nothing there waits for the device: all images are blurred, those that did not draw it
    with a kernel that is 1 in its centre. On the CPU only those that drew it are.

    Raises ValueError for another type or shape.
    """
    _check(images, len(mean))
    number, height, width, channels = images.shape
    if parameters.shape != (number, PARAMETERS):
        raise ValueError(f"{number} images need {number} x {PARAMETERS} parameters.")
    # Half precision would lose the last bits of a byte, and all of a fine blur.
    with torch.autocast(images.device.type, enabled=False):
        result = images.new_empty(number, channels, height, width, dtype=torch.float32)
        if images.is_cuda:
            _colour(images, parameters, mean, std, visible, result)
            result = _blur(result, parameters[:, _SIGMA], _largest_radius(height, width))
            _solarise(result, parameters[:, _SOLARISE], mean, std)
            return result.contiguous(memory_format=torch.channels_last)
        for start in range(0, number, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            seen = None if visible is None else visible[part]
            _colour(images[part], parameters[part], mean, std, seen, result[part])
            _blur_drawn(result[part], parameters[part, _SIGMA])
            chosen = parameters[part, _SOLARISE].nonzero().flatten()
            for index in (chosen + start).tolist():
                one = slice(index, index + 1)
                _solarise(result[one], parameters[one, _SOLARISE], mean, std)
        return result


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bring uint8 N H W C to float32 N C H W, (x / 255 - mean) / std, laid out as by `apply`."""
    _check(images, len(mean))
    planes = _planes(images)
    for channel in range(len(mean)):
        planes[:, channel] *= 1 / (255 * std[channel])
        planes[:, channel] -= mean[channel] / std[channel]
    return planes.contiguous(memory_format=torch.channels_last) if planes.is_cuda else planes


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bring normalised N C H W back to uint8 N 3 H W on the CPU, for a person to look at."""
    scale, shift = (torch.tensor(x).view(1, -1, 1, 1) for x in (std, mean))
    levels = ((images.detach().float().cpu() * scale + shift) * 255).round().clamp(0, 255).byte()
    return shown(levels.permute(0, 2, 3, 1))


def shown(images: Tensor) -> Tensor:
    """Bring uint8 N H W C to N 3 H W on the CPU, for a person: of C the first three, or grey."""
    planes = images.cpu().permute(0, 3, 1, 2)
    return planes[:, :3] if planes.shape[1] >= 3 else planes[:, :1].repeat(1, 3, 1, 1)


def _jitter(
    operation: int,
    config: Colour,
    chain: npt.NDArray[np.float64],
    generator: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Put one operation behind the chain x -> A x + B m, whose mean colour is (A + B) m."""
    if operation == 0:
        return chain * _factor(config.brightness, generator)
    if operation == 1:
        factor = _factor(config.contrast, generator)
        mean_grey = _GREY @ (chain[:, :3] + chain[:, 3:])
        chain = chain * factor
        chain[:, 3:] += (1 - factor) * mean_grey
        return chain
    if operation == 2:
        factor = _factor(config.saturation, generator)
        return chain * factor + (1 - factor) * (_GREY @ chain)
    return hue_rotation(generator.uniform(-config.hue, config.hue)) @ chain


def _factor(strength: float, generator: np.random.Generator) -> float:
    return generator.uniform(max(0.0, 1 - strength), 1 + strength)


def hue_rotation(turns: float) -> npt.NDArray[np.float64]:
    """Return the 3 x 3 matrix that turns the hue of RGB; above 0 red moves to yellow, as in HSV."""
    angle = math.tau * turns
    rotation: npt.NDArray[np.float64] = _ALONG + math.cos(angle) * _ACROSS + math.sin(angle) * _TURN
    return rotation


def _check(images: Tensor, channels: int) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != channels:
        shape = " ".join(str(side) for side in images.shape)
        raise ValueError(f"Images must be uint8, N H W {channels}, not {images.dtype}, {shape}.")


def _planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _colour(
    images: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    visible: Tensor | None,
    result: Tensor,
) -> None:
    """Write the coloured, clamped and normalised images into `result`, N C H W."""
    number, channels = len(images), len(mean)
    flat = _planes(images).view(number, channels, -1)  # N C P, 0..255
    by_x, by_mean = _chains(parameters[:, :_SIGMA].reshape(number, 3, 6), channels)
    matrix = by_x.clone()
    offset = torch.bmm(by_mean, _mean_colour(flat, visible))
    for channel in range(channels):  # scalars: a tensor would have to be copied to the device
        matrix[:, channel] /= 255 * std[channel]
        offset[:, channel] /= 255 * std[channel]
        offset[:, channel] -= mean[channel] / std[channel]
    torch.baddbmm(offset, matrix, flat, out=result.view(number, channels, -1))
    for channel in range(channels):
        result[:, channel].clamp_(*_range(mean[channel], std[channel]))


def _chains(chain: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return A and B of so many channels, each N C C; further channels are greys of their own.

    What a chain does to a grey is the sum of its rows, which are alike but for rounding.
    """
    if channels == 3:
        return chain[:, :, :3], chain[:, :, 3:]
    found = []
    for part in (chain[:, :, :3], chain[:, :, 3:]):
        grey = part.sum(dim=2).mean(dim=1)  # N
        whole = torch.diag_embed(grey[:, None].expand(-1, channels))
        if channels > 3:
            whole[:, :3, :3] = part
        found.append(whole)
    return found[0], found[1]


def _mean_colour(flat: Tensor, visible: Tensor | None) -> Tensor:
    """Return N C 1 from N C P."""
    if visible is None:
        return flat.mean(dim=2, keepdim=True)
    weight = visible.reshape(len(flat), -1, 1).to(flat.dtype)  # N P 1
    return torch.bmm(flat, weight) / weight.sum(dim=1, keepdim=True).clamp_(min=1)


def _range(mean: float, std: float) -> tuple[float, float]:
    """Return what black and white are after normalisation."""
    return -mean / std, (1 - mean) / std


def _largest_radius(height: int, width: int) -> int:
    """Return the radius of a kernel of a tenth of the side, which is odd (23 for 224)."""
    return min(height, width) // 20


def _blur_drawn(images: Tensor, sigma: Tensor) -> None:
    """Blur, in place, the images whose sigma is above 0 (CPU: looks at the values)."""
    chosen = sigma.nonzero().flatten()
    if len(chosen):
        radius = min(_largest_radius(*images.shape[2:]), math.ceil(3 * float(sigma.max())))
        images[chosen] = _blur(images[chosen], sigma[chosen], radius)


def _blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Convolve every image (N C H W) with its own Gaussian, first along rows, then columns."""
    number, channels, height, width = images.shape
    if radius == 0:
        return images
    distance = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    spread = sigma[:, None].clamp(min=1e-3)  # 0 gives a kernel that is 1 in its centre
    weight = torch.exp(-0.5 * (distance / spread) ** 2)
    weight = weight * (distance.abs() <= torch.ceil(3 * spread))
    weight = weight / weight.sum(dim=1, keepdim=True)
    kernel = weight.repeat_interleave(channels, dim=0)[:, None, None]  # 3N 1 1 K
    # Every plane is a channel with a kernel of its own.
    planes = images.reshape(1, number * channels, height, width)
    planes = functional.pad(planes, (radius, radius, radius, radius), mode="reflect")
    planes = functional.conv2d(planes, kernel, groups=number * channels)
    planes = functional.conv2d(planes, kernel.transpose(2, 3), groups=number * channels)
    return planes.view(number, channels, height, width)


def _solarise(images: Tensor, drawn: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Invert, in place, the values from 0.5 up of the images that drew it: 0.5 - |x - 0.5|.

    x is normalised here, so that the middle lies between what black and white have become.
    """
    for channel in range(len(mean)):
        middle = sum(_range(mean[channel], std[channel])) / 2
        plane = images[:, channel]
        inverted = plane.sub(middle).abs_().neg_().add_(middle)
        plane.copy_(torch.where(drawn[:, None, None] > 0, inverted, plane))
