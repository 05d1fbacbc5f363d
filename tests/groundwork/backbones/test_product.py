"""The product file: written whole, read with care."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from groundwork import files
from groundwork.backbones import build_backbone, product
from groundwork.backbones.product import (
    backbone_from_file,
    read_product,
    read_tensors,
    save_product,
)
from groundwork.errors import CheckpointError
from tests.full_disk import full_disk

SMALL = "timm/test_resnet"


@pytest.mark.parametrize("name", ["yolo12n", SMALL])
def test_a_product_builds_its_own_backbone_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pretrained.safetensors"
    backbone = build_backbone(name).to(memory_format=torch.channels_last)
    backbone(torch.rand(2, 3, 64, 64))  # moves the running statistics
    save_product(path, {"backbone": backbone}, {"task": "byol", "images_seen": 7})
    again = backbone_from_file(path)
    assert (again.name, again.levels) == (name, backbone.levels)
    image = torch.rand(1, 3, 64, 64)
    for first, second in zip(backbone.eval()(image), again.eval()(image), strict=True):
        torch.testing.assert_close(first, second)
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])


def test_metadata_says_how_to_build_it_and_what_the_run_said(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": build_backbone(SMALL)}, {"task": "simclr", "note": "Fläche"})
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["groundwork"])
    digest = metadata.pop("sha256")
    assert len(digest) == 64
    assert metadata == {
        "task": "simclr",
        "note": "Fläche",
        "format": 1,
        "backbone": SMALL,
        "levels": [[8, 48], [16, 192], [32, 96]],
        "in_channels": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


def test_parts_are_named_and_shared_tensors_are_written_twice(tmp_path: Path) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    neck = nn.Sequential(first, second)
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": build_backbone(SMALL), "neck": neck}, {})
    tensors, _ = read_product(path)
    assert torch.equal(tensors["neck.0.weight"], tensors["neck.1.weight"])
    assert {name.partition(".")[0] for name in tensors} == {"backbone", "neck"}
    backbone_from_file(path)  # takes its part


def test_saving_leaves_the_module_as_it_is_and_replaces_the_older_file(tmp_path: Path) -> None:
    path, reader = tmp_path / "pretrained.safetensors", tmp_path / "reader"
    path.write_bytes(b"older")
    reader.hardlink_to(path)  # as one that has the older file open
    backbone = build_backbone(SMALL).to(memory_format=torch.channels_last)
    save_product(path, {"backbone": backbone}, {})
    weight = backbone.state_dict()["model.layer1.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert {one.name for one in tmp_path.iterdir()} == {path.name, reader.name}
    assert reader.read_bytes() == b"older"
    read_product(path)


def test_a_save_that_dies_before_the_rename_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pretrained.safetensors"
    path.write_bytes(b"older")

    def die(_: Path) -> None:
        assert path.read_bytes() == b"older"  # the new one is still elsewhere
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", die)
    with pytest.raises(KeyboardInterrupt):
        save_product(path, {"backbone": build_backbone(SMALL)}, {})
    assert path.read_bytes() == b"older"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_told_with_the_bytes_that_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    backbone = build_backbone(SMALL)
    told = r"could not be written .* needs \d{6,} bytes"
    with full_disk(100_000), pytest.raises(CheckpointError, match=told):
        save_product(path, {"backbone": backbone}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "garbage"])
def test_a_damaged_product_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": build_backbone(SMALL)}, {})
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[-1000] ^= 1
    damaged = {
        "cut": content[:-1000],
        "flipped": content,
        "empty": b"",
        "garbage": b"<html>not found</html>" * 10,
    }
    path.write_bytes(bytes(damaged[kind]))
    with pytest.raises(CheckpointError, match=r"pretrained\.safetensors is damaged"):
        read_product(path)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_no_damage_gets_past_as_another_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights{ending}"
    tensors = {"a": torch.ones(50), "b": torch.ones(2)}
    if ending == ".pth":
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
    else:
        save_file(tensors, path, metadata={"groundwork": '{"format": 1}'})
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(200):
        content = bytearray(whole)
        if trial % 2:
            content = content[: generator.randrange(len(content))]
        else:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            read_tensors(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_files_that_are_no_product_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        read_product(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="is a folder: name the file in it"):
        read_product(tmp_path)
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"of no known kind: \.safetensors is read"):
        read_product(tmp_path / "weights.onnx")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"no metadata.*pass it as --init"):
        read_product(tmp_path / "foreign.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_tensors(tmp_path / "list.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "new.safetensors", {"groundwork": '{"format": 2}'})
    with pytest.raises(CheckpointError, match="format 2 and this version reads format 1"):
        read_product(tmp_path / "new.safetensors")


def test_a_product_that_lacks_a_tensor_does_not_become_a_backbone(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    backbone = build_backbone(SMALL)
    save_product(path, {"backbone": backbone}, {})
    tensors, metadata = read_product(path)
    del tensors["backbone.model.conv1.0.weight"]
    metadata["sha256"] = product._checksum(tensors)
    save_file(tensors, path, {"groundwork": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=r"does not fit timm/test_resnet .*Missing key"):
        backbone_from_file(path)
