"""What the inits of a label efficiency study are, as its --plan says (label_efficiency.py)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from groundwork.config import read_yaml
from groundwork.errors import UsageError


@dataclass(frozen=True)
class Init:
    """Where a detector starts."""

    name: str
    recipe: str | None = None  # what pretrains
    weights: Path | None = None  # made elsewhere
    minutes: float = 0.0
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    start: Init | None = None  # whose pretraining this one's begins with
    teacher: Init | None = None  # whose detector the pretraining learns from
    steps: tuple[int, ...] = ()  # lengths of its fine-tuning
    averages: tuple[float, ...] = (0.0,)  # shares of its start in what is scored: the best on val

    @property
    def labeled(self) -> bool:
        """Whether its pretraining knows labels, and so is another for each of them."""
        return self.teacher is not None or (self.start is not None and self.start.labeled)


def inits_of(options: argparse.Namespace, data: Path) -> list[Init]:
    """Read what each named init is for this data set. Raises UsageError for an unknown key."""
    plan = {} if options.plan is None else read_yaml(options.plan)
    common = tuple(plan.get("finetune", ())) + tuple(options.finetune)

    def init_of(name: str, pupils: tuple[str, ...] = ()) -> Init:
        entry = dict(plan.get("inits", {}).get(name, {}))
        for key, value in entry.items():
            if isinstance(value, dict):
                if data.name not in value:
                    raise UsageError(
                        f"{options.plan}: {name}.{key} is given for {', '.join(value)}, not for "
                        f"{data.name}: add it, or give one value for all sets."
                    )
                entry[key] = value[data.name]
        given = entry.pop("average", 0.0)
        averages = tuple(map(float, given if isinstance(given, list) else [given])) or (0.0,)
        known = {key.name for key in fields(Init)} - {"name", "averages"}
        if unknown := set(entry) - known:
            raise UsageError(f"{options.plan}: {name} has unknown key(s) {', '.join(unknown)}.")
        others = {}
        for role, does in (("start", "begins with"), ("teacher", "is taught by")):
            other = entry.get(role)
            if other in (*pupils, name):
                raise UsageError(f"{options.plan}: {name} {does} itself, through {other}.")
            others[role] = None if other is None else init_of(other, (*pupils, name))
        scratch = name.startswith("scratch")
        weights = Path(entry["weights"]) if "weights" in entry else None
        minutes = float(entry.get("minutes", 0.0 if scratch else options.pretrain_minutes))
        if scratch and any(averages):
            raise UsageError(f"{options.plan}: {name}: average is about a start, it has none.")
        if None not in others.values():
            raise UsageError(f"{options.plan}: {name}: its teacher is its start: give one of them.")
        if (start := others["start"]) is not None and not (start.recipe or start.weights):
            raise UsageError(f"{options.plan}: {name}: {start.name} has no file to start from.")
        return Init(
            name,
            None if scratch or weights is not None else str(entry.get("recipe", name)),
            weights,
            minutes,
            tuple(options.pretrain) + tuple(entry.get("pretrain", ())),
            common + tuple(entry.get("finetune", ())),
            others["start"],
            others["teacher"],
            tuple(entry.get("steps", options.steps)),
            averages,
        )

    return [init_of(name) for name in options.inits]
