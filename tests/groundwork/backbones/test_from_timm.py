"""timm backbones: every family gives three levels at any size, under timm's own names."""

from __future__ import annotations

import copy
import itertools
import socket
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn

from groundwork.backbones import build_backbone
from groundwork.backbones.from_timm import TimmBackbone, has_parallel_branches, synchronised
from groundwork.errors import UsageError

TINY = ["test_resnet", "test_convnext", "test_efficientnet"]  # timm's own, for tests
FAMILIES = [
    "resnet10t",
    "convnext_atto",
    "efficientnet_b0",
    "efficientnet_lite0",
    "mobilenetv4_conv_small",
    "darknet17",
    "cspdarknet53",
    "regnety_002",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "densenet121",
    "dla34",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "pvt_v2_b0",
]
MODELS = [*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]


def _build(model: str) -> TimmBackbone:
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{model}")
    assert isinstance(backbone, TimmBackbone)
    return backbone


def _image(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", MODELS)
def test_levels_are_as_said_at_any_size_in_both_modes(model: str) -> None:
    backbone = _build(model)
    assert [level.stride for level in backbone.levels] == [8, 16, 32]
    modes = itertools.product((True, False), ((64, 64), (160, 192), (224, 224)))
    for train, (height, width) in modes:
        backbone.train(train)
        with torch.no_grad():
            outputs = backbone(_image(height, width))
        assert [tuple(output.shape) for output in outputs] == [
            (2, channels, height // stride, width // stride) for stride, channels in backbone.levels
        ]


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_a_gradient(model: str) -> None:
    backbone = _build(model).train()
    outputs = backbone(_image(64, 96))
    sum(output.square().mean() for output in outputs).backward()
    assert [name for name, one in backbone.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("model", MODELS)
def test_what_c5_does_not_depend_on_is_known(model: str) -> None:
    """A task that looks at C5 alone runs under DistributedDataParallel all the same."""
    backbone = _build(model).train()
    backbone(_image(64, 96)).c5.square().mean().backward()
    idle = [name for name, one in backbone.named_parameters() if one.grad is None]
    assert bool(idle) == has_parallel_branches(backbone.name)


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_those_of_timm(model: str) -> None:
    theirs = timm.create_model(model, num_classes=0).state_dict()
    for name, tensor in _build(model).state_dict().items():
        assert name.startswith("model.")
        assert theirs[name.removeprefix("model.")].shape == tensor.shape


@pytest.mark.parametrize("model", MODELS)
def test_the_maps_are_those_of_timms_own_wrapper(model: str) -> None:
    """The same weights give the same maps in timm's features_only model."""
    backbone = _build(model).eval()
    options: dict[str, Any] = {}
    if "swin" in model:
        options["strict_img_size"] = False
    torch.manual_seed(0)
    full = timm.create_model(model, num_classes=0, **options)
    mine = {k.removeprefix("model."): v for k, v in backbone.state_dict().items()}
    full.load_state_dict({**full.state_dict(), **mine})
    wrapper = timm.create_model(
        model,
        features_only=True,
        out_indices=backbone.indices,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": full.state_dict(), "num_classes": 0},
        **options,
    )
    with torch.no_grad():
        outputs = backbone(_image(96, 64))
        wanted = wrapper.eval()(_image(96, 64))
    for output, (_, channels), theirs in zip(outputs, backbone.levels, wanted, strict=True):
        if theirs.shape[1] != channels:  # N H W C
            theirs = theirs.permute(0, 3, 1, 2)
        torch.testing.assert_close(output, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_it_works_copied_in_channels_last_and_under_autocast(model: str) -> None:
    backbone = copy.deepcopy(_build(model)).eval().to(memory_format=torch.channels_last)
    image = _image(64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = backbone(image)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("model", MODELS)
def test_depths_name_every_parameter_and_grow_away_from_the_picture(model: str) -> None:
    backbone = build_backbone(f"timm/{model}")
    depths = backbone.depths()
    assert depths.keys() == {name for name, _ in backbone.named_parameters()}
    assert min(depths.values()) == 0 and max(depths.values()) >= 2
    first = next(name for name, _ in backbone.named_parameters())
    assert depths[first] == 0


def test_layers_behind_the_last_level_are_gone() -> None:
    names = _build("test_efficientnet").state_dict().keys()
    assert not [name for name in names if "conv_head" in name or "classifier" in name]


def test_a_parameter_that_no_level_depends_on_becomes_a_buffer_of_the_same_name() -> None:
    backbone = _build("hrnet_w18_small")
    parameters = {name for name, _ in backbone.named_parameters()}
    unused = (
        "model.stage4.0.fuse_layers.0.1.0.weight"  # makes the stride 4 map, which we do not use
    )
    assert unused not in parameters
    assert unused in backbone.state_dict()


def test_building_leaves_running_statistics_and_the_mode_alone() -> None:
    backbone = _build("test_resnet")
    assert backbone.training
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.num_batches_tracked is not None
            assert module.running_mean.eq(0).all()
            assert module.num_batches_tracked.item() == 0


def test_building_draws_only_what_timm_draws() -> None:
    torch.manual_seed(0)
    build_backbone("timm/test_resnet")
    ours = torch.rand(1)
    torch.manual_seed(0)
    timm.create_model("test_resnet", num_classes=0)
    assert ours == torch.rand(1)


def test_mean_and_std_are_those_of_the_models_pretraining() -> None:
    assert _build("test_efficientnet").mean == (0.485, 0.456, 0.406)
    assert _build("test_resnet").std == (0.5, 0.5, 0.5)


def test_a_tag_of_a_pretrained_version_is_part_of_the_name() -> None:
    backbone = _build("test_resnet.r160_in1k")
    assert backbone.name == "timm/test_resnet.r160_in1k"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("test_vit", r"offers feature maps at strides 16, and a backbone needs 8, 16 and 32"),
        ("levit_128s", r"offers feature maps at strides 16, 32, 64, and"),
        ("efficientformerv2_s0", r"does not take a picture of 64 x 96 pixels"),
        ("maxvit_tiny_rw_224", r"must \(height \(16\) must be divisible by window \(7\)\)"),
        ("mobilevitv2_050", r"says strides 8, 16, 32 but gives"),
        ("resnet18.nope", r"cannot be built: Invalid pretrained tag"),
        ("resnet_18", r"timm has no model 'resnet_18'. Did you mean timm/resnet18"),
        ("hf-hub:timm/resnet18", r"timm has no model 'hf-hub:timm/resnet18'"),
        ("qqqqqqqq", r"timm has no model 'qqqqqqqq'\.$"),
    ],
)
def test_a_model_that_cannot_be_a_backbone_is_refused_in_one_sentence(
    model: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        build_backbone(f"timm/{model}")
    assert "\n" not in str(caught.value)


def test_building_never_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    _build("test_resnet.r160_in1k")
    with pytest.raises(UsageError):
        _build("hf-hub:timm/test_resnet.r160_in1k")


def test_a_synchronised_batchnorm_keeps_its_activation() -> None:
    backbone = build_backbone("timm/efficientnet_lite0")
    before = [module for module in backbone.modules() if isinstance(module, BatchNormAct2d)]
    found = synchronised(backbone)
    after = [module for module in found.modules() if isinstance(module, SyncBatchNormAct)]
    assert before and len(after) == len(before)
    assert [type(one.act) for one in after] == [type(one.act) for one in before]
