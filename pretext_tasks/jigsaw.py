"""Jigsaw: say which of a fixed set of permutations has shuffled a picture's tiles.

Noroozi and Favaro 2016, "Unsupervised Learning of Visual Representations by Solving Jigsaw
Puzzles", arXiv 1603.09246. A square crop is cut into grid x grid cells, a tile is cut out of each
cell, the tiles are shuffled by one of a few hundred permutations, and the network names the
permutation. Every tile goes through the backbone by itself (the paper's context-free network), so
that the backbone has to say what a tile shows, and only the head compares tiles.

The setting is the tile: `image_size` is its side. The canvas follows from it: a cell is
tile * (1 + gap) pixels wide, the canvas grid cells wide (64, 75 and 225 pixels in the paper).

Against solving the puzzle by something other than what the tiles show, as in the paper:
- Edges that continue: a tile lies anywhere in its cell, so that neighbours are 0 to twice the gap
  apart.
- Brightness that continues: each tile has its own mean and deviation taken out, per channel. It is
  then given those of ImageNet, as one more picture, and normalised as the backbone wants it.
- Chromatic aberration, which tells how far a tile was from the optical axis: some pictures are
  made grey, and each colour channel of each tile is shifted by up to `channel_shift`
  pixels. Colour of each tile by itself (`colour`) can be added.

Permutations are chosen once, greedily: each next one maximises the smallest Hamming distance to
those chosen before it, and then the sum of the distances. They depend on grid, number and seed
alone, and are kept in the state_dict, so that a class always means the same permutation.

BatchNorm sees all tiles of a batch at once: statistics are over N * grid * grid tiles, among them
those of the same puzzle. They are the same for all places of a puzzle, so no place can be read from
them. A backbone that saw tiles, each with the same mean and deviation, later sees whole pictures
with their own: running statistics are near theirs, not equal, and fine-tuning has to move them.

Differs from the paper:
- The representation of a tile is C5 pooled to 2 x 2 cells (`cells`), flattened; the paper's AlexNet
  flattens all of pool5. Averaged over all cells, a tile no longer says on which of its sides
  something lies, and in pictures without an up nothing is left to solve the puzzle by.
- A backbone of a detector, not AlexNet with a first stride of 2; no dropout in the head, because a
  step draws nothing on the device.
- The smallest distance leads the choice of permutations. By the paper's mean distance alone
  (algorithm 1) all candidates tie as soon as the chosen ones hold every tile in every place equally
  often, and near twins get in: of 100 at 3x3 the nearest differ in 3 places, here in 6, with the
  same mean of 8.08.
- The crop may be flipped (`flip`) and turned by quarters (`rotate`, 0 by default).
- A tile's deviation is taken as at least one grey level, so that a blank tile stays blank.
- A channel never leaves its tile's cell: near the cell's edge the shift is cut short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from groundwork import colour
from groundwork.backbones.contract import IMAGENET_MEAN, IMAGENET_STD, Backbone, for_channels
from groundwork.colour import Colour
from groundwork.config import Section
from groundwork.data.decode import Picture
from groundwork.errors import UsageError
from groundwork.modes import evaluating
from pretext_tasks.contract import PretextTask, StepOutput, Views
from pretext_tasks.crops import draw_turn

Probability = Annotated[float, Field(ge=0, le=1)]

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
_GREY_LEVEL = 1 / 255
_MOST_PERMUTATIONS = 10_000  # choosing them takes about ten seconds


class JigsawConfig(Section):
    """The paper's values (arXiv 1603.09246) where nothing else is said."""

    grid: Literal[2, 3] = 3
    # None is 100 at 3x3 and all 24 at 2x2; the paper compares sets of up to 1,000.
    permutations: int | None = Field(default=None, ge=2, le=_MOST_PERMUTATIONS)
    permutation_seed: int = Field(default=0, ge=0)
    gap: float = Field(default=11 / 64, ge=0, le=1)  # of the tile's side: 64 of 75 pixels
    crop_side: tuple[Probability, Probability] = (225 / 256, 225 / 256)  # of the shorter side
    flip: Probability = 0.5  # ours
    rotate: Probability = 0.0  # ours; 0.75 makes the four directions equally likely
    grayscale: Probability = 0.3
    channel_shift: int = Field(default=2, ge=0)  # pixels
    normalise_tiles: bool = True
    colour: Colour | None = None  # ours: drawn for each tile
    cells: int = Field(default=2, ge=1)  # ours: sides of the grid that C5 of a tile is pooled to
    tile_width: int = Field(default=512, ge=1)  # figure 3: fc6
    hidden_width: int = Field(default=4096, ge=1)  # figure 3: fc7

    @model_validator(mode="after")
    def _possible(self) -> JigsawConfig:
        most = math.factorial(self.grid**2)
        if self.permutations is not None and self.permutations > most:
            raise ValueError(
                f"permutations={self.permutations}, but {self.grid**2} tiles have only {most}"
            )
        if not 0 < self.crop_side[0] <= self.crop_side[1]:
            raise ValueError("crop_side must be (least, most) with 0 < least <= most <= 1")
        return self


def choose_permutations(grid: int, number: int | None, seed: int) -> npt.NDArray[np.uint8]:
    """Choose `number` permutations of grid * grid tiles: uint8, number x tiles; see the module.

    None is 100, or all there are. Ties go to the candidate that comes first in an order made from
    `seed` by raw Philox words, which are the same in every version of numpy.
    """
    candidates = _all_permutations(grid * grid)
    number = min(100, len(candidates)) if number is None else number
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(candidates)), kind="stable")
    candidates = candidates[order]
    columns = np.ascontiguousarray(candidates.T)
    chosen = np.zeros(number, np.int64)  # the first is the first in the drawn order
    # Agreement is the number of tiles less the Hamming distance. The largest agreement with a
    # chosen one weighs more than any sum of agreements can.
    largest = np.zeros(len(candidates), np.uint8)
    total = np.zeros(len(candidates), np.int32)
    weight = np.int32(number * grid * grid + 1)
    for i in range(1, number):
        agreement = np.zeros(len(candidates), np.uint8)
        for column, tile in zip(columns, candidates[chosen[i - 1]], strict=True):
            agreement += column == tile
        np.maximum(largest, agreement, out=largest)
        total += agreement
        # A chosen one agrees with itself in every tile, as no other does: it cannot win again.
        chosen[i] = np.argmin(largest * weight + total)
    return candidates[chosen]


def _all_permutations(n: int) -> npt.NDArray[np.uint8]:
    """List all permutations of 0 .. n-1 in lexicographic order, n! x n."""
    table = np.zeros((1, 1), np.uint8)
    for size in range(2, n + 1):
        first = np.repeat(np.arange(size, dtype=np.uint8), len(table))[:, None]
        rest = np.tile(table, (size, 1))
        table = np.hstack([first, rest + (rest >= first)]).astype(np.uint8)
    return table


@dataclass(frozen=True, eq=False)
class JigsawViews:
    """Cuts a canvas into tiles and shuffles them; a cell is `tile + slack` pixels wide."""

    config: JigsawConfig
    tile: int
    slack: int
    permutations: npt.NDArray[np.uint8]

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return tiles (uint8 grid*grid H W C, shuffled), target, grey and, if asked for, colour.

        Place i of the puzzle shows the tile that belongs into place permutations[target][i].
        """
        config = self.config
        tiles = self._tiles(self._canvas(picture, generator), generator)
        target = int(generator.integers(len(self.permutations)))
        entries: dict[str, np.ndarray[Any, Any]] = {
            "tiles": tiles[self.permutations[target]],
            "target": np.array(target, np.int64),
            "grey": np.array(generator.random() < config.grayscale),
        }
        if config.colour is not None:
            drawn = [colour.draw(config.colour, generator) for _ in tiles]
            entries["colour"] = np.stack(drawn)
        return entries

    def _canvas(self, picture: Picture, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
        config = self.config
        side = min(picture.width, picture.height) * generator.uniform(*config.crop_side)
        left = (picture.width - side) * generator.random()
        top = (picture.height - side) * generator.random()
        canvas_side = config.grid * (self.tile + self.slack)
        (canvas,) = picture.cut([(left, top, left + side, top + side)], canvas_side)
        return draw_turn(config.flip, config.rotate, generator).of_view(canvas)

    def _tiles(
        self, canvas: npt.NDArray[np.uint8], generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Cut one tile from each cell, row by row, its channels shifted against each other."""
        grid, tile, shift = self.config.grid, self.tile, self.config.channel_shift
        place = generator.integers(0, self.slack + 1, (grid * grid, 1, 2))
        shifts = generator.integers(-shift, shift + 1, (grid * grid, canvas.shape[2], 2))
        corners = np.clip(place + shifts, 0, self.slack)  # tiles, channels, (y, x)
        tiles = np.empty((grid * grid, tile, tile, canvas.shape[2]), np.uint8)
        for i, channels in enumerate(corners):
            row, column = (index * (tile + self.slack) for index in divmod(i, grid))
            for channel, (y, x) in enumerate(channels):
                top, left = row + y, column + x
                tiles[i, :, :, channel] = canvas[top : top + tile, left : left + tile, channel]
        return tiles


class Jigsaw(PretextTask):
    """The backbone on every tile, a small layer for each tile, a classifier over all of them."""

    Config = JigsawConfig

    permutations: Tensor  # uint8, number x tiles

    def __init__(self, backbone: Backbone, config: JigsawConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        chosen = choose_permutations(config.grid, config.permutations, config.permutation_seed)
        self.register_buffer("permutations", torch.from_numpy(chosen))
        self.tile_layer = nn.Sequential(
            nn.Linear(backbone.levels[2].channels * config.cells**2, config.tile_width), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.Linear(config.grid**2 * config.tile_width, config.hidden_width),
            nn.ReLU(),
            nn.Linear(config.hidden_width, len(chosen)),
        )

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of puzzles; `image_size` is the side of a tile."""
        if image_size < 32 or image_size % 32:
            raise UsageError(
                f"image_size={image_size}: the side of a jigsaw tile must be a multiple of 32 "
                f"(the canvas follows from it)."
            )
        slack = round(config.gap * image_size)
        chosen = choose_permutations(config.grid, config.permutations, config.permutation_seed)
        return JigsawViews(config, image_size, slack, chosen)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the cross entropy of the permutation's class.

        Metrics: accuracy, and the share of tiles that the named permutation puts in their place.
        """
        logits = self._logits(batch)
        target = batch["target"]
        loss = functional.cross_entropy(logits.float(), target)
        with torch.no_grad():
            named = logits.argmax(dim=1)
            placed = self.permutations[named] == self.permutations[target]
            metrics = {
                "accuracy": (named == target).float().mean(),
                "tiles_placed": placed.float().mean(),
            }
        return StepOutput(loss, metrics)

    def product(self) -> dict[str, nn.Module]:
        """Return the backbone."""
        return {"backbone": self.backbone}

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the puzzle, the puzzle solved as the network says, and the truth.

        Tiles are as they were cut, before they are made grey and normalised.
        """
        with evaluating(self):
            named = self._logits(batch).argmax(dim=1).cpu()
        tiles, permutations = batch["tiles"].cpu(), self.permutations.cpu()
        as_shown = torch.arange(self.config.grid**2).expand(len(tiles), -1)
        target = permutations[batch["target"].cpu()].long()
        return {
            "puzzle": put_together(tiles, as_shown),
            "solved": put_together(tiles, permutations[named].long()),
            "truth": put_together(tiles, target),
        }

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        tiles = batch["tiles"]  # N T H W C
        n = len(tiles)
        image = self._seen(tiles.flatten(0, 1), batch)  # N*T C H W
        feature = functional.adaptive_avg_pool2d(self.backbone(image).c5, self.config.cells)
        logits: Tensor = self.classifier(self.tile_layer(feature.flatten(1)).view(n, -1))
        return logits

    def _seen(self, tiles: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Turn uint8 N*T H W C into what the network sees: float32 N*T C H W."""
        channels = self.backbone.in_channels
        # Mean 0 and deviation 1 leave colours between 0 and 1.
        plain = (0.0,) * channels, (1.0,) * channels
        if self.config.colour is None:
            image = colour.normalise(tiles, *plain)
        else:
            image = colour.apply(tiles, batch["colour"].flatten(0, 1), *plain)
        # Scalars all the way: a tensor of constants would make the device wait for its copy.
        weights = _LUMINANCE if channels == 3 else [1 / channels] * channels
        luminance = sum(weight * image[:, c : c + 1] for c, weight in enumerate(weights))
        grey = batch["grey"].repeat_interleave(batch["tiles"].shape[1]).view(-1, 1, 1, 1)
        image = torch.where(grey, luminance, image)
        if self.config.normalise_tiles:
            deviation, middle = (for_channels(x, channels) for x in (IMAGENET_STD, IMAGENET_MEAN))
            image = _affine(normalise_each(image), deviation, middle)
        mean, std = self.backbone.mean, self.backbone.std
        return _affine(
            image, [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        )


def normalise_each(image: Tensor) -> Tensor:
    """Take its own mean and standard deviation out of every channel of N C H W (colours 0 to 1)."""
    deviation, mean = torch.std_mean(image, dim=(2, 3), keepdim=True, correction=0)
    return (image - mean) / deviation.clamp(min=_GREY_LEVEL)


def _affine(image: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    """Scale and shift each channel of N C H W; the memory format stays."""
    result = torch.empty_like(image)
    for c in range(image.shape[1]):
        result[:, c] = image[:, c] * scale[c] + shift[c]
    return result


def put_together(tiles: Tensor, places: Tensor, gap: int = 2) -> Tensor:
    """Lay tile i of N T H W C into place places[:, i], rows first, white between: N 3 H' W'."""
    n, count, height, width, channels = tiles.shape
    grid = math.isqrt(count)
    ordered = torch.empty_like(tiles)
    ordered[torch.arange(n)[:, None], places] = tiles
    framed = functional.pad(ordered.permute(0, 1, 4, 2, 3), (0, gap, 0, gap), value=255)
    height, width = height + gap, width + gap
    sheet = framed.reshape(n, grid, grid, channels, height, width).permute(0, 1, 4, 2, 5, 3)
    whole = sheet.reshape(n, grid * height, grid * width, channels)
    return colour.shown(whole[:, : -gap or None, : -gap or None])
