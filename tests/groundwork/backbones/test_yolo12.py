"""YOLOv12: parameters block by block, the function of each block, and the public names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones import YOLO12_NAMES, build_backbone
from groundwork.backbones.contract import Level
from groundwork.backbones.yolo12 import (
    SCALES,
    YOLO12,
    AggregationStage,
    AreaAttention,
    AttentionBlock,
    Bottleneck,
    ConvUnit,
    CSPBlock,
    SplitStage,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "keys_yolo12n.json"

# Parameters of layers 0 to 8, and of the neck's layers 11, 14, 15, 17, 18, 20.
LAYERS = {
    "n": (464, 4672, 6640, 36992, 26080, 147712, 180864, 295424, 689408),
    "s": (928, 18560, 26080, 147712, 103360, 590336, 689408, 1180672, 2689536),
    "m": (1856, 73984, 111872, 590336, 444928, 2360320, 2689536, 2360320, 2689536),
    "l": (1856, 73984, 173824, 590336, 691712, 2360320, 4272944, 2360320, 4272944),
    "x": (2784, 166272, 389760, 1327872, 1553664, 5309952, 9512128, 5309952, 9512128),
}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lively(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and weights that do something; compute in double precision."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low in ((part.weight.data, 0.5), (part.running_var, 0.5)):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            for tensor in (part.bias.data, part.running_mean):
                assert tensor is not None
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        if isinstance(part, nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
    return module.eval().double()


def _unit(unit: ConvUnit, x: Tensor) -> Tensor:
    """Work out a convolution unit by the formula of BatchNorm and of SiLU."""
    padding = unit.conv.kernel_size[0] // 2
    x = functional.conv2d(
        x, unit.conv.weight, None, unit.conv.stride, padding, groups=unit.conv.groups
    )
    mean, variance = unit.bn.running_mean, unit.bn.running_var
    assert mean is not None and variance is not None
    scale = unit.bn.weight / (variance + 1e-3).sqrt()
    x = (x - mean[:, None, None]) * scale[:, None, None] + unit.bn.bias[:, None, None]
    return x if isinstance(unit.activation, nn.Identity) else x * torch.sigmoid(x)


@pytest.fixture(scope="module")
def nano() -> YOLO12:
    torch.manual_seed(0)
    backbone = build_backbone("yolo12n")
    assert isinstance(backbone, YOLO12)
    return backbone


@pytest.mark.parametrize("letter", SCALES)
def test_every_layer_has_the_parameters_of_the_table(letter: str) -> None:
    with torch.device("meta"):  # shapes without memory
        backbone = YOLO12(letter)
    assert tuple(_parameters(layer) for layer in backbone.layers) == LAYERS[letter]


@pytest.mark.parametrize(
    ("letter", "channels"),
    [
        ("n", (128, 128, 256)),
        ("s", (256, 256, 512)),
        ("m", (512, 512, 512)),
        ("l", (512, 512, 512)),
        ("x", (768, 768, 768)),
    ],
)
def test_levels_say_what_forward_gives(letter: str, channels: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        backbone = YOLO12(letter)
    outputs = backbone.to_empty(device="cpu").eval()(torch.zeros(2, 3, 64, 96))
    assert backbone.levels == tuple(map(Level, (8, 16, 32), channels))
    assert [tuple(output.shape) for output in outputs] == [
        (2, c, 64 // stride, 96 // stride) for stride, c in backbone.levels
    ]


def public_names() -> dict[str, list[int]]:
    """List the names and shapes of yolo12n, in order: what keys_yolo12n.json holds."""
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in YOLO12("n").state_dict().items()}


def test_the_names_are_the_golden_ones_in_their_order() -> None:
    golden: dict[str, list[int]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(public_names().items()) == list(golden.items())


def test_every_name_is_a_public_name_behind_another_prefix() -> None:
    """What the public exchange calls the parts of each kind of layer, spelled out."""
    unit = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    unit += ["bn.num_batches_tracked"]

    def units(*prefixes: str) -> set[str]:
        return {f"{prefix}{leaf}" for prefix in prefixes for leaf in unit}

    attention = ("attn.qkv.", "attn.proj.", "attn.pe.", "mlp.0.", "mlp.1.")
    csp = ("cv1.", "cv2.", "cv3.", "m.0.cv1.", "m.0.cv2.", "m.1.cv1.", "m.1.cv2.")
    with torch.device("meta"):
        keys = YOLO12("l").state_dict().keys()
    wanted = {key for i in (0, 1, 3, 5, 7) for key in units(f"layers.{i}.")}
    for i in (2, 4):
        wanted |= units(f"layers.{i}.cv1.", f"layers.{i}.cv2.")
        wanted |= units(*(f"layers.{i}.m.{j}.{part}" for j in range(2) for part in csp))
    for i in (6, 8):
        wanted |= units(f"layers.{i}.cv1.", f"layers.{i}.cv2.") | {f"layers.{i}.gamma"}
        inner = (f"layers.{i}.m.{j}.{k}." for j in range(4) for k in range(2))
        wanted |= units(*(f"{block}{part}" for block in inner for part in attention))
    assert set(keys) == wanted


def test_area_attention_is_softmax_attention_inside_each_band_and_head() -> None:
    torch.manual_seed(2)
    attention = AreaAttention(64, area=4)
    _lively(attention)
    x = torch.randn(2, 64, 4, 6, dtype=torch.float64)
    qkv = _unit(attention.qkv, x).flatten(2)  # N 192 24
    mixed = torch.zeros(2, 64, 24, dtype=torch.float64)
    values = torch.zeros(2, 64, 24, dtype=torch.float64)
    for head in range(2):
        query, key, value = (
            qkv[:, 96 * head + start : 96 * head + start + 32] for start in (0, 32, 64)
        )
        values[:, 32 * head : 32 * head + 32] = value
        for start in range(0, 24, 6):  # four bands of six positions: one row each
            band = slice(start, start + 6)
            logits = torch.einsum("ncq,nck->nqk", query[..., band], key[..., band])
            weights = (logits / math.sqrt(32)).softmax(-1)
            mixed[:, 32 * head : 32 * head + 32, band] = torch.einsum(
                "nqk,nck->ncq", weights, value[..., band]
            )
    around = _unit(attention.pe, values.view(2, 64, 4, 6))
    expected = _unit(attention.proj, mixed.view(2, 64, 4, 6) + around)
    torch.testing.assert_close(attention(x), expected)
    image = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attention(image), expected)


def test_a_change_in_one_band_reaches_other_bands_only_through_the_7x7_unit() -> None:
    torch.manual_seed(3)
    attention = AreaAttention(32, area=4)
    _lively(attention)
    attention.pe.conv.weight.data.zero_()
    x = torch.randn(1, 32, 8, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2:4] += 1.0
    difference = (attention(x) - attention(changed)).abs().amax((0, 1, 3))
    assert (difference > 1e-4).tolist() == [False, False, True, True, False, False, False, False]


def test_an_area_that_does_not_divide_the_map_is_a_clear_error(nano: YOLO12) -> None:
    with pytest.raises(
        ValueError, match=r"7 x 7 cannot be cut into 4 equal areas.*multiples of 32"
    ):
        nano(torch.zeros(1, 3, 112, 112))


def test_blocks_do_what_their_description_says() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64)

    bottleneck = Bottleneck(32, 16)
    _lively(bottleneck)
    expected = x + _unit(bottleneck.cv2, _unit(bottleneck.cv1, x))
    torch.testing.assert_close(bottleneck(x), expected)

    csp = CSPBlock(32)
    _lively(csp)
    expected = _unit(csp.cv3, torch.cat((csp.m(_unit(csp.cv1, x)), _unit(csp.cv2, x)), 1))
    torch.testing.assert_close(csp(x), expected)

    split = SplitStage(32, 64, 2, ratio=0.25, deep=False)
    _lively(split)
    first, second = _unit(split.cv1, x).chunk(2, 1)
    third = split.m[0](second)
    fourth = split.m[1](third)
    expected = _unit(split.cv2, torch.cat((first, second, third, fourth), 1))
    torch.testing.assert_close(split(x), expected)

    block = AttentionBlock(32, 1, 1.2)
    _lively(block)
    widen, narrow = block.mlp
    assert isinstance(widen, ConvUnit) and isinstance(narrow, ConvUnit)
    assert widen.conv.out_channels == 38  # floor(38.4)
    middle = x + block.attn(x)
    expected = middle + _unit(narrow, _unit(widen, middle))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_an_aggregation_stage_joins_every_output_of_its_chain(residual: bool) -> None:
    torch.manual_seed(5)
    stage = AggregationStage(64, 64, 2, area=1, residual=residual)
    _lively(stage)
    x = torch.randn(1, 64, 4, 4, dtype=torch.float64)
    first = _unit(stage.cv1, x)
    second = stage.m[0](first)
    third = stage.m[1](second)
    joined = _unit(stage.cv2, torch.cat((first, second, third), 1))
    expected = x + 0.01 * joined if residual else joined
    torch.testing.assert_close(stage(x), expected)


def test_a_residual_between_unequal_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="equal widths, not 32, 64"):
        AggregationStage(32, 64, 1, area=1, residual=True)


def test_weights_start_as_the_docstring_says() -> None:
    torch.manual_seed(6)
    backbone = YOLO12("n")
    inside = {
        id(part)
        for block in backbone.modules()
        if isinstance(block, AttentionBlock)
        for part in block.modules()
    }
    seen = [0, 0]
    for part in backbone.modules():
        if isinstance(part, nn.Conv2d):
            attention = id(part) in inside
            fan_in = part.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)
            if part.weight.numel() > 4000:
                std = 0.02 if attention else bound / math.sqrt(3)
                assert part.weight.std().item() == pytest.approx(std, rel=0.06)
                assert abs(part.weight.mean().item()) < 0.1 * std
                seen[attention] += 1
            if attention:  # a normal has tails that no uniform of the same spread has
                assert part.weight.abs().max() < 0.02 * 6
            else:
                assert part.weight.abs().max() <= bound
        if isinstance(part, nn.BatchNorm2d):
            assert (part.eps, part.momentum) == (1e-3, 0.03)
            assert part.weight.eq(1).all() and part.bias.eq(0).all()
    assert seen[0] > 10 and seen[1] > 20
    qkv = torch.cat([p.flatten() for n, p in backbone.named_parameters() if "qkv.conv" in n])
    assert (qkv.abs() > 3 * 0.02).float().mean().item() == pytest.approx(0.0027, rel=0.3)


def test_gamma_starts_at_a_hundredth_at_l_and_x_and_is_nowhere_else() -> None:
    for letter in SCALES:
        with torch.device("meta"):
            names = [name for name, _ in YOLO12(letter).named_parameters() if "gamma" in name]
        residual = letter in "lx"
        assert names == (["layers.6.gamma", "layers.8.gamma"] if residual else [])
    stage = AggregationStage(64, 64, 1, area=1, residual=True)
    assert stage.gamma is not None
    assert stage.gamma.tolist() == pytest.approx([0.01] * 64)


def test_input_is_only_scaled_to_one(nano: YOLO12) -> None:
    assert nano.mean == (0, 0, 0)
    assert nano.std == (1, 1, 1)


@pytest.mark.parametrize("train", [True, False])
def test_channels_last_gives_the_same_and_stays_so(nano: YOLO12, train: bool) -> None:
    backbone = YOLO12("n")
    backbone.load_state_dict(nano.state_dict())
    backbone.train(train)
    nano.train(train)
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = nano(image)
    backbone = backbone.to(memory_format=torch.channels_last)
    outputs = backbone(image.contiguous(memory_format=torch.channels_last))
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-3)


def test_autocast_to_bfloat16_runs_and_is_near(nano: YOLO12) -> None:
    nano.eval()
    image = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    expected = nano(image)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = nano(image)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype is torch.bfloat16
        spread = wanted.std().item()
        assert (output.float() - wanted).abs().max().item() < 0.2 * max(spread, 1e-3)


def test_what_is_slow_in_bfloat16_on_a_cpu_is_done_in_float32() -> None:
    attention = AreaAttention(64, 1)
    seen: list[torch.dtype] = []
    attention.pe.register_forward_hook(
        lambda _, given, out: seen.extend((given[0].dtype, out.dtype))
    )
    picture = torch.rand(2, 64, 8, 8)
    expected = attention(picture)
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(picture)
    assert seen == [torch.float32] * 4 and output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    # Weights that are bfloat16 themselves stay so, under autocast or not.
    attention.bfloat16()
    assert attention(picture.bfloat16()).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(picture).dtype is torch.bfloat16
    assert seen[4:] == [torch.bfloat16] * 4


def test_every_parameter_has_a_gradient(nano: YOLO12) -> None:
    nano.train()
    nano.zero_grad(set_to_none=True)
    sum(output.square().mean() for output in nano(torch.rand(2, 3, 64, 64))).backward()
    assert [name for name, one in nano.named_parameters() if one.grad is None] == []


def test_names_list_every_scale() -> None:
    assert tuple(f"yolo12{letter}" for letter in SCALES) == YOLO12_NAMES
