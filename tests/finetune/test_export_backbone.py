"""Backbones back in timm's and torchvision's own form, loaded by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from finetune.export_backbone import to_timm, to_torchvision
from groundwork.backbones import build_backbone
from groundwork.backbones.contract import Backbone
from groundwork.errors import UsageError

FAMILIES = (
    "resnet10t", "regnety_002", "convnext_atto", "efficientnet_b0", "mobilenetv4_conv_small",
    "mobilenetv3_small_050", "darknet17", "swin_tiny_patch4_window7_224", "hgnetv2_b0", "dla34",
    "densenet121", "hrnet_w18_small", "repvgg_a0",
)  # fmt: skip


def _trained(name: str) -> Backbone:
    """Build a backbone that is not as initialised: statistics moved, weights shifted."""
    torch.manual_seed(2)
    backbone = build_backbone(name)
    with torch.no_grad():
        backbone.train()(torch.rand(2, 3, 64, 64))
        for parameter in backbone.parameters():
            parameter.mul_(1.1)
    return backbone.eval()


@pytest.mark.parametrize(
    ("model", "ending"),
    [
        ("test_resnet", ".safetensors"),
        ("test_resnet", ".pth"),
        *(pytest.param(name, ".safetensors", marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_timm_loads_the_file_in_both_ways_with_the_same_features(
    tmp_path: Path, model: str, ending: str
) -> None:
    backbone = _trained(f"timm/{model}")
    form = to_timm(backbone)
    assert form.name == model
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(form.tensors, path)
    else:
        save_file(form.tensors, path)

    whole = timm.create_model(model, num_classes=0, checkpoint_path=str(path))
    state = whole.state_dict()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key.removeprefix("model.")])
    assert set(form.filled) == set(state) - {
        key.removeprefix("model.") for key in backbone.state_dict()
    }

    overlay = {"file": str(path), "num_classes": 0}
    any_size = {"strict_img_size": False} if model.startswith("swin") else {}
    maps = timm.create_model(
        model, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **any_size
    ).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        wanted = backbone(image)
        found = dict(zip(maps.feature_info.reduction(), maps(image), strict=True))
    for level, feature in zip(backbone.levels, wanted, strict=True):
        other = found[level.stride]
        if other.shape != feature.shape:
            other = other.permute(0, 3, 1, 2)  # some families give channels last
        torch.testing.assert_close(other, feature, atol=1e-4, rtol=1e-4)


def test_what_is_filled_does_not_depend_on_when_it_is_exported() -> None:
    backbone = build_backbone("timm/test_convnext")
    first, second = to_timm(backbone), to_timm(backbone)
    assert first.filled == ["head.norm.weight", "head.norm.bias"]
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.filled)


# What of torchvision's model gives the last feature map of stride 32.
_LAST: dict[str, Any] = {
    "resnet18": lambda m: nn.Sequential(*list(m.children())[:-2]),
    "resnext50_32x4d": lambda m: nn.Sequential(*list(m.children())[:-2]),
    "densenet121": lambda m: nn.Sequential(m.features, nn.ReLU()),  # as its forward does
    "vgg11_bn": lambda m: m.features,
}


@pytest.mark.parametrize(
    "model", ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in list(_LAST)[1:])]
)
def test_torchvision_loads_the_file_with_the_same_features(model: str) -> None:
    backbone = _trained(f"timm/{model}")
    form = to_torchvision(backbone)
    theirs = torchvision.models.get_model(model, weights=None).eval()
    missing, unexpected = theirs.load_state_dict(form.tensors, strict=False)
    assert unexpected == []
    assert missing
    assert all(key.startswith(("fc.", "classifier.")) for key in missing)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found, wanted = _LAST[model](theirs)(image), backbone(image).c5
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["test_resnet", "convnext_atto", "efficientnet_b0"])
def test_models_that_torchvision_has_not_are_refused(model: str) -> None:
    with pytest.raises(UsageError, match=r"torchvision has no .* export with --format timm"):
        to_torchvision(build_backbone(f"timm/{model}"))


def test_yolo12_has_no_form_in_timm() -> None:
    with pytest.raises(UsageError, match="yolo12n is no model of timm"):
        to_timm(build_backbone("yolo12n"))
