"""Starting weights for a backbone from whatever file a person has, with an account of what fitted.

Four kinds of file are understood: a `pretrained.safetensors` of ours, a plain state dict of one of
our backbones, a timm checkpoint, and the state dict of something that has the backbone inside (a
wrapped model, a teacher). Names are matched after wrappers' prefixes are taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from groundwork.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from groundwork.backbones.contract import Backbone

WRAPPERS = ("module.", "_orig_mod.", "backbone.", "teacher.", "encoder.", "model.")
ENOUGH = 0.9  # of the backbone's tensors; below, the file is of something else

_COUNTER = "num_batches_tracked"  # BatchNorm's counter: many files lack it, and nothing reads it


@dataclass(frozen=True)
class InitReport:
    """What a file gave a backbone.

    `matched` and `missing` are the backbone's names, `unexpected` are the file's. `reshaped` says
    of those missing that the file has in another shape which shape that is.
    """

    path: Path
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The matched tensors' share of the backbone's, 0 to 1."""
        return len(self.matched) / max(1, len(self.matched) + len(self.missing))

    def sentence(self) -> str:
        """Say it for a person."""
        total = len(self.matched) + len(self.missing)
        said = [f"{len(self.matched)} of {total} tensors of the backbone ({_percent(self.share)})"]
        if self.missing:
            said.append(f"{len(self.missing)} missing, left as initialised ({self._missing()})")
        if self.unexpected:
            said.append(f"{len(self.unexpected)} not wanted ({_some(self.unexpected)})")
        return f"Loaded from {self.path}: {'; '.join(said)}."

    def _missing(self) -> str:
        return _some([f"{name}{self.reshaped.get(name, '')}" for name in self.missing])


def load_init(backbone: Backbone, path: str | Path) -> InitReport:
    """Give a backbone the tensors of a file: safetensors, or a torch file without code in it.

    A torch file may hold the tensors under 'state_dict' or 'model' (or, preferred as timm prefers
    them, their averaged versions 'state_dict_ema', 'model_ema'). The prefixes in WRAPPERS are taken
    off, repeatedly. Where several networks in the file fit, say a student and its teacher, the one
    that fits best is taken whole. Older timm names are converted as timm does it.

    Raises CheckpointError where the file cannot be read, where less than 90 % of the backbone's
    tensors are in it by name and shape (BatchNorm counters do not count), or where what is in it
    is not finite; the backbone is then as it was.
    """
    from groundwork.backbones.product import read_tensors

    path = Path(path)
    tensors, metadata = read_tensors(path)
    own = dict(backbone.state_dict())
    chosen = _fit(own, tensors)
    if len(chosen) < len(own) and backbone.name.startswith("timm/"):
        chosen, tensors = _fit_older(backbone, own, tensors, chosen)
    report = _report(path, own, tensors, chosen)
    if report.share < ENOUGH:
        raise CheckpointError(_refusal(report, backbone.name, (metadata or {}).get("backbone")))
    bad = [name for name, key in chosen.items() if not tensors[key].isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path} holds numbers that are not finite, in {_some(bad)}: its training diverged, "
            f"so use an earlier file."
        )
    for name, key in chosen.items():
        own[name].detach().copy_(tensors[key])  # in place: type and memory format stay
    return report


def _fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the backbone's names to the file's, from the one network in the file that fits best."""
    networks: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, wrapper = _unwrap(key, own)
        if name in own and own[name].shape == tensors[key].shape:
            networks.setdefault(wrapper, {})[name] = key
    # The most tensors; of equals the one with the shortest prefix.
    best = max(networks, key=lambda wrapper: (len(networks[wrapper]), -len(wrapper)), default="")
    return networks.get(best, {})


def _unwrap(key: str, own: Mapping[str, Tensor]) -> tuple[str, str]:
    """Take prefixes off until the name is one of the backbone's; return it and what was taken."""
    name = key
    while True:
        if name in own:
            break
        if f"model.{name}" in own:  # timm's own names stand below `model.` here
            return f"model.{name}", key.removesuffix(name)
        prefix = next((one for one in WRAPPERS if name.startswith(one)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name, key.removesuffix(name)


def _fit_older(
    backbone: Backbone,
    own: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    chosen: dict[str, str],
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Try timm's conversion of older names; return the better of both mappings and its tensors."""
    from groundwork.backbones.from_timm import TimmBackbone, convert

    assert isinstance(backbone, TimmBackbone)
    plain = {_unwrap(key, own)[0].removeprefix("model."): value for key, value in tensors.items()}
    converted = convert(backbone, plain)
    if converted is not None:
        better = _fit(own, converted)
        if len(better) > len(chosen):
            return better, converted
    return chosen, tensors


def _report(
    path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], chosen: Mapping[str, str]
) -> InitReport:
    counted = [name for name in own if not name.endswith(_COUNTER)]
    used = set(chosen.values())
    left = [key for key in tensors if key not in used and not key.endswith(_COUNTER)]
    reshaped = {}
    for key in left:
        name, _ = _unwrap(key, own)
        if name in own and name not in chosen:
            here, there = (_shape(one) for one in (own[name], tensors[key]))
            reshaped[name] = f" is {there} in the file and {here} here"
    return InitReport(
        path=path,
        matched=[name for name in counted if name in chosen],
        missing=[name for name in counted if name not in chosen],
        unexpected=left,
        reshaped=reshaped,
    )


def _refusal(report: InitReport, name: str, said: object) -> str:
    total = len(report.matched) + len(report.missing)
    sentence = (
        f"{report.path} fits {name} in {len(report.matched)} of {total} tensors "
        f"({_percent(report.share)}), and {_percent(ENOUGH)} are needed; missing are "
        f"{report._missing()}"
    )
    if report.unexpected:
        sentence += f"; the file has instead {_some(report.unexpected)}"
    if isinstance(said, str) and said != name:
        return f"{sentence}. The file says that it holds {said}: set backbone.name={said}."
    return f"{sentence}. Set backbone.name to what the file was made with, or leave out --init."


def _percent(share: float) -> str:
    return f"{int(share * 1000) / 10:g} %"  # rounded down: 89.99 % is not enough


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
