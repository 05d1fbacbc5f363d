"""Backbones by name, and their weights from a file.

Importing this loads neither torch nor timm: a recipe's backbone name can be checked at once.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from groundwork.backbones.load import InitReport, load_init, load_parts
from groundwork.errors import UsageError

if TYPE_CHECKING:
    from groundwork.backbones.contract import Backbone

__all__ = [
    "METADATA_KEY",
    "YOLO12_NAMES",
    "InitReport",
    "build_backbone",
    "check_backbone_name",
    "load_init",
    "load_parts",
]

METADATA_KEY = "groundwork"  # of a product's safetensors metadata; its value is JSON

YOLO12_NAMES = ("yolo12n", "yolo12s", "yolo12m", "yolo12l", "yolo12x")

_TIMM = "timm/"


def check_backbone_name(name: str) -> None:
    """Raise UsageError where no backbone can have that name; timm's own names are not looked up."""
    if name in YOLO12_NAMES or name.removeprefix(_TIMM) not in ("", name):
        return
    near = difflib.get_close_matches(name, YOLO12_NAMES, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"Unknown backbone '{name}': known are {', '.join(YOLO12_NAMES)} and timm/<model>.{hint}"
    )


def build_backbone(name: str, in_channels: int = 3) -> Backbone:
    """Build a backbone with random weights (from torch's generator): yolo12n to x, timm/<model>.

    `in_channels` is how many channels its pictures have: 3 are RGB.

    Raises UsageError naming the nearest known names, or what a timm model lacks.
    """
    check_backbone_name(name)
    # Each family is imported when it is asked for: timm alone takes seconds.
    if name.startswith(_TIMM):
        from groundwork.backbones.from_timm import TimmBackbone

        return TimmBackbone(name, in_channels)
    from groundwork.backbones.yolo12 import YOLO12

    return YOLO12(name.removeprefix("yolo12"), in_channels)
