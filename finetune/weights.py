"""A detector's one file, detector.safetensors, and starting weights for a detector from any file.

The file is written by groundwork.backbones.product: tensors `backbone.*`, `neck.*`, `head.*`, and
metadata that says how to build the detector again (`detector`), which classes it knows (`names`),
and for which side of picture it was trained (`image_size`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.detector import Detector, build_detector
from groundwork.backbones.product import read_product, save_product
from groundwork.errors import CheckpointError


@dataclass(frozen=True)
class About:
    """What a detector's file says of it."""

    names: tuple[str, ...]
    image_size: int
    metadata: Mapping[str, Any]


def parts_of(detector: Detector) -> dict[str, nn.Module]:
    """Return backbone, neck and head by name."""
    return {"backbone": detector.backbone, "neck": detector.neck, "head": detector.head}


def save_detector(
    path: Path,
    parts: Mapping[str, nn.Module],
    *,
    names: Sequence[str],
    image_size: int,
    metadata: Mapping[str, Any],
) -> None:
    """Write backbone, neck and head as one file, atomically. Raises CheckpointError."""
    neck, head = parts["neck"], parts["head"]
    about = {
        **metadata,
        "detector": {
            "num_classes": head.num_classes,
            "width": neck.letter,
            "objectness": head.objectness is not None,
        },
        "names": list(names),
        "image_size": image_size,
    }
    save_product(path, parts, about)


def detector_from_file(path: Path) -> tuple[Detector, About]:
    """Build the detector that a file names, with its weights, in eval mode.

    Raises CheckpointError where the file is missing, damaged, of a backbone alone, or does not fit.
    """
    tensors, metadata = read_product(path)
    if "detector" not in metadata:
        raise CheckpointError(
            f"{path} holds a backbone and no detector: train one with "
            f"`accelerate launch finetune/run.py --init {path} data.train=...`."
        )
    made = metadata["detector"]
    detector = build_detector(
        str(metadata["backbone"]),
        int(made["num_classes"]),
        width=made["width"],
        objectness=bool(made["objectness"]),
    )
    try:
        detector.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"{path} does not fit the detector that this version builds ({reason}): read it with "
            "the version that wrote it."
        ) from error
    return detector.eval(), About(tuple(metadata["names"]), int(metadata["image_size"]), metadata)
