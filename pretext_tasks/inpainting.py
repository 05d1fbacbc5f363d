"""Inpainting: predict the hidden part of a picture from the part that can be seen.

Masked image modelling for convolutional backbones. Blocks of the picture are replaced by a filling,
the backbone sees the filled picture, and a light decoder over C3, C4 and C5 predicts the pixels, or
with `target=features` what a slow copy of the network sees there in the whole picture
(pretext_tasks/inpainting_targets.py); the loss is on what is hidden alone. Sources: Context
Encoders (Pathak et al. 2016, arXiv 1604.07379) for inpainting as a pretext task; SimMIM (Xie et al.
2021, arXiv 2111.09886) for filling hidden blocks instead of dropping them, blocks of 32 px of which
60 % are hidden, and a light decoder; MAE (He et al. 2021, arXiv 2111.06377, section 4.1) for
targets normalised patch by patch; data2vec (Baevski et al. 2022, arXiv 2202.03555) for features of
a moving average of the network itself.

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
blue, everywhere); the rest has been inferred from what can be seen. Of features, 1 is what
predicting every channel's mean gives.

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
- The decoders (pretext_tasks/inpainting_decoder.py) end in as many values for each cell of stride 8
  as it has pixels and channels, laid out as pixels. With 16 or 32 in `scales` maps of these strides
  predict as many values for each of their cells: pixels pooled by 2 or 4. Of `features` as many
  values as the level that is predicted has channels.
- data2vec's teacher is an average of the last layers' features, normalised over time; ours is the
  level (with a neck the neck's) of the stride that predicts, normalised by channel over a process's
  part of the batch, and moves as BYOL's target does.
- Blocks are hidden anywhere alike. To draw half of them by how strong their edges are, so that
  small objects on plain ground are asked for more often, was no better (LOG.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from groundwork import colour
from groundwork.backbones.contract import (
    IMAGENET_MEAN,
    STRIDES,
    Backbone,
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
from pretext_tasks.inpainting_decoder import DECODERS, GROUP
from pretext_tasks.inpainting_targets import (
    STRIDE,
    Latents,
    Pixels,
    Target,
    mean_over,
    spread,
)
from pretext_tasks.slow_copy import follow
from pretext_tasks.through_neck import Letter, ThroughNeck
from pretext_tasks.visible import check_backbone, visible_only

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class InpaintingConfig(Section):
    """Values with their sources; see the module for those that are ours."""

    block: int = Field(default=32, multiple_of=8, ge=8)  # SimMIM, table 1: side in pixels
    ratio: float = Field(default=0.6, gt=0, lt=1)  # SimMIM, table 1: share of hidden blocks
    target: Literal["pixels", "features"] = "pixels"  # features: data2vec
    patch: int | None = Field(default=16, ge=2)  # MAE, of pixels: side; None: not normalised
    eps: Positive = 1.5e-5  # added to a patch's variance: (1 / 255) squared
    momentum: Probability = 0.996  # of features' slow copy: BYOL's tau_base, and its schedule
    loss: Literal["l2", "l1"] = "l2"  # MAE; SimMIM: l1
    scales: tuple[Literal[8, 16, 32], ...] = (8,)  # strides that predict; 8 must be one
    filling: Literal["token", "mean"] = "token"  # of holes, for a dense encoder
    # dense: the backbone sees filled holes. sparse: SparK's, it sees visible cells alone.
    encoder: Literal["dense", "sparse"] = "dense"
    # A YOLOv12 neck of this width is trained too, and predicts: n, s, m, l or x.
    neck: Letter | None = None
    # sum: of all levels at once; hierarchical: SparK's, level after level.
    decoder: Literal["sum", "hierarchical"] = "sum"
    width: int = Field(default=128, multiple_of=GROUP, ge=GROUP)  # of the decoder, channels
    crop_scale: AreaRange = (0.5, 1.0)  # part of the picture's area
    crop_ratio: RatioRange = (3 / 4, 4 / 3)  # width to height, log-uniform
    flip: Probability = 0.5
    rotate: Probability = 0.0  # 0.75 makes the four directions equally likely
    colour: Colour | None = None

    @model_validator(mode="after")
    def _possible(self) -> InpaintingConfig:
        if self.target != "pixels" and self.block % max(self.scales):
            raise ValueError(
                f"target={self.target} needs whole cells of every stride in a block: "
                f"block={self.block} is not a multiple of {max(self.scales)} (scales)"
            )
        if self.target == "pixels" and self.patch is not None and self.block % self.patch:
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


class Inpainting(ThroughNeck):
    """The backbone on the filled picture, and a light decoder."""

    Config = InpaintingConfig
    target_begun: Tensor

    def __init__(self, backbone: Backbone, config: InpaintingConfig) -> None:
        super().__init__(backbone, config.neck)
        self.config = config
        strides = dict(zip(STRIDES, self.levels, strict=True))
        self._kind = _KINDS[config.target]
        self.decoder = DECODERS[config.decoder](
            self.levels,
            config.width,
            {s: self._kind.cell(backbone.in_channels, strides[s]) for s in config.scales},
        )
        if config.target == "features":
            self.target_backbone = copy.deepcopy(backbone).requires_grad_(False)
            self.target_neck = copy.deepcopy(self.neck)
            if self.target_neck is not None:
                self.target_neck.requires_grad_(False)
            # A neck gets its first weights after this (--init; of several tasks the first one's),
            # so that its copy begins with the first step; 1 from then on, in every checkpoint.
            self.register_buffer("target_begun", torch.zeros((), dtype=torch.uint8))
            self._begun = False
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
        """Return the loss on what is hidden, averaged over the scales.

        Metrics, of hidden cells: hidden_error, the mean absolute error of pixels in grey levels (0
        to 255) once each patch has its own mean and deviation back; of `target=features`
        hidden_cosine, between features.
        """
        hidden = spread(batch["hidden"], self.config.block)
        predictions = self._predictions(batch, self._filled(batch, hidden))
        with torch.no_grad():
            target = self._target(batch, hidden)
        losses = [
            hidden_loss(
                prediction,
                target.maps[scale],
                spread(batch["hidden"], prediction.shape[2] // batch["hidden"].shape[1]),
                self.config.loss,
            )
            for scale, prediction in predictions.items()
        ]
        with torch.no_grad():
            metrics = target.metrics(predictions[STRIDE].float(), hidden)
        return StepOutput(torch.stack(losses).mean(), metrics)

    def after_step(self, progress: float) -> None:
        """Move the slow copy towards the network (BYOL, section 3.3)."""
        if self.config.target == "features":
            momentum = self.config.momentum
            if not self._begun:
                # Not as soon as the copy is made: the main process alone draws pictures before the
                # first step, and DDP hands its buffers to all.
                self.target_begun.fill_(1)
                self._begun = True
            follow([self.target_backbone], [self.backbone], momentum, progress)
            if self.target_neck is not None and self.neck is not None:
                follow([self.target_neck], [self.neck], momentum, progress)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the network sees, the prediction in its holes, and the truth.

        Of normalised patches, see pretext_tasks/inpainting_targets.py: their brightness and
        contrast are the truth's. Of features their three main directions are colours.
        """
        hidden = spread(batch["hidden"], self.config.block)
        filled = self._filled(batch, hidden)
        with evaluating(self):
            prediction = self._predictions(batch, filled)[STRIDE].float()
            shown = self._target(batch, hidden).shown(prediction, hidden)
        return {
            "masked": colour.denormalise(filled, *self._normalisation),
            **{name: colour.denormalise(image, *self._plain) for name, image in shown.items()},
        }

    def _predictions(self, batch: dict[str, Tensor], filled: Tensor) -> dict[int, Tensor]:
        """Return maps by stride, laid out as the target is."""
        predictions = self.decoder(self._features(filled, batch["hidden"]))
        return {scale: self._kind.laid_out(cells) for scale, cells in predictions.items()}

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
        config, image = self.config, self._coloured(batch["image"], batch, hidden, *self._plain)
        if config.target == "features":
            whole = self._coloured(batch["image"], batch, hidden, *self._normalisation)
            levels: Pyramid | Features = self.target_backbone(whole)
            if self.target_neck is not None and self.neck is not None:
                if not self._begun and not self.target_begun:
                    self.target_neck.load_state_dict(self.neck.state_dict())
                levels = self.target_neck(levels)
            strides = dict(zip(STRIDES, levels, strict=True))
            return Latents(image, {scale: strides[scale] for scale in config.scales})
        return Pixels(image, config.scales, config.patch, config.eps)

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


_KINDS: dict[str, type[Pixels] | type[Latents]] = {"pixels": Pixels, "features": Latents}


def hidden_loss(prediction: Tensor, target: Tensor, hidden: Tensor, kind: str) -> Tensor:
    """Return the mean error over the hidden pixels (bool N 1 H W) of N C H W, in float32."""
    difference = prediction.float() - target
    return mean_over(difference.abs() if kind == "l1" else difference.square(), hidden)
