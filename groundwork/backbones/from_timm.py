"""Any timm model that has feature maps at strides 8, 16 and 32, as a backbone.

The model is built without its classifier and asked for its intermediate feature maps
(`forward_intermediates`), not with `features_only=True`: that wrapper renames the tensors of most
families, so that neither a timm checkpoint fits it nor timm what was trained with it. Here every
tensor keeps timm's own name, below one prefix: `model.<timm's name>`.

Layers that only the classifier needs are pruned. What no feature map depends on and timm keeps all
the same (some branches of HRNet) becomes a buffer: distributed training stops at a parameter
without a gradient (and where a task looks at C5 alone, see `has_parallel_branches`). Models that
are built for one size of picture are told to take any (`strict_img_size=False`: the Swin families)
where they can.

Nothing is ever downloaded: weights come from a file, see `load_init`. `mean` and `std` are those
of the model's own pretraining, from its `pretrained_cfg`. Initialisation is timm's.

Source: Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from groundwork.backbones.contract import STRIDES, Backbone, Level, Pyramid, for_channels
from groundwork.errors import CheckpointError, UsageError

PREFIX = "timm/"

Network = TypeVar("Network", bound=nn.Module)

# Not square, and small in cells, so that a model which only works at its own size shows it.
_TRIAL_SIZE = (64, 96)

# How timm calls the functions that turn an older checkpoint's names into today's.
_CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")


class TimmBackbone(Backbone):
    """A timm model's feature maps at strides 8, 16 and 32, always N C H W.

    `name` is timm/<model>, with or without the tag of a pretrained version (which sets mean and
    std). Raises UsageError where there is no such model, or it has no such feature maps.
    """

    def __init__(self, name: str, in_channels: int = 3) -> None:
        super().__init__()
        self.name = name
        self.model = _create(name, in_channels)
        source = self.model.pretrained_cfg
        self.mean = for_channels(_three(source["mean"]), in_channels)
        self.std = for_channels(_three(source["std"]), in_channels)
        self.levels, indices = _find_levels(name, self.model)
        # timm counts the feature maps anew where it prunes, and says so.
        self.indices: list[int] = list(
            self.model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        )
        outputs = self._try()
        _keep_used_parameters(self.model, outputs)

    def forward(self, image: Tensor) -> Pyramid:
        """Return C3, C4 and C5 of the normalised pictures."""
        return Pyramid(
            *self.model.forward_intermediates(
                image, indices=self.indices, output_fmt="NCHW", intermediates_only=True
            )
        )

    def depths(self) -> dict[str, int]:
        """Return the depths that timm gives its layers, by the model's own grouping."""
        names = {parameter: f"model.{name}" for name, parameter in self.model.named_parameters()}
        groups = param_groups_layer_decay(self.model, layer_decay=0.5)
        order = sorted({group["lr_scale"] for group in groups})
        return {
            names[parameter]: order.index(group["lr_scale"])
            for group in groups
            for parameter in group["params"]
        }

    def _try(self) -> Pyramid:
        """Run once on a small black picture; raises UsageError where the maps are not as said."""
        height, width = _TRIAL_SIZE
        was_training = self.training
        self.eval()  # running statistics stay as they are
        try:
            with torch.enable_grad():
                outputs: Pyramid = self(torch.zeros(1, self.in_channels, height, width))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"{self.name} does not take a picture of {height} x {width} pixels, as a backbone "
                f"must ({reason}): choose a model that takes any multiple of 32."
            ) from error
        self.train(was_training)
        found = [tuple(output.shape[1:]) for output in outputs]
        wanted = [(c, height // stride, width // stride) for stride, c in self.levels]
        if found != wanted:
            raise UsageError(
                f"{self.name} says strides 8, 16, 32 but gives channels, height, width of {found} "
                f"for {height} x {width} pixels, where {wanted} was wanted: choose another model."
            )
        return outputs


class TimmTeacher(nn.Module):
    """Any timm model's last feature map, transformers too, frozen: what a student is to match.

    `stride` is the pixels of a cell, `channels` the map's. Inputs are normalised with `mean` and
    `std`, and their sides are multiples of `stride`. Raises UsageError where there is no such
    model, or it gives no map.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.model = _create(name, any_size=True)
        if not hasattr(self.model, "forward_intermediates"):
            raise UsageError(
                f"{name} has no forward_intermediates in timm {timm.__version__}: choose another "
                "teacher, or a newer timm."
            )
        last = self.model.feature_info[-1]
        self.stride, self.channels = int(last["reduction"]), int(last["num_chs"])
        source = self.model.pretrained_cfg
        self.mean, self.std = _three(source["mean"]), _three(source["std"])
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a teacher does not change."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """N 3 H W -> N, channels, H / stride, W / stride."""
        # With the final norm, where there is one: what the teacher itself would read.
        [last] = self.model.forward_intermediates(
            image, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        found: Tensor = last
        return found

    def load(self, path: Path) -> None:
        """Take the weights of a timm checkpoint, every one of them (counters do not count).

        Raises CheckpointError where the file cannot be read or does not hold the model.
        """
        from groundwork.backbones.load import fit_backbone, report_of, take
        from groundwork.backbones.product import read_tensors

        tensors, _ = read_tensors(path)
        own = dict(self.state_dict())
        chosen, tensors = fit_backbone(self, own, tensors)
        report = report_of(path, own, tensors, chosen)
        if report.share < 1:  # a part that stayed random would be taught
            raise CheckpointError(
                report.refusal(
                    f"the teacher {self.name}", "Set task.teacher to the file's model.", needed=1
                )
            )
        take(own, tensors, chosen, path)


def synchronised(network: Network) -> Network:
    """Let every BatchNorm count over all ranks; timm's, which has an activation inside, keeps it.

    torch's own converter drops that activation without a word.
    """
    converted: Network = timm.layers.convert_sync_batchnorm(network)
    return converted


def convert(
    backbone: TimmBackbone | TimmTeacher, tensors: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """Turn the names of an older checkpoint into timm's of today, as timm itself would.

    Returns None where timm has no such conversion for this family, or it does not fit the file.
    """
    module = sys.modules[type(backbone.model).__module__]
    found = next((getattr(module, name) for name in _CONVERTERS if hasattr(module, name)), None)
    if found is None:
        return None
    converter: Callable[..., dict[str, Tensor]] = found
    takes_model = "model" in inspect.signature(converter).parameters
    try:
        return converter(dict(tensors), *([backbone.model] if takes_model else []))
    except (KeyError, AttributeError, RuntimeError, ValueError, IndexError):
        return None  # the file is not of the kind that the converter knows


def widened(weight: Tensor, channels: int) -> Tensor:
    """Bring a convolution on RGB (O 3 H W) to so many channels, as timm does it."""
    found: Tensor = timm.models.adapt_input_conv(channels, weight)
    return found


def whole_state(name: str, in_channels: int = 3) -> dict[str, Tensor]:
    """Return the tensors of the whole model without classifier, freshly initialised (seed 0).

    They are what timm itself asks of a file, layers that are pruned here included.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state: dict[str, Tensor] = _create(name, in_channels).state_dict()
    return state


def _create(name: str, in_channels: int = 3, *, any_size: bool = False) -> Any:
    """Build the model with random weights, without classifier, for pictures of any size.

    `any_size` asks of plain transformers, too, that they take other grids than their own.
    """
    known = name.removeprefix(PREFIX)
    if not timm.is_model(known):  # also what would be a download, such as hf-hub:...
        near = difflib.get_close_matches(known, timm.list_models(), n=3, cutoff=0.5)
        hint = " or ".join(PREFIX + one for one in near)
        raise UsageError(
            f"timm has no model '{known}'." + (f" Did you mean {hint}?" if near else "")
        )
    try:
        model = _made(known, in_channels)
    except RuntimeError as error:
        raise UsageError(f"{name} cannot be built: {error}") from error
    if "strict_img_size" in inspect.signature(type(model)).parameters:
        model = _made(known, in_channels, strict_img_size=False)
    if any_size and "dynamic_img_size" in inspect.signature(type(model)).parameters:
        model = _made(known, in_channels, dynamic_img_size=True)
    return model


def _made(known: str, in_channels: int, **more: Any) -> Any:
    if in_channels != 3:  # a few families do not know the word
        more["in_chans"] = in_channels
    try:
        return timm.create_model(known, pretrained=False, num_classes=0, **more)
    except TypeError as error:
        raise UsageError(f"timm/{known} cannot be built with {sorted(more)}: {error}") from error


def _find_levels(name: str, model: Any) -> tuple[tuple[Level, Level, Level], list[int]]:
    """Find the deepest feature map of each stride; raises UsageError naming what there is."""
    info = getattr(model, "feature_info", None) or []
    maps = [(one["reduction"], one["num_chs"]) for one in getattr(info, "info", info)]
    offered = sorted({stride for stride, _ in maps})
    if not set(STRIDES) <= set(offered):
        shown = ", ".join(map(str, offered)) or "none"
        raise UsageError(
            f"{name} offers feature maps at strides {shown}, and a backbone needs 8, 16 and 32."
        )
    if not hasattr(model, "prune_intermediate_layers"):
        raise UsageError(
            f"{name} has no forward_intermediates in timm {timm.__version__}: choose another "
            f"model, or a newer timm."
        )
    indices = [max(i for i, (s, _) in enumerate(maps) if s == stride) for stride in STRIDES]
    c3, c4, c5 = (Level(*maps[index]) for index in indices)
    return (c3, c4, c5), indices


def has_parallel_branches(name: str) -> bool:
    """Tell whether a backbone has parts that C3 or C4 depends on and C5 does not.

    Then a task that looks at C5 alone leaves parameters without a gradient, which distributed
    training has to be told.
    """
    return name.startswith("timm/hrnet")


def _keep_used_parameters(model: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Turn every parameter that no output depends on into a buffer of the same name."""
    used: set[Tensor] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:  # the graph that backward would walk; its leaves hold the parameters
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            used.add(node.variable)
        waiting.extend(below for below, _ in node.next_functions)
    for module in model.modules():
        own = list(module.named_parameters(recurse=False))
        for name, parameter in own:
            if parameter.requires_grad and parameter not in used:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
