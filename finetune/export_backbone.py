"""A timm backbone back in the form that timm and torchvision themselves load.

Our tensors have timm's own names below `model.`, so this is a change of prefix. What timm has and a
detector does not, layers behind the last feature map (a last norm, a convolution before the
classifier), was pruned and never trained. timm loads a file only where nothing is missing
(`num_classes=0`), so those tensors are filled with freshly initialised ones, and named.

The file fits `timm.create_model(NAME, num_classes=0, checkpoint_path=FILE)` and, since that
wrapper renames tensors, `timm.create_model(NAME, features_only=True, pretrained=True,
pretrained_cfg_overlay=dict(file=FILE, num_classes=0))`.

torchvision has some models under the same name with the same tensors: ResNet, ResNeXt, Wide ResNet,
DenseNet and VGG. For others there is no such form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from groundwork.backbones.contract import Backbone
from groundwork.errors import UsageError

_CLASSIFIERS = ("fc.", "classifier.")  # as torchvision calls them


class Form(NamedTuple):
    """Tensors for another library's model `name`; `filled` are those that were never trained."""

    name: str
    tensors: dict[str, Tensor]
    filled: list[str]


def to_timm(backbone: Backbone) -> Form:
    """Return the tensors that timm's model wants, without classifier; raises UsageError."""
    from groundwork.backbones.from_timm import PREFIX, TimmBackbone, whole_state

    if not isinstance(backbone, TimmBackbone):
        raise UsageError(
            f"{backbone.name} is no model of timm: export it with --format ultralytics or onnx."
        )
    own = {
        key.removeprefix("model."): value.detach().cpu().contiguous().clone()
        for key, value in backbone.state_dict().items()
    }
    whole = whole_state(backbone.name, backbone.in_channels)
    unknown = sorted(set(own) - set(whole))
    if unknown:
        raise UsageError(
            f"{backbone.name} as timm builds it has no tensor {unknown[0]}: export with the "
            "version of timm that it was trained with."
        )
    filled = [key for key in whole if key not in own]
    tensors = {key: own.get(key, value.contiguous()) for key, value in whole.items()}
    return Form(backbone.name.removeprefix(PREFIX), tensors, filled)


def to_torchvision(backbone: Backbone) -> Form:
    """Return the tensors that torchvision's model of the same name wants, all but its classifier.

    Raises UsageError where torchvision has no such model, or other tensors in it.
    """
    if backbone.in_channels != 3:
        raise UsageError(
            f"torchvision's models see three channels and {backbone.name} here "
            f"{backbone.in_channels}: export it with --format timm."
        )
    form = to_timm(backbone)
    name = form.name.split(".")[0]  # without the tag of a pretrained version
    wanted = _torchvision_shapes(name)
    tensors = {key: value for key, value in form.tensors.items() if key in wanted}
    if not wanted or {key: value.shape for key, value in tensors.items()} != wanted:
        raise UsageError(
            f"torchvision has no {name} with the same tensors as timm's: the ResNet, ResNeXt, "
            "Wide ResNet, DenseNet and VGG families have; export with --format timm."
        )
    return Form(name, tensors, [key for key in form.filled if key in wanted])


def _torchvision_shapes(name: str) -> dict[str, torch.Size]:
    """Return names and shapes of torchvision's model without its classifier; none: no model."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        return {}
    arguments = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **arguments)
    return {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.startswith(_CLASSIFIERS)
    }
