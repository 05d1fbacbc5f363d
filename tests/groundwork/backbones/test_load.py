"""Starting weights: what fits, what does not, and what a person is told of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from groundwork.backbones import build_backbone, load_init
from groundwork.backbones.contract import Backbone
from groundwork.backbones.product import save_product
from groundwork.errors import CheckpointError

SMALL = "timm/test_resnet"


def _filled(name: str, seed: int = 5) -> Backbone:
    """Build a backbone in which every number is another than at the start."""
    backbone = build_backbone(name)
    generator = torch.Generator().manual_seed(seed)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return backbone


def _equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(
        torch.equal(tensor, theirs[name])
        for name, tensor in first.state_dict().items()
        if not name.endswith("num_batches_tracked")
    )


def _plain(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


@pytest.mark.parametrize("name", ["yolo12n", SMALL])
def test_a_product_of_ours_fits_whole(tmp_path: Path, name: str) -> None:
    source, target = _filled(name), build_backbone(name)
    save_product(tmp_path / "pretrained.safetensors", {"backbone": source}, {})
    report = load_init(target, tmp_path / "pretrained.safetensors")
    assert _equal(source, target)
    assert (report.missing, report.unexpected, report.share) == ([], [], 1.0)
    total = len([key for key in source.state_dict() if "num_batches" not in key])
    assert report.sentence() == (
        f"Loaded from {tmp_path / 'pretrained.safetensors'}: {total} of {total} tensors of the "
        f"backbone (100 %)."
    )


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "backbone.",
        "teacher.",
        "encoder.",
        "module._orig_mod.backbone.",
        "teacher.backbone.",
        "_orig_mod.module.encoder.",
    ],
)
@pytest.mark.parametrize("inner", ["model.", ""])  # our names of a timm model, and timm's own
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str, inner: str) -> None:
    source, target = _filled(SMALL), build_backbone(SMALL)
    tensors = {
        f"{prefix}{inner}{name.removeprefix('model.')}": tensor
        for name, tensor in _plain(source).items()
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    assert load_init(target, tmp_path / "weights.safetensors").unexpected == []
    assert _equal(source, target)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("section", [None, "state_dict", "model"])
def test_torch_files_are_read_with_their_sections(
    tmp_path: Path, ending: str, section: str | None
) -> None:
    source, target = _filled(SMALL), build_backbone(SMALL)
    content: dict[str, Any] = _plain(source)
    if section:
        content = {section: content, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / f"weights{ending}")
    load_init(target, tmp_path / f"weights{ending}")
    assert _equal(source, target)


def test_averaged_weights_are_preferred_as_timm_prefers_them(tmp_path: Path) -> None:
    plain, averaged, target = _filled(SMALL, 1), _filled(SMALL, 2), build_backbone(SMALL)
    content = {"state_dict": _plain(plain), "state_dict_ema": _plain(averaged)}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    load_init(target, tmp_path / "checkpoint.pth.tar")
    assert _equal(averaged, target)


@pytest.mark.parametrize(
    "model",
    [
        "test_resnet",
        "test_convnext",
        "test_efficientnet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "resnet18",
                "convnext_atto",
                "efficientnet_b0",
                "mobilenetv4_conv_small",
                "darknet17",
                "regnety_002",
                "swin_tiny_patch4_window7_224",
            )
        ),
    ],
)
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_timm_checkpoint_with_its_classifier_fits(
    tmp_path: Path, model: str, ending: str
) -> None:
    torch.manual_seed(8)
    full = timm.create_model(model, num_classes=7).eval()
    path = tmp_path / f"model{ending}"
    if ending == ".pth":
        torch.save(full.state_dict(), path)
    else:
        save_file(full.state_dict(), path)
    target = build_backbone(f"timm/{model}")
    report = load_init(target, path)
    assert report.missing == []
    assert report.unexpected  # the classifier
    assert "not wanted (" in report.sentence()
    theirs = full.state_dict()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, theirs[name.removeprefix("model.")])


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 4])
def test_an_older_timm_checkpoint_is_converted_as_timm_does_it(
    tmp_path: Path, channels: int
) -> None:
    """Swin once had its downsampling at the end of a stage, and its masks in the file."""
    torch.manual_seed(8)
    model = "swin_tiny_patch4_window7_224"
    full = timm.create_model(model, num_classes=7)
    older = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name): tensor
        for name, tensor in full.state_dict().items()
    }
    older["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save(
        {"model": {f"module.{key}": value for key, value in older.items()}}, tmp_path / "a.pth"
    )
    target = build_backbone(f"timm/{model}", channels)
    report = load_init(target, tmp_path / "a.pth")
    assert report.missing == []
    assert len(report.widened) == (channels != 3)
    theirs = full.state_dict()
    for name, tensor in target.state_dict().items():
        expected = theirs[name.removeprefix("model.")]
        if name.endswith("patch_embed.proj.weight") and channels == 4:
            expected = expected[:, [0, 1, 2, 0]] * 3 / 4
        assert torch.equal(tensor, expected)


def test_two_networks_in_one_file_are_never_mixed(tmp_path: Path) -> None:
    whole, part, target = _filled(SMALL, 1), _filled(SMALL, 2), build_backbone(SMALL)
    names = list(whole.state_dict())
    tensors = {f"backbone.{name}": whole.state_dict()[name] for name in names}
    tensors |= {f"teacher.backbone.{name}": part.state_dict()[name] for name in names[:-4]}
    save_file(tensors, tmp_path / "both.safetensors")
    report = load_init(target, tmp_path / "both.safetensors")
    assert _equal(whole, target)
    assert all(name.startswith("teacher.backbone.") for name in report.unexpected)


def test_of_two_whole_networks_the_less_wrapped_is_taken(tmp_path: Path) -> None:
    wrapped, plain, target = _filled(SMALL, 1), _filled(SMALL, 2), build_backbone(SMALL)
    tensors = {f"_orig_mod.backbone.{name}": one for name, one in wrapped.state_dict().items()}
    tensors |= {f"backbone.{name}": one for name, one in plain.state_dict().items()}
    save_file(tensors, tmp_path / "both.safetensors")
    load_init(target, tmp_path / "both.safetensors")
    assert _equal(plain, target)


def test_batchnorm_counters_do_not_count(tmp_path: Path) -> None:
    source, target = _filled("yolo12n"), build_backbone("yolo12n")
    tensors = {k: v for k, v in _plain(source).items() if "num_batches_tracked" not in k}
    save_file(tensors, tmp_path / "weights.safetensors")
    report = load_init(target, tmp_path / "weights.safetensors")
    assert report.missing == []
    assert not [name for name in report.matched if "num_batches_tracked" in name]


@pytest.mark.parametrize(("lost", "fits"), [(28, True), (29, False)])
def test_under_ninety_percent_is_an_error_that_leaves_the_backbone_alone(
    tmp_path: Path, lost: int, fits: bool
) -> None:
    source, target = _filled("yolo12n"), build_backbone("yolo12n")
    before = build_backbone("yolo12n")
    before.load_state_dict(target.state_dict())
    tensors = {k: v for k, v in _plain(source).items() if "num_batches_tracked" not in k}
    assert len(tensors) == 285  # so that 90 % is 256.5
    for name in list(tensors)[:lost]:
        tensors[f"odd.{name}"] = tensors.pop(name)
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    if fits:
        report = load_init(target, path)
        assert len(report.missing) == lost
        assert "257 of 285 tensors of the backbone (90.1 %); 28 missing" in report.sentence()
        return
    with pytest.raises(CheckpointError) as caught:
        load_init(target, path)
    assert str(caught.value) == (
        f"{path} fits yolo12n in 256 of 285 tensors (89.8 %), and 90 % are needed; missing are "
        f"layers.0.conv.weight, layers.0.bn.weight, layers.0.bn.bias and 26 more; the file has "
        f"instead odd.layers.0.bn.bias, odd.layers.0.bn.running_mean, "
        f"odd.layers.0.bn.running_var and 26 more. Set backbone.name to what the file was made "
        f"with, or leave out --init."
    )
    assert _equal(before, target)


def test_another_scale_is_refused_with_the_name_that_would_fit(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": build_backbone("yolo12s")}, {})
    with pytest.raises(CheckpointError, match=r"holds yolo12s: set backbone\.name=yolo12s"):
        load_init(build_backbone("yolo12n"), path)


@pytest.mark.parametrize("channels", [(4, 3), (1, 3), (4, 1), (4, 5)])
def test_a_stem_for_other_channels_is_refused(tmp_path: Path, channels: tuple[int, int]) -> None:
    there, here = channels
    save_file(dict(build_backbone("yolo12n", there).state_dict()), tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=f"pictures of {there} channels .* here have {here}"):
        load_init(build_backbone("yolo12n", here), tmp_path / "it.safetensors")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = _plain(_filled(SMALL))
    tensors["model.layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite, in model\.layer1\.0\.conv1\.weight"):
        load_init(build_backbone(SMALL), tmp_path / "weights.safetensors")


def test_type_and_memory_format_of_the_backbone_stay(tmp_path: Path) -> None:
    source = _filled(SMALL)
    target = build_backbone(SMALL).to(memory_format=torch.channels_last)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in _plain(source).items()},
        tmp_path / "half.safetensors",
    )
    load_init(target, tmp_path / "half.safetensors")
    weight = target.state_dict()["model.layer1.0.conv1.weight"]
    assert weight.dtype is torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


class Malicious:
    """A pickle of this makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, archive: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    content = {"state_dict": {"conv.weight": torch.zeros(1)}, "hook": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match="pickles are not read, because they can run code"):
        load_init(build_backbone(SMALL), path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


@pytest.mark.parametrize("name", ["yolo12n", "timm/resnet10t"])
@pytest.mark.parametrize("channels", [1, 5])
def test_a_first_layer_of_rgb_is_brought_to_other_channels(
    name: str, channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    rgb = build_backbone(name)
    save_file(dict(rgb.state_dict()), tmp_path / "rgb.safetensors")
    backbone = build_backbone(name, channels)
    report = load_init(backbone, tmp_path / "rgb.safetensors")
    assert report.share == 1
    assert len(report.widened) == 1
    assert "brought from RGB" in report.sentence()
    first, wide = rgb.state_dict()[report.widened[0]], backbone.state_dict()[report.widened[0]]
    if channels == 1:
        assert torch.allclose(wide, first.sum(1, keepdim=True))
    else:
        assert torch.allclose(wide, first[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert not load_init(rgb, tmp_path / "rgb.safetensors").widened
