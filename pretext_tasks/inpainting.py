"""Inpainting: predict the hidden part of a picture from the part that can be seen.

Masked image modelling for convolutional backbones. Blocks of the picture are replaced by a filling,
the backbone sees the filled picture, and a light decoder over C3, C4 and C5 predicts the pixels;
the loss is on the hidden ones alone. Sources: Context Encoders (Pathak et al. 2016, arXiv
1604.07379) for inpainting as a pretext task; SimMIM (Xie et al. 2021, arXiv 2111.09886) for filling
hidden blocks instead of dropping them, blocks of 32 px of which 60 % are hidden, and a light
decoder; MAE (He et al. 2021, arXiv 2111.06377, section 4.1) for targets normalised patch by patch.

What convolution does over hidden regions, with `encoder=dense`: nothing special. It sees the filled
hole: every kernel that touches one mixes filling with picture, the hole's borders are edges like
any other, and from layer to layer the picture's content grows into the hole.
BatchNorm's statistics are over filled regions too. At fine-tuning, and in a probe, pictures have no
holes: weights need no change, but running statistics were gathered over pictures that are mostly
filling and are off until BatchNorm has seen whole pictures in training mode. So do not freeze
BatchNorm's statistics, and do not run the backbone in eval mode, before some dozens of such steps.
With `encoder=sparse` (SparK, arXiv 2301.03580) the hole stays empty at every layer, statistics are
of visible cells alone (pretext_tasks/visible.py), and the decoder sees learned tokens in its place.

Nothing of a hidden pixel reaches the network: hidden bytes are set to 0 before anything is computed
of the network's input, so that the mean colour that a colour transform needs is the visible
pixels', and a blur spreads nothing but the black of the hole. Hidden pixels enter the target alone,
which gets the same colour transform, by the same mean colour.

The loss in figures: with targets normalised per patch and `l2`, 1 is what predicting every patch's
mean gives. A part of what is below 1 is the data's usual colour (a pink smear is red before it is
blue, everywhere); the rest has been inferred from what can be seen.

Differs from the papers:
- SimMIM's and MAE's encoders are transformers; MAE's never sees the hidden patches, ours sees the
  filling. SimMIM takes the pixels' own values and L1; the default here is MAE's target and L2.
- Mean and variance of a patch are over its pixels and all three channels (as MAE's), in colours
  from 0 to 1, whatever the backbone normalises with. `eps` is a deviation of one grey level, so
  that the noise of a flat patch is not blown up to a variance of 1 (MAE's 1e-6, after ImageNet's
  normalisation, is a deviation of 0.06 grey levels).
- The filling is one learned value for each channel (`token`), which starts as the mean colour of
  ImageNet, or the mean of the picture's visible pixels (`mean`).
- Only a light crop (at least half of the area) and flips; no colour unless `colour` says so.
- The decoder: 1x1 convolutions of C3, C4, C5 to one width, brought to stride 8 (nearest) and
  summed, one 3x3 convolution, and a 1x1 convolution to 8 x 8 x 3 values for each cell, laid out as
  pixels. GroupNorm, so that it has no statistics of the batch. With 16 or 32 in `scales`, C4 and C5
  also predict by themselves 8 x 8 x 3 values for each of their cells: the target pooled by 2 or 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from groundwork import colour
from groundwork.backbones.contract import (
    IMAGENET_MEAN,
    STRIDES,
    Backbone,
    Level,
    Pyramid,
    for_channels,
)
from groundwork.colour import Colour
from groundwork.config import Section
from groundwork.data.decode import Picture
from groundwork.errors import UsageError
from groundwork.modes import evaluating
from groundwork.necks.yolo12 import Features
from pretext_tasks.contract import StepOutput, Views
from pretext_tasks.crops import AreaRange, RatioRange, check_side, draw_crop, draw_turn
from pretext_tasks.through_neck import Letter, ThroughNeck
from pretext_tasks.visible import check_backbone, visible_only

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

_STRIDE = 8  # of the decoder's cells, each of which predicts 8 x 8 pixels
_GROUP = 8  # channels that are normalised together


class InpaintingConfig(Section):
    """Values with their sources; see the module for those that are ours."""

    block: int = Field(default=32, multiple_of=8, ge=8)  # SimMIM, table 1: side in pixels
    ratio: float = Field(default=0.6, gt=0, lt=1)  # SimMIM, table 1: share of hidden blocks
    patch: int | None = Field(default=16, ge=2)  # MAE: side in pixels; None: not normalised
    eps: Positive = 1.5e-5  # added to a patch's variance: (1 / 255) squared
    loss: Literal["l2", "l1"] = "l2"  # MAE; SimMIM: l1
    scales: tuple[Literal[8, 16, 32], ...] = (8,)  # strides that predict; 8 must be one
    filling: Literal["token", "mean"] = "token"  # of holes, for a dense encoder
    # dense: the backbone sees filled holes. sparse: SparK's, it sees visible cells alone.
    encoder: Literal["dense", "sparse"] = "dense"
    # A YOLOv12 neck of this width is trained too, and predicts: n, s, m, l or x.
    neck: Letter | None = None
    width: int = Field(default=128, multiple_of=_GROUP, ge=_GROUP)  # of the decoder, channels
    crop_scale: AreaRange = (0.5, 1.0)  # part of the picture's area
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # width to height, log-uniform
    flip: Probability = 0.5
    rotate: Probability = 0.0  # 0.75 makes the four directions equally likely
    colour: Colour | None = None

    @model_validator(mode="after")
    def _possible(self) -> InpaintingConfig:
        if self.patch is not None and self.block % self.patch:
            raise ValueError(f"patch={self.patch} does not divide block={self.block}")
        if self.encoder == "sparse" and self.block % STRIDES[-1]:
            raise ValueError(
                f"encoder=sparse needs whole cells of 32 px in a block, not {self.block}"
            )
        if 8 not in self.scales or len(set(self.scales)) != len(self.scales):
            raise ValueError("scales must hold 8, and 16 or 32 once each where they are wanted")
        return self


@dataclass(frozen=True)
class InpaintingViews:
    """Cuts one crop and draws which of its blocks are hidden."""

    config: InpaintingConfig
    image_size: int
    hidden_blocks: int

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return image (uint8 H W C), hidden (bool H/block W/block) and, if asked for, colour."""
        config = self.config
        box = draw_crop(
            picture.width, picture.height, config.crop_scale, config.crop_ratio, generator
        )
        (image,) = picture.cut([box], self.image_size)
        image = draw_turn(config.flip, config.rotate, generator).of_view(image)
        side = self.image_size // config.block
        hidden = np.zeros(side * side, np.bool_)
        hidden[generator.permutation(side * side)[: self.hidden_blocks]] = True
        entries: dict[str, np.ndarray[Any, Any]] = {
            "image": np.ascontiguousarray(image),
            "hidden": hidden.reshape(side, side),
        }
        if config.colour is not None:
            entries["colour"] = colour.draw(config.colour, generator)
        return entries


class Target(NamedTuple):
    """What is to be predicted, N C H W, and what was taken out of it (N C H W, or N 1 H W)."""

    value: Tensor
    mean: Tensor
    deviation: Tensor


class Decoder(nn.Module):
    """Predicts pixels from the pyramid: one map for each stride in `scales`, finest first."""

    def __init__(
        self, levels: tuple[Level, Level, Level], width: int, scales: set[int], channels: int
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in levels)
        self.block = nn.Sequential(
            nn.GroupNorm(width // _GROUP, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(width // _GROUP, width),
            nn.SiLU(),
        )
        self.output = nn.Conv2d(width, _STRIDE**2 * channels, 1)
        # A head that no loss reaches would hold up DDP: there are only those that are asked for.
        self.deep = nn.ModuleDict(
            {
                str(scale): nn.Sequential(
                    nn.GroupNorm(width // _GROUP, width),
                    nn.SiLU(),
                    nn.Conv2d(width, _STRIDE**2 * channels, 1),
                )
                for scale in sorted(scales - {_STRIDE})
            }
        )

    def forward(self, pyramid: Pyramid | Features) -> dict[int, Tensor]:
        """Return, by stride, N C H W, and H/2 W/2 and H/4 W/4 for strides 16 and 32."""
        c3, c4, c5 = (lateral(level) for lateral, level in zip(self.lateral, pyramid, strict=True))
        size = c3.shape[2:]
        merged = c3 + functional.interpolate(c4, size) + functional.interpolate(c5, size)
        predictions = {_STRIDE: _to_pixels(self.output(self.block(merged)))}
        own = {"16": c4, "32": c5}
        for scale, head in self.deep.items():
            predictions[int(scale)] = _to_pixels(head(own[scale]))
        return predictions


class Inpainting(ThroughNeck):
    """The backbone on the filled picture, and a light decoder."""

    Config = InpaintingConfig

    def __init__(self, backbone: Backbone, config: InpaintingConfig) -> None:
        super().__init__(backbone, config.neck)
        self.config = config
        self.decoder = Decoder(self.levels, config.width, set(config.scales), backbone.in_channels)
        if config.encoder == "sparse":
            check_backbone(backbone)
            # SparK's mask embeddings: what a decoder sees of a hidden cell, at each level.
            self.tokens = nn.ParameterList(
                nn.init.trunc_normal_(torch.empty(level.channels), std=0.02)
                for level in backbone.levels
            )
        elif config.filling == "token":
            middle = for_channels(IMAGENET_MEAN, backbone.in_channels)
            colours = zip(middle, backbone.mean, backbone.std, strict=True)
            self.token = nn.Parameter(torch.tensor([(c - m) / s for c, m, s in colours]))

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of masked pictures; `image_size` is a multiple of 32 and of a block."""
        check_side(image_size, "inpainting needs")
        if image_size % config.block:
            raise UsageError(
                f"image_size={image_size} is not a multiple of task.block={config.block}: "
                f"blocks must fill the picture."
            )
        blocks = (image_size // config.block) ** 2
        hidden = round(config.ratio * blocks)
        if not 0 < hidden < blocks:
            raise UsageError(
                f"task.ratio={config.ratio} of {blocks} blocks (image_size={image_size}, "
                f"task.block={config.block}) leaves nothing to see or nothing to predict."
            )
        return InpaintingViews(config, image_size, hidden)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the loss on hidden pixels, averaged over the scales.

        Metrics: hidden_error, the mean absolute error of hidden pixels in grey levels (0 to 255)
        once each patch has its own mean and deviation back.
        """
        hidden = spread(batch["hidden"], self.config.block)
        predictions = self.decoder(self._features(self._filled(batch, hidden), batch["hidden"]))
        with torch.no_grad():
            target = self._target(batch, hidden)
        losses = [
            hidden_loss(
                prediction,
                _shrunk(target.value, scale // _STRIDE),
                spread(batch["hidden"], self.config.block * _STRIDE // scale),
                self.config.loss,
            )
            for scale, prediction in predictions.items()
        ]
        with torch.no_grad():
            error = (predictions[_STRIDE].float() - target.value).abs() * target.deviation
            metrics = {"hidden_error": 255 * _mean_over(error, hidden)}
        return StepOutput(torch.stack(losses).mean(), metrics)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the network sees, the same with the prediction in its holes, and the truth.

        The prediction is of normalised patches: each patch is given the mean and deviation of the
        truth back, so that brightness and contrast of a hole are not the network's work.
        """
        hidden = spread(batch["hidden"], self.config.block)
        filled = self._filled(batch, hidden)
        with evaluating(self):
            prediction = self.decoder(self._features(filled, batch["hidden"]))[_STRIDE].float()
        target = self._target(batch, hidden)
        truth = target.value * target.deviation + target.mean
        restored = torch.where(hidden, prediction * target.deviation + target.mean, truth)
        return {
            "masked": colour.denormalise(filled, *self._normalisation),
            "reconstruction": colour.denormalise(restored, *self._plain),
            "truth": colour.denormalise(truth, *self._plain),
        }

    def _features(self, seen: Tensor, hidden: Tensor) -> Pyramid | Features:
        """Run backbone and neck on filled pictures; `hidden` is bool N S S, block by block."""
        if self.config.encoder == "dense":
            return self.through(self.backbone(seen))
        with visible_only(self.backbone, hidden):
            pyramid = self.backbone(seen)
        filled = []
        for level, token in zip(pyramid, self.tokens, strict=True):
            cells = spread(hidden, level.shape[2] // hidden.shape[1])
            filled.append(torch.where(cells, token.view(1, -1, 1, 1), level))
        return self.through(Pyramid(*filled))

    def _filled(self, batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Return what the network sees, float32 N C H W; computed without a hidden pixel."""
        # Hidden bytes are gone from here on.
        image = batch["image"].masked_fill(hidden.squeeze(1).unsqueeze(3), 0)
        seen = self._coloured(image, batch, hidden, *self._normalisation)
        if self.config.encoder == "sparse":
            return seen.masked_fill(hidden, 0)
        if self.config.filling == "token":
            return torch.where(hidden, self.token.view(1, -1, 1, 1), seen)
        visible = (~hidden).to(seen.dtype)
        mean = (seen * visible).sum(dim=(2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
        return torch.where(hidden, mean, seen)

    def _target(self, batch: dict[str, Tensor], hidden: Tensor) -> Target:
        image = self._coloured(batch["image"], batch, hidden, *self._plain)
        return normalise_patches(image, self.config.patch, self.config.eps)

    def _coloured(
        self,
        image: Tensor,
        batch: dict[str, Tensor],
        hidden: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> Tensor:
        if self.config.colour is None:
            return colour.normalise(image, mean, std)
        return colour.apply(image, batch["colour"], mean, std, visible=~hidden.squeeze(1))

    @property
    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.backbone.mean, self.backbone.std

    @property
    def _plain(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation that leave colours from 0 to 1."""
        channels = self.backbone.in_channels
        return (0.0,) * channels, (1.0,) * channels


def normalise_patches(image: Tensor, patch: int | None, eps: float) -> Target:
    """Take its own mean and deviation out of every patch of N C H W, over pixels and channels.

    The deviation is sqrt(variance + eps), with the unbiased variance, as MAE's. Without a patch
    the target is the image itself.
    """
    if patch is None:
        return Target(image, torch.zeros_like(image[:, :1]), torch.ones_like(image[:, :1]))
    n, channels, height, width = image.shape
    patches = image.reshape(n, channels, height // patch, patch, width // patch, patch)
    variance, mean = torch.var_mean(patches, dim=(1, 3, 5))  # N H/patch W/patch
    mean, deviation = spread(mean, patch), spread((variance + eps).sqrt(), patch)
    return Target((image - mean) / deviation, mean, deviation)


def hidden_loss(prediction: Tensor, target: Tensor, hidden: Tensor, kind: str) -> Tensor:
    """Return the mean error over the hidden pixels (bool N 1 H W) of N C H W, in float32."""
    difference = prediction.float() - target
    return _mean_over(difference.abs() if kind == "l1" else difference.square(), hidden)


def spread(cells: Tensor, side: int) -> Tensor:
    """Give every cell of N H W its side x side pixels: N 1 H*side W*side."""
    return cells.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)


def _mean_over(value: Tensor, hidden: Tensor) -> Tensor:
    """Average N C H W where `hidden` is true. A product, not a choice: nothing waits for sizes."""
    return (value * hidden).sum() / (value.shape[1] * hidden.sum())


def _shrunk(image: Tensor, factor: int) -> Tensor:
    return image if factor == 1 else functional.avg_pool2d(image, factor)


def _to_pixels(prediction: Tensor) -> Tensor:
    return functional.pixel_shuffle(prediction, _STRIDE)
