"""The names that YOLOv12's tensors have in its public implementations, and ours: both directions.

There a tensor is `model.<i>.` with the layer's number i (0 to 21), and then what our own blocks
call it too. So the table is one prefix for the backbone (0 to 8), one for the neck (11 to 20), and
four for the head (21), whose branches are `cv2` (boxes) and `cv3` (classes) there. The places of
the 16 bins are counted as a fixed 1x1 convolution, `model.21.dfl.conv.weight` (1 16 1 1).

Such a plain file of tensors is all that is exchanged. Source: the names and shapes of the public
state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from finetune.detector import Detector, own_width
from finetune.head import BINS
from groundwork.backbones.contract import Backbone
from groundwork.backbones.load import WRAPPERS
from groundwork.backbones.yolo12 import YOLO12
from groundwork.errors import UsageError
from groundwork.necks.yolo12 import YOLO12Neck

_HEAD = 21
_BACKBONE = range(9)
_NECK = (11, 14, 15, 17, 18, 20)
_BINS = f"model.{_HEAD}.dfl.conv.weight"
_BRANCHES = {"cv2": "boxes", "cv3": "classes"}

_LAYER = re.compile(
    rf"(?P<wrapper>(?:{'|'.join(map(re.escape, WRAPPERS))})*?)model\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def to_ultralytics(detector: Detector) -> dict[str, Tensor]:
    """Return a detector's tensors under their public names, contiguous copies on the CPU.

    Their order is not the public one. Raises UsageError where the backbone is not YOLOv12's, the
    neck of another letter, or the head has an objectness branch: there is no public model to take
    them.
    """
    name = detector.backbone.name
    letter = detector.neck.letter
    if f"yolo12{letter}" != name:
        raise UsageError(
            f"{name} with a neck of width {letter} has no public counterpart: only yolo12n to "
            "yolo12x with neck and head of their own letter can be exported so."
        )
    if detector.head.objectness is not None:
        raise UsageError(
            "A head with an objectness branch has no public counterpart: train it with "
            "detector.objectness=false to export it so."
        )
    return {_public(key): _plain(key, value) for key, value in detector.state_dict().items()}


def backbone_to_ultralytics(backbone: Backbone) -> dict[str, Tensor]:
    """Return layers 0 to 8 under their public names. Raises UsageError for other backbones."""
    if not isinstance(backbone, YOLO12):
        raise UsageError(
            f"{backbone.name} has no public YOLOv12 counterpart: only yolo12n to yolo12x have; "
            "export it with --format timm."
        )
    items = backbone.state_dict().items()
    return {_public(f"backbone.{key}"): _plain(key, value) for key, value in items}


def neck_to_ultralytics(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `neck.` tensors of a product under their public names; none if it has none.

    None either where they are of another width than the backbone, which has no public counterpart.
    """
    found = {key: value for key, value in tensors.items() if key.startswith("neck.")}
    own = YOLO12Neck(backbone.levels, own_width(backbone.name)).state_dict()
    if any(own[key.removeprefix("neck.")].shape != value.shape for key, value in found.items()):
        return {}
    return {_public(key): _plain(key, value) for key, value in found.items()}


def from_ultralytics(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give public names ours (`backbone.`, `neck.`, `head.`); other names stay as they are.

    Wrappers' prefixes (`module.`, ...) stay before the new name.
    """
    renamed = {}
    for key, value in tensors.items():
        name = _ours(key)
        is_bins = name.endswith("head.bins") and value.numel() == BINS
        renamed[name] = value.reshape(BINS) if is_bins else value
    return renamed


def _public(key: str) -> str:
    part, rest = key.split(".", 1)
    if part in ("backbone", "neck"):
        return f"model.{rest.removeprefix('layers.')}"
    if rest == "bins":
        return _BINS
    branch, rest = rest.split(".", 1)
    public = {ours: theirs for theirs, ours in _BRANCHES.items()}[branch]
    return f"model.{_HEAD}.{public}.{rest}"


def _ours(key: str) -> str:
    found = _LAYER.fullmatch(key)
    if found is None:
        return key
    wrapper, rest, layer = found["wrapper"], found["rest"], int(found["layer"])
    if layer in _BACKBONE:
        return f"{wrapper}backbone.layers.{layer}.{rest}"
    if layer in _NECK:
        return f"{wrapper}neck.layers.{layer}.{rest}"
    branch, _, below = rest.partition(".")
    if layer == _HEAD and branch in _BRANCHES:
        return f"{wrapper}head.{_BRANCHES[branch]}.{below}"
    if layer == _HEAD and rest == _BINS.removeprefix(f"model.{_HEAD}."):
        return f"{wrapper}head.bins"
    return key


def _plain(key: str, value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.reshape(1, BINS, 1, 1) if key == "head.bins" else value).contiguous().clone()
