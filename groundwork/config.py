"""A recipe: a pydantic model <- YAML <- key=value, strictly.

Three layers and no more: defaults in the model, what a YAML file says differs, what the command
line says differs. An unknown key, a wrong type or an impossible value is a UsageError that names
the full key and the nearest one that exists. Nothing here imports torch: a mistake is told at once.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from groundwork.errors import UsageError


class Section(BaseModel):
    """One section of a recipe: frozen, strict about types, and without room for unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also reads 1e-3 as a number (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML that holds plain data only; raises UsageError naming `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UsageError(f"{where} is not readable YAML: {problem}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one recipe file into a nested dict; raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Recipe {path} cannot be read: {error}") from error
    values = parse_yaml(text, f"Recipe {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"Recipe {path} must hold keys and values, not a {type(values).__name__}.")
    return values


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=1` arguments into a nested dict; values are YAML. Raises UsageError."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise UsageError(
                f"'{argument}' is not understood: write key=value, such as optim.lr=0.001."
            )
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UsageError(f"'{argument}' sets a key below {section}, which has a value.")
        node[leaf] = parse_yaml(text, f"The value of '{key}'")
    return values


def merge(
    base: Mapping[str, Any], top: Mapping[str, Any], whole: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Lay `top` over `base`, key by key; the sections named in `whole` are replaced as one.

    A budget is such a section: exactly one of its keys may be set, so that a person who sets
    budget.epochs does not have to unset the recipe's budget.minutes.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and key not in whole:
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def validate(model: type[SectionT], values: Mapping[str, Any], prefix: str = "") -> SectionT:
    """Build the model from plain values; `prefix` goes before every key that is named.

    Raises UsageError naming every wrong key in full, its value, and the nearest key that exists.
    """
    try:
        # JSON mode lets a strict model take a YAML list for a tuple and a string for a path.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [_sentence(model, dict(one), prefix) for one in error.errors()]
        raise UsageError("\n".join(problems)) from error
    except TypeError as error:  # json.dumps: a date, for example
        raise UsageError(f"A value of the recipe is of no usable type: {error}.") from error


def starting_from(default: BaseModel) -> BeforeValidator:
    """Let a recipe that sets one key of a section keep `default` in the others.

    Pydantic would fill them with the section's own defaults, which may be others.
    """

    def fill(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # JSON has lists only, and strict models take tuples: they are lists no more by now.
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        return default.model_dump() | given

    return BeforeValidator(fill)


def to_yaml(model: BaseModel) -> str:
    """Write the resolved recipe, every key with its value, as YAML that can be read again.

    What is its own comes first, and then what it shares with others.
    """
    values = model.model_dump(mode="json")
    own = {key: values[key] for key in type(model).__annotations__ if key in values}
    return yaml.safe_dump(own | values, sort_keys=False, allow_unicode=True)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ' Did you mean x?' for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _sentence(model: type[BaseModel], error: dict[str, Any], prefix: str) -> str:
    key = prefix + ".".join(str(part) for part in error["loc"])
    shown = error.get("input")
    if error["type"] == "extra_forbidden":
        while isinstance(shown, dict) and shown:  # name what was set, not its section
            leaf, shown = next(iter(shown.items()))
            key += f".{leaf}"
        known = [prefix + name for name in keys_of(model)]
        beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        deeper = [name for name in known if name.endswith(f".{key}")]  # lr for optim.lr
        hint = f" Did you mean {' or '.join(deeper)}?" if deeper else ""
        hint = hint or nearest(key, beside) or nearest(key, known)
        if not hint and beside:
            hint = f" Known keys here: {', '.join(sorted(beside))}."
        return f"Unknown key {key}.{hint}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message else "is not valid"
    message += "" if message.endswith(("?", ".")) else "."
    if not key:
        return f"The recipe is not valid: {message}"
    if isinstance(shown, dict):
        return f"{key}: {message}"
    return f"{key}={shown}: {message}"


def keys_of(model: type[BaseModel]) -> list[str]:
    """List every key of a model in full, sections and leaves, in the order of the file."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names.extend(f"{name}.{below}" for below in keys_of(kind))
    return names


def find_recipe(name: str, stage: str) -> Path:
    """Return the path of a recipe given by path or by its name in recipes/<stage>."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return Path(name)
    folder = Path(str(resources.files("recipes"))) / stage
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        raise UsageError(
            f"There is no recipe '{name}'; these are: {', '.join(known)}." + nearest(name, known)
        )
    return path


def changes_on_resume(
    old: BaseModel, new: BaseModel, fixed: tuple[str, ...], free: tuple[str, ...] = ()
) -> list[str]:
    """Compare the recipe of a checkpoint with the one asked for on resume.

    Returns a line for every harmless change; raises UsageError for a key that begins with one of
    `fixed` and is not in `free`, which would make another model or another order of the data.
    """
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    names = [line.split(":")[0] for line in changed]
    refused = [
        line
        for name, line in zip(names, changed, strict=True)
        if name.startswith(fixed) and name not in free
    ]
    # Steps are counted: with another batch the same count is another part of these.
    counted = next((k for k in ("epochs", "samples") if after.get(f"budget.{k}") is not None), None)
    if counted is not None and "batch_size" in names:
        raise UsageError(
            f"A resumed run cannot change batch_size while budget.{counted} is set, since steps so "
            "far were of another size: give budget.steps=N, all steps from the beginning."
        )
    if refused:
        raise UsageError(
            "A resumed run cannot change "
            + "; ".join(refused)
            + ". Start a new run with --init instead."
        )
    return changed


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves.update(_leaves(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves
