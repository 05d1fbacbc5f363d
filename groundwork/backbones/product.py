"""The one file that goes from pretraining to fine-tuning: written whole, read with care.

A product is a safetensors file. Its tensors are called `backbone.*` (and `neck.*` and `head.*`
where these were trained); its metadata has one key, `groundwork`, with JSON: format, backbone,
levels, mean, std, a checksum of the tensors, and whatever the run has to say (task, recipe, images
seen, commit).
Nothing that is read here can run code: torch's own files are read as tensors only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from groundwork.backbones import METADATA_KEY, build_backbone
from groundwork.backbones.contract import Backbone
from groundwork.errors import CheckpointError
from groundwork.files import replacing, sync

FORMAT = 1

_TORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Where a training checkpoint keeps its tensors; averaged weights first, as timm does.
_SECTIONS = ("state_dict_ema", "model_ema", "state_dict", "model")


def save_product(path: Path, parts: Mapping[str, nn.Module], metadata: Mapping[str, Any]) -> None:
    """Write parts (`backbone`; `neck`, `head` where trained) as one safetensors file, atomically.

    `metadata` is JSON-able and goes beside what the backbone says of itself. A reader never sees
    half a file: it is written beside its place, synced, and renamed. Raises CheckpointError where
    the disk refuses.
    """
    backbone = parts["backbone"]
    assert isinstance(backbone, Backbone)
    # A clone each: safetensors takes neither strided nor shared tensors.
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    about = {
        **metadata,
        "format": FORMAT,
        "backbone": backbone.name,
        "levels": backbone.levels,
        "in_channels": backbone.in_channels,
        "mean": backbone.mean,
        "std": backbone.std,
        "sha256": _checksum(tensors),
    }
    path = Path(path)
    try:
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata={METADATA_KEY: json.dumps(about)})
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(
            f"{path} could not be written ({error}): it needs {needed} bytes in a folder that can "
            f"be written to."
        ) from error


def read_product(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a product's tensors (on the CPU) and metadata.

    Raises CheckpointError where the file is missing, damaged, or no product.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata is None:
        raise CheckpointError(
            f"{path} is not a pretrained.safetensors of ours (it has no metadata): to start from "
            f"its tensors, pass it as --init with backbone.name."
        )
    return tensors, metadata


def backbone_from_file(path: Path) -> Backbone:
    """Build the backbone that a product names, with the product's weights, every one of them.

    Raises CheckpointError where the file is missing, damaged, no product, or does not fit.
    """
    tensors, metadata = read_product(path)
    backbone = build_backbone(str(metadata["backbone"]), int(metadata.get("in_channels", 3)))
    wanted = "backbone."
    own = {k.removeprefix(wanted): v for k, v in tensors.items() if k.startswith(wanted)}
    try:
        backbone.load_state_dict(own, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"{path} does not fit {metadata['backbone']} as this version builds it ({reason}): "
            f"read it with the version that wrote it."
        ) from error
    return backbone


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the tensors of a safetensors or torch file, and our metadata where it has them.

    Raises CheckpointError where the file is missing, damaged, holds code, or holds no tensors.
    """
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name the file in it.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH_ENDINGS:
        return _read_torch(path), None
    raise CheckpointError(
        f"{path} is of no known kind: .safetensors is read, and {', '.join(_TORCH_ENDINGS)}."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        metadata = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}): copy or download it again."
        ) from error
    if metadata is None:
        return tensors, None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is damaged (its metadata is no object): copy it again.")
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {metadata.get('format')} and this version reads format {FORMAT}: "
            f"use the version that wrote it."
        )
    if metadata.get("sha256") != _checksum(tensors):
        raise CheckpointError(
            f"{path} is damaged (its tensors are not what was written): copy it again."
        )
    return tensors, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # timm's training checkpoints hold their arguments in a Namespace, which is data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle versions; told below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors; pickles are not read, because they can "
            f"run code: save its state dict as .safetensors where it was made."
        ) from error
    except Exception as error:  # a damaged file makes torch's reader raise anything at all
        reason = str(error).split(". ")[0].split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or no torch file ({reason}): copy or download it again."
        ) from error
    for section in _SECTIONS:
        if isinstance(content, Mapping) and isinstance(content.get(section), Mapping):
            content = content[section]
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors: save a state dict.")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes: safetensors itself does not notice a flipped bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
