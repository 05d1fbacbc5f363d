"""The YOLOv12 backbone at scales n, s, m, l and x, and the blocks that its neck is made of too.

Written from the structure that the paper describes (Tian, Ye and Doermann, "YOLOv12:
Attention-Centric Real-Time Object Detectors", arXiv 2502.12524): convolution units, split stages,
and stages of area attention joined as a residual efficient layer aggregation network (R-ELAN).
C3, C4 and C5 are the outputs of layers 4, 6 and 8.

Names: a tensor is called `layers.<i>.` and then what the public exchange of YOLOv12 tensors calls
it (`conv`, `bn`, `cv1`, `cv2`, `m`, `attn.qkv`, ...). Where those names are short we keep them all
the same: the exchange is then a change of one prefix, `layers.` for `model.`, in the same order,
and no table of names can fall out of step with the code. What is not a key has a full name.

Input: RGB divided by 255 and nothing more (`mean` 0, `std` 1), as YOLO detectors take it.

Initialisation: convolutions are PyTorch's default, uniform in +-1 / sqrt(fan_in) (Kaiming uniform
with a = sqrt(5)), except those inside attention blocks, which are normal with standard deviation
0.02 (truncated at +-2, which is to say never). BatchNorm starts at weight 1 and bias 0, with
eps 1e-3 and momentum 0.03. The residual scale `gamma` of scales l and x starts at 0.01.

Differs from the paper: nothing known; attention goes through `scaled_dot_product_attention`, which
picks a fused kernel where there is one (the paper's code wants FlashAttention).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Backbone, Level, Pyramid

HEAD_WIDTH = 32  # channels of one attention head
LEVEL_LAYERS = (4, 6, 8)  # the layers whose outputs are C3, C4 and C5


@dataclass(frozen=True, slots=True)
class Scale:
    """What one letter of n, s, m, l, x means."""

    depth: float
    width: float
    max_channels: int
    mlp_ratio: float
    deep: bool
    """Inner blocks of split stages are CSP blocks, not bottlenecks."""
    residual: bool
    """Attention stages add their input to their scaled output."""

    def channels(self, nominal: int) -> int:
        """Turn a nominal width into channels: limited, scaled, rounded up to a multiple of 8."""
        return math.ceil(min(nominal, self.max_channels) * self.width / 8) * 8

    def repeats(self, nominal: int) -> int:
        """Turn a nominal number of inner blocks into the real one, at least 1."""
        return max(1, round(nominal * self.depth)) if nominal > 1 else nominal


SCALES = {
    "n": Scale(0.5, 0.25, 1024, mlp_ratio=2.0, deep=False, residual=False),
    "s": Scale(0.5, 0.5, 1024, mlp_ratio=2.0, deep=False, residual=False),
    "m": Scale(0.5, 1.0, 512, mlp_ratio=2.0, deep=True, residual=False),
    "l": Scale(1.0, 1.0, 512, mlp_ratio=1.2, deep=True, residual=True),
    "x": Scale(1.0, 1.5, 512, mlp_ratio=1.2, deep=True, residual=True),
}


class ConvUnit(nn.Module):
    """Convolution without bias, BatchNorm, and SiLU unless `linear`; keeps H, W / stride."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.03)
        self.activation = nn.Identity() if linear else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """N, channels_in, H, W -> N, channels_out, H / stride, W / stride."""
        out: Tensor = self.activation(self.bn(self.conv(x)))
        return out


class Bottleneck(nn.Module):
    """Two 3x3 units through `inner` channels, plus the input."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.cv1 = ConvUnit(channels, inner, 3)
        self.cv2 = ConvUnit(inner, channels, 3)
        self.drop: nn.Module = nn.Identity()  # finetune/regularize.py may put stochastic depth here

    def forward(self, x: Tensor) -> Tensor:
        """N, channels, H, W -> the same shape."""
        out: Tensor = x + self.drop(self.cv2(self.cv1(x)))
        return out


class CSPBlock(nn.Module):
    """Cross-stage partial block ("C3k"): half through two bottlenecks, half straight on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1 = ConvUnit(channels, half)
        self.cv2 = ConvUnit(channels, half)
        self.cv3 = ConvUnit(2 * half, channels)
        self.m = nn.Sequential(Bottleneck(half, half), Bottleneck(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """N, channels, H, W -> the same shape."""
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


class SplitStage(nn.Module):
    """Split stage ("C3k2"): a chain of inner blocks from one half, and everything joined.

    `ratio` times channels_out is the width of a half; `deep` makes the inner blocks CSP blocks.
    """

    def __init__(
        self, channels_in: int, channels_out: int, repeats: int, *, ratio: float, deep: bool
    ) -> None:
        super().__init__()
        hidden = int(channels_out * ratio)
        self.cv1 = ConvUnit(channels_in, 2 * hidden)
        self.cv2 = ConvUnit((2 + repeats) * hidden, channels_out)
        self.m = nn.ModuleList(
            CSPBlock(hidden) if deep else Bottleneck(hidden, hidden // 2) for _ in range(repeats)
        )

    def forward(self, x: Tensor) -> Tensor:
        """N, channels_in, H, W -> N, channels_out, H, W."""
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


def _in_float32_on_cpu(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call `work`; with bfloat16 on a CPU in float32, and give bfloat16 back.

    For what is slower there in bfloat16, in its backward (LOG.md): the fused attention kernel, 4 to
    6 times for 64 positions and 1.5 times for 400, and depthwise 7x7 convolutions, 3 to 5 times.
    """
    first = tensors[0]
    weights = next(work.parameters()).dtype if isinstance(work, nn.Module) else torch.float32
    if first.dtype != torch.bfloat16 or first.device.type != "cpu" or weights != torch.float32:
        return work(*tensors)
    with torch.autocast("cpu", enabled=False):
        return work(*(tensor.float() for tensor in tensors)).to(torch.bfloat16)


class AreaAttention(nn.Module):
    """Self-attention within each of `area` runs of positions, plus a 7x7 look around (paper 3.1).

    The positions, in row-major order, are cut into equal runs: 4 make horizontal bands, 1 is the
    whole map. The depthwise 7x7 unit of the values, over the whole map, says where things are.

    `visible`, where it is set, says for a map's height and width which positions may be looked at
    (bool N H W): masked modelling hides the others from queries everywhere.
    """

    visible: Callable[[int, int], Tensor] | None = None

    def __init__(self, channels: int, area: int) -> None:
        super().__init__()
        if channels % HEAD_WIDTH:
            raise ValueError(
                f"Attention needs a multiple of {HEAD_WIDTH} channels, not {channels}."
            )
        self.heads = channels // HEAD_WIDTH
        self.area = area
        self.qkv = ConvUnit(channels, 3 * channels, linear=True)
        self.proj = ConvUnit(channels, channels, linear=True)
        self.pe = ConvUnit(channels, channels, 7, groups=channels, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        """N, channels, H, W -> the same shape. Raises ValueError where area does not divide H W."""
        batch, channels, height, width = x.shape
        if height * width % self.area:
            raise ValueError(
                f"A feature map of {height} x {width} cannot be cut into {self.area} equal areas: "
                f"the picture's sides must be multiples of 32."
            )
        # Channels hold, head after head, that head's query, key and value.
        tokens = self.qkv(x).permute(0, 2, 3, 1)  # N H W 3C
        tokens = tokens.reshape(batch * self.area, -1, self.heads, 3 * HEAD_WIDTH).transpose(1, 2)
        query, key, value = tokens.split(HEAD_WIDTH, -1)  # (N area) heads (H W / area) 32
        mask = self._mask(batch, height, width)
        attend = partial(functional.scaled_dot_product_attention, attn_mask=mask)
        mixed = _in_float32_on_cpu(attend, query, key, value)  # its scale is 32 ** -0.5
        mixed, value = (
            part.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
            for part in (mixed, value)
        )
        out: Tensor = self.proj(mixed + _in_float32_on_cpu(self.pe, value))
        return out

    def _mask(self, batch: int, height: int, width: int) -> Tensor | None:
        """Return which keys an area's queries may see, bool (N area) 1 1 (H W / area), or None."""
        if self.visible is None:
            return None
        keys = self.visible(height, width).reshape(batch * self.area, 1, 1, -1)
        # A softmax over nothing is NaN: an area without a visible position looks at all of it.
        return keys | ~keys.any(-1, keepdim=True)


class AttentionBlock(nn.Module):
    """Area attention and a two-layer perceptron of 1x1 units, each added to its input."""

    def __init__(self, channels: int, area: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = math.floor(channels * mlp_ratio)
        self.attn = AreaAttention(channels, area)
        self.mlp = nn.Sequential(ConvUnit(channels, inner), ConvUnit(inner, channels, linear=True))
        self.drop: nn.Module = nn.Identity()  # finetune/regularize.py may put stochastic depth here
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """N, channels, H, W -> the same shape."""
        x = x + self.drop(self.attn(x))
        out: Tensor = x + self.drop(self.mlp(x))
        return out


class AggregationStage(nn.Module):
    """R-ELAN stage ("A2C2f", paper 3.2): a chain of inner blocks, every output joined.

    With `area`, an inner block is two attention blocks; without, as in the neck, a CSP block.
    `residual` adds the input to the output scaled by a learned vector that starts at 0.01.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        repeats: int,
        *,
        area: int | None = None,
        mlp_ratio: float = 2.0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if residual and channels_in != channels_out:
            raise ValueError(f"A residual needs equal widths, not {channels_in}, {channels_out}.")
        hidden = channels_out // 2
        self.cv1 = ConvUnit(channels_in, hidden)
        self.cv2 = ConvUnit((1 + repeats) * hidden, channels_out)
        self.gamma = nn.Parameter(torch.full((channels_out,), 0.01)) if residual else None
        self.m = nn.ModuleList(
            CSPBlock(hidden)
            if area is None
            else nn.Sequential(*(AttentionBlock(hidden, area, mlp_ratio) for _ in range(2)))
            for _ in range(repeats)
        )

    def forward(self, x: Tensor) -> Tensor:
        """N, channels_in, H, W -> N, channels_out, H, W."""
        parts = [self.cv1(x)]
        for block in self.m:
            parts.append(block(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out if self.gamma is None else x + self.gamma.view(-1, 1, 1) * out


class YOLO12(Backbone):
    """Layers 0 to 8 of YOLOv12 at one scale of n, s, m, l, x."""

    def __init__(self, letter: str, in_channels: int = 3) -> None:
        super().__init__()
        self.mean, self.std = (0.0,) * in_channels, (1.0,) * in_channels
        scale = SCALES[letter]
        self.name = f"yolo12{letter}"
        c64, c128, c256, c512, c1024 = map(scale.channels, (64, 128, 256, 512, 1024))

        def split(channels_in: int, channels_out: int) -> SplitStage:
            repeats = scale.repeats(2)
            return SplitStage(channels_in, channels_out, repeats, ratio=0.25, deep=scale.deep)

        def attend(channels: int, area: int) -> AggregationStage:
            return AggregationStage(
                channels,
                channels,
                scale.repeats(4),
                area=area,
                mlp_ratio=scale.mlp_ratio,
                residual=scale.residual,
            )

        self.layers = nn.ModuleList(
            (
                ConvUnit(in_channels, c64, 3, 2),
                ConvUnit(c64, c128, 3, 2),
                split(c128, c256),
                ConvUnit(c256, c256, 3, 2),
                split(c256, c512),
                ConvUnit(c512, c512, 3, 2),
                attend(c512, 4),
                ConvUnit(c512, c1024, 3, 2),
                attend(c1024, 1),
            )
        )
        self.levels = (Level(8, c512), Level(16, c512), Level(32, c1024))

    def forward(self, image: Tensor) -> Pyramid:
        """Return C3, C4 and C5 of pictures between 0 and 1 (N, C, H, W)."""
        levels = []
        x = image
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in LEVEL_LAYERS:
                levels.append(x)
        return Pyramid(*levels)

    def depths(self) -> dict[str, int]:
        """Return each parameter's layer, 0 to 8."""
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}
