"""Starting weights for a backbone from whatever file a person has, with an account of what fitted.

Four kinds of file are understood: a `pretrained.safetensors` of ours, a plain state dict of one of
our backbones, a timm checkpoint, and the state dict of something that has the backbone inside (a
wrapped model, a teacher). Names are matched after wrappers' prefixes are taken off. The first layer
of a file that was made on RGB is widened for a backbone of another number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from groundwork.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from groundwork.backbones.contract import Backbone
    from groundwork.backbones.from_timm import TimmTeacher

WRAPPERS = ("module.", "_orig_mod.", "backbone.", "teacher.", "encoder.", "model.")
ENOUGH = 0.9  # of the backbone's tensors; below, the file is of something else

_COUNTER = "num_batches_tracked"  # BatchNorm's counter: many files lack it, and nothing reads it


@dataclass(frozen=True)
class InitReport:
    """What a file gave a part of a network, the backbone unless another is named.

    `matched` and `missing` are the part's names, `unexpected` are the file's. `reshaped` says
    of those missing that the file has in another shape which shape that is.
    """

    path: Path
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, str] = field(default_factory=dict)
    part: str = "backbone"
    widened: tuple[str, ...] = ()  # the file's, made for RGB, brought to the backbone's channels

    @property
    def share(self) -> float:
        """The matched tensors' share of the part's, 0 to 1."""
        return len(self.matched) / max(1, len(self.matched) + len(self.missing))

    def sentence(self) -> str:
        """Say it for a person, with the file's name."""
        return f"Loaded from {self.path}: {self.account()}."

    def account(self) -> str:
        """Say how many tensors were matched, missing and unexpected, and which."""
        total = len(self.matched) + len(self.missing)
        said = [
            f"{len(self.matched)} of {total} tensors of the {self.part} ({_percent(self.share)})"
        ]
        if self.missing:
            said.append(f"{len(self.missing)} missing, left as initialised ({self._missing()})")
        if self.unexpected:
            said.append(f"{len(self.unexpected)} not wanted ({_some(self.unexpected)})")
        if self.widened:
            said.append(f"brought from RGB to the channels here: {_some(list(self.widened))}")
        return "; ".join(said)

    def refusal(self, name: str, advice: str, needed: float = ENOUGH) -> str:
        """Say why this is too little for `name`, which wants a share `needed`, and what to do."""
        total = len(self.matched) + len(self.missing)
        sentence = (
            f"{self.path} fits {name} in {len(self.matched)} of {total} tensors "
            f"({_percent(self.share)}), and {_percent(needed)} are needed; missing are "
            f"{self._missing()}"
        )
        if self.unexpected:
            sentence += f"; the file has instead {_some(self.unexpected)}"
        return f"{sentence}. {advice}"

    def _missing(self) -> str:
        return _some([f"{name}{self.reshaped.get(name, '')}" for name in self.missing])


def load_init(backbone: Backbone, path: str | Path) -> InitReport:
    """Give a backbone the tensors of a file: safetensors, or a torch file without code in it.

    A torch file may hold the tensors under 'state_dict' or 'model' (or, preferred as timm prefers
    them, their averaged versions 'state_dict_ema', 'model_ema'). A first layer that was made for
    RGB is brought to the backbone's channels. The prefixes in WRAPPERS are taken off, repeatedly.
    Where several networks in the file fit, say a student and its teacher, the one
    that fits best is taken whole. Older timm names are converted as timm does it.

    Raises CheckpointError where the file cannot be read, where less than 90 % of the backbone's
    tensors are in it by name and shape (BatchNorm counters do not count), where it was made for
    another number of channels that is not RGB's, or where what is in it is not finite; the backbone
    is then as it was.
    """
    from groundwork.backbones.product import read_tensors

    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata is not None:  # a file of ours: neck and head have their own account
        tensors = {k: v for k, v in tensors.items() if k.startswith("backbone.")}
    own = dict(backbone.state_dict())
    channels = backbone.in_channels
    chosen, tensors = fit_backbone(backbone, own, tensors, channels)
    refuse_other_channels(path, own, tensors, chosen, channels)
    report = report_of(path, own, tensors, chosen)
    if report.share < ENOUGH:
        raise CheckpointError(report.refusal(backbone.name, advice(backbone.name, metadata)))
    take(own, tensors, chosen, path)
    return report


# A head's branches, one of which a file may hold without the others.
CLASS_BRANCH = "head's class branch"
BRANCHES = {
    "head's box branch": ("boxes.", "bins"),
    CLASS_BRANCH: ("classes.",),
    "head's objectness branch": ("objectness.",),
}


def load_parts(
    parts: Mapping[str, nn.Module], path: str | Path, classes: Sequence[str] | None = None
) -> list[str]:
    """Give a task's neck and head what a file of ours holds of them; say it, a sentence for each.

    A neck or a branch of a head that has another width stays as initialised, and so does a class
    branch for other classes, where `classes` says the task's. Raises CheckpointError where the
    file cannot be read, or what is taken is not finite.
    """
    from groundwork.backbones.product import read_tensors

    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata is None:
        return []
    said = []
    for part, module in parts.items():
        if part == "backbone":
            continue
        whole = dict(module.state_dict())
        for name, starts in (BRANCHES if part == "head" else {part: ("",)}).items():
            own = {key: value for key, value in whole.items() if key.startswith(starts)}
            if not own:
                continue
            inside = tuple(f"{part}.{start}" for start in starts)
            theirs = {
                k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(inside)
            }
            reason = None
            if name == CLASS_BRANCH and theirs:
                reason = other_classes(metadata.get("names"), classes)
            said.append(reason or _take_branch(name, own, theirs, path))
    return said


def other_classes(there: Sequence[str] | None, here: Sequence[str] | None) -> str | None:
    """Say that a class branch is for other classes, or for these in another order."""
    if there is None or here is None or list(there) == list(here):
        return None
    return (
        f"The {CLASS_BRANCH} is left as initialised: the file's classes are {', '.join(there)}, "
        f"and these are {', '.join(here)}."
    )


def _take_branch(
    name: str, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: Path
) -> str:
    """Take one part of a network, or leave it, and say which."""
    if not theirs:
        return f"The {name} is not in the file and left as initialised."
    chosen = {key: key for key in own if key in theirs and _alike(own, theirs, key)}
    report = report_of(path, own, theirs, chosen, name)
    if report.share < 1:
        return (
            f"The {name} is left as initialised: the file's is of another width "
            f"({report.account()})."
        )
    take(own, theirs, chosen, path)
    return f"{report.account()}."


def _alike(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str) -> bool:
    return own[name].shape == theirs[name].shape


def fit_backbone(
    backbone: Backbone | TimmTeacher,
    own: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    channels: int = 3,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map the backbone's names to the file's; return the file's tensors too, or timm's conversion.

    Only the tensors of older timm models are converted, and only where more of them then fit. A
    first layer of RGB fits any number of `channels`: `take` brings it to them.
    """
    chosen = fit(own, tensors, channels)
    if len(chosen) < len(own) and backbone.name.startswith("timm/"):
        return _fit_older(backbone, own, tensors, chosen, channels)
    return chosen, tensors


def take(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], chosen: Mapping[str, str], path: Path
) -> None:
    """Copy the chosen tensors of the file `path` into `own`, all or none.

    A first layer of RGB is brought to the channels of `own` as timm does it: for one channel the
    three are added up, for others they are repeated, red after blue, and scaled by three over
    their number.

    Raises CheckpointError, before any is copied, where one holds a number that is not finite.
    """
    bad = [name for name, key in chosen.items() if not tensors[key].isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path} holds numbers that are not finite, in {_some(bad)}: its training diverged, "
            f"so use an earlier file."
        )
    for name, key in chosen.items():
        value = tensors[key]
        if value.shape != own[name].shape:
            from groundwork.backbones.from_timm import widened

            value = widened(value, own[name].shape[1])
        own[name].detach().copy_(value)  # in place: type and memory format stay


def advice(name: str, metadata: Mapping[str, object] | None) -> str:
    """Say what to do about a file that does not fit the backbone `name`, from its metadata."""
    said = (metadata or {}).get("backbone")
    if isinstance(said, str) and said != name:
        return f"The file says that it holds {said}: set backbone.name={said}."
    return "Set backbone.name to what the file was made with, or leave out --init."


def fit(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], channels: int = 3
) -> dict[str, str]:
    """Map a network's names to the file's, from the one network in the file that fits best.

    A convolution on RGB fits one on `channels`.
    """
    networks: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, wrapper = unwrap(key, own)
        if name in own and (
            own[name].shape == tensors[key].shape
            or _other_channels(own[name], tensors[key], channels) == 3
        ):
            networks.setdefault(wrapper, {})[name] = key
    # The most tensors; of equals the one with the shortest prefix.
    best = max(networks, key=lambda wrapper: (len(networks[wrapper]), -len(wrapper)), default="")
    return networks.get(best, {})


def refuse_other_channels(
    path: Path,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    chosen: Mapping[str, str],
    channels: int,
) -> None:
    """Raise CheckpointError for a first layer that would stay as initialised, made for others."""
    for key, value in tensors.items():
        name = unwrap(key, own)[0]
        if name in own and name not in chosen:
            made_for = _other_channels(own[name], value, channels)
            if made_for is not None:
                raise CheckpointError(
                    f"{path} was made for pictures of {made_for} channels ({key}) and those here "
                    f"have {channels}: name as many data.bands as it was made for (three without)."
                )


def _other_channels(own: Tensor, found: Tensor, channels: int) -> int | None:
    """Return the inputs of a convolution that differs from one on `channels` in these alone."""
    if own.dim() != 4 or found.dim() != 4 or own.shape[1] != channels:
        return None
    same = own.shape[0] == found.shape[0] and own.shape[2:] == found.shape[2:]
    return found.shape[1] if same and found.shape[1] != channels else None


def unwrap(key: str, own: Mapping[str, Tensor]) -> tuple[str, str]:
    """Take prefixes off until the name is one of the network's; return it and what was taken."""
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
    backbone: Backbone | TimmTeacher,
    own: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    chosen: dict[str, str],
    channels: int,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Try timm's conversion of older names; return the better of both mappings and its tensors."""
    from groundwork.backbones.from_timm import TimmBackbone, TimmTeacher, convert

    assert isinstance(backbone, TimmBackbone | TimmTeacher)
    plain = {unwrap(key, own)[0].removeprefix("model."): value for key, value in tensors.items()}
    converted = convert(backbone, plain)
    if converted is not None:
        better = fit(own, converted, channels)
        if len(better) > len(chosen):
            return better, converted
    return chosen, tensors


def report_of(
    path: Path,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    chosen: Mapping[str, str],
    part: str = "backbone",
) -> InitReport:
    """Tell what of `own` was chosen from the file's tensors and what was not, both ways."""
    counted = [name for name in own if not name.endswith(_COUNTER)]
    used = set(chosen.values())
    left = [key for key in tensors if key not in used and not key.endswith(_COUNTER)]
    reshaped = {}
    for key in left:
        name, _ = unwrap(key, own)
        if name in own and name not in chosen:
            here, there = (_shape(one) for one in (own[name], tensors[key]))
            reshaped[name] = f" is {there} in the file and {here} here"
    return InitReport(
        path=path,
        matched=[name for name in counted if name in chosen],
        missing=[name for name in counted if name not in chosen],
        unexpected=left,
        reshaped=reshaped,
        widened=tuple(key for name, key in chosen.items() if own[name].shape != tensors[key].shape),
        part=part,
    )


def _percent(share: float) -> str:
    return f"{int(share * 1000) / 10:g} %"  # rounded down: 89.99 % is not enough


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
