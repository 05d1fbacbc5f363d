"""Optimisers: built by timm from a recipe's section, and kept in a checkpoint without pickle.

AdamW (arXiv 1711.05101), SGD with momentum, LARS (arXiv 1708.03888) and LAMB (arXiv 1904.00962).
Two kinds of group: weights that decay, and the rest (norms, biases, other one-dimensional
parameters, and what a module's own `no_weight_decay()` names), which neither decay nor are adapted
by layer, as BYOL and SimCLR train with LARS (arXiv 2006.07733, appendix J; arXiv 2002.05709,
section B.2). Each kind has one group for every learning rate that a module's `lr_scales()` asks.

Differs from timm's factory:
- It adapts by layer where weight decay is not zero; here it is so for every weight of the first
  group, so that weight_decay=0 does not silently turn LARS into SGD and LAMB into Adam.
- It asks the outermost module alone for `no_weight_decay()`; here each module inside is asked.
- `sgd` has Nesterov momentum only when asked for.
- (As timm has it, and unlike arXiv 1708.03888, a rate that changes acts on LARS's whole momentum.)
- LAMB's own clipping to a gradient norm of 1 is off: `clip` says the limit for every optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from groundwork.errors import CheckpointError, UsageError
from groundwork.settings import Optimiser

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# What timm calls the ones we offer: its "sgd" has Nesterov momentum, its "momentum" has not.
TIMM_NAMES = {"adamw": "adamw", "sgd": "momentum", "lars": "lars", "lamb": "lamb"}


def build_optimizer(config: Optimiser, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of the model's trainable parameters, in the order the model names them.

    Each group has `lr_scale`, which `set_learning_rate` multiplies with. Raises UsageError where
    nothing is trainable.
    """
    excluded = undecayed(model)
    scales = learning_rate_scales(model)
    # The order of the groups is that of their first use, decayed before undecayed.
    chosen: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (name not in excluded) is decays:
                chosen.setdefault((decays, scales.get(name, 1.0)), []).append(parameter)
    if not chosen:
        raise UsageError(
            "The model has no trainable parameter: at least one part must be unfrozen."
        )
    groups: list[dict[str, Any]] = []
    for (decays, scale), parameters in chosen.items():
        group: dict[str, Any] = {"params": parameters, "lr_scale": scale}
        group["weight_decay"] = config.weight_decay if decays else 0.0
        if config.name in ("lars", "lamb"):
            group["always_adapt"] = decays
        groups.append(group)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=TIMM_NAMES[config.name], lr=config.lr, **_arguments(config)
    )
    return optimizer


def undecayed(model: nn.Module) -> frozenset[str]:
    """Name the parameters that weight decay and layer-wise adaptation leave alone."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        inside = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) or parameter.ndim <= 1 or name == "bias":
                names.add(inside + name)
        own = getattr(module, "no_weight_decay", None)
        if callable(own):
            names.update(inside + name for name in own())
    return frozenset(names)


def learning_rate_scales(model: nn.Module) -> dict[str, float]:
    """Name the parameters whose learning rate is not the common one, with the factor.

    A module says so by `lr_scales()`, names below itself to factors; an outer module's word holds.
    """
    scales: dict[str, float] = {}
    for prefix, module in reversed(list(model.named_modules())):
        own = getattr(module, "lr_scales", None)
        if callable(own):
            inside = f"{prefix}." if prefix else ""
            scales.update({inside + name: float(scale) for name, scale in own().items()})
    return scales


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate, times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def state_to_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state into tensors by name and a dict that JSON can hold; nothing is copied.

    Tensors are `state.<index>.<name>`, the index counting parameters over all groups, and
    `group.<index>.<name>` (LAMB counts steps by group). Hyper-parameters are not state: they come
    from the recipe again.
    """
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, state in whole["state"].items():
        _split(f"state.{index}", state, tensors, values)
    for index, group in enumerate(whole["param_groups"]):
        moving = {name: value for name, value in group.items() if isinstance(value, Tensor)}
        _split(f"group.{index}", moving, tensors, values)
    info = {
        "optimizer": type(optimizer).__name__,
        "shapes": [
            [list(one.shape) for one in group["params"]] for group in optimizer.param_groups
        ],
        "values": values,
    }
    return tensors, info


def state_from_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Put back what `state_to_tensors` gave, into a fresh optimizer of the same model.

    Tensors as large as their parameter take its device and memory format, so that sums run in the
    same order as before. Raises CheckpointError where optimizer or parameters are not the same.
    """
    parameters = _check_same(optimizer, info)
    state: dict[int, dict[str, Any]] = {}
    whole = optimizer.state_dict()
    for key, value in [*tensors.items(), *info["values"].items()]:
        kind, index, name = _parse(key)
        if kind == "group":
            groups = whole["param_groups"]
            if index >= len(groups):
                raise CheckpointError(
                    f"The optimizer's state names a group {index} of {len(groups)}."
                )
            groups[index][name] = value.clone() if isinstance(value, Tensor) else value
            continue
        if index >= len(parameters):
            raise CheckpointError(
                f"The optimizer's state names parameter {index}; the model has {len(parameters)}."
            )
        if isinstance(value, Tensor):
            like = parameters[index]
            value = torch.empty_like(like).copy_(value) if _as(value, like) else value.clone()
        state.setdefault(index, {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _arguments(config: Optimiser) -> dict[str, Any]:
    """Pick what this optimizer understands."""
    if config.name == "sgd":
        return {"momentum": config.momentum, "nesterov": config.nesterov}
    arguments: dict[str, Any] = {} if config.eps is None else {"eps": config.eps}
    if config.name == "lars":
        return arguments | {
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "trust_coeff": config.trust,
        }
    arguments["betas"] = config.betas
    if config.name == "lamb":
        arguments["max_grad_norm"] = None
    return arguments


def _split(
    prefix: str, state: Mapping[str, Any], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{name}"] = value
        elif value is None or isinstance(value, bool | int | float | str):
            values[f"{prefix}.{name}"] = value
        else:
            raise CheckpointError(
                f"The optimizer keeps {name} as a {type(value).__name__}, which cannot be saved."
            )


def _check_same(
    optimizer: torch.optim.Optimizer, info: Mapping[str, Any]
) -> list[torch.nn.Parameter]:
    own = type(optimizer).__name__
    if info.get("optimizer") != own:
        raise CheckpointError(
            f"The checkpoint's optimizer is {info.get('optimizer')}, the recipe asks for {own}."
        )
    groups = [group["params"] for group in optimizer.param_groups]
    shapes = [[list(one.shape) for one in group] for group in groups]
    if info.get("shapes") != shapes:
        raise CheckpointError(
            "The checkpoint's optimizer was of other parameters than the model has now; "
            "resume with the recipe that the run was started with."
        )
    return [one for group in groups for one in group]


def _parse(key: str) -> tuple[str, int, str]:
    kind, _, rest = key.partition(".")
    index, _, name = rest.partition(".")
    if kind not in ("state", "group") or not index.isdigit() or not name:
        raise CheckpointError(f"The optimizer's state has an entry {key!r} of unknown meaning.")
    return kind, int(index), name


def _as(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape and value.dtype == parameter.dtype and value.ndim > 0
