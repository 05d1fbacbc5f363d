"""A detector's one file, detector.safetensors, and starting weights for a detector from any file.

The file is written by groundwork.backbones.product: tensors `backbone.*`, `neck.*`, `head.*`, and
metadata that says how to build the detector again (`detector`), which classes it knows (`names`),
and for which side of picture it was trained (`image_size`). A pretrained.safetensors whose task
trained all of a detector (self_training) has the same, and is read as one.

A start is taken from what a file holds of five parts: backbone, neck, and the head's branches for
boxes, classes and objectness. Each of them has to fit, or nothing is taken. Names are matched as
groundwork.backbones.load does it, and YOLOv12's public names are known (finetune/exchange.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from finetune.detector import Detector, build_detector
from finetune.exchange import from_ultralytics
from groundwork.backbones.load import (
    BRANCHES,
    CLASS_BRANCH,
    ENOUGH,
    InitReport,
    advice,
    fit,
    fit_backbone,
    other_classes,
    refuse_other_channels,
    report_of,
    take,
    unwrap,
)
from groundwork.backbones.product import read_product, read_tensors, save_product
from groundwork.backbones.yolo12 import YOLO12
from groundwork.data.reading import Reading, stated_by
from groundwork.errors import CheckpointError, UsageError

Taken = Literal["all", "neck", "backbone"]


@dataclass(frozen=True)
class About:
    """What a detector's file says of it."""

    names: tuple[str, ...]
    image_size: int
    metadata: Mapping[str, Any]

    def reading(self) -> Reading:
        """Return how pictures were read in training: bands and values, of any size."""
        return _reading_of(self.metadata)


def _reading_of(metadata: Mapping[str, Any]) -> Reading:
    data = dict(metadata.get("recipe") or {}).get("data", {})
    return stated_by(data.get("bands"), data.get("value_range"))


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
    save_product(path, parts, {**metadata, **about_detector(parts, names, image_size)})


def about_detector(
    parts: Mapping[str, nn.Module], names: Sequence[str], image_size: int
) -> dict[str, Any]:
    """Return what a file has to say of a detector for it to be built again: metadata."""
    neck, head = parts["neck"], parts["head"]
    made = {
        "num_classes": head.num_classes,
        "width": neck.letter,
        "objectness": head.objectness is not None,
    }
    return {"detector": made, "names": list(names), "image_size": image_size}


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
        in_channels=int(metadata.get("in_channels", 3)),
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


def check_channels(detector: Detector, reading: Reading) -> None:
    """Raise UsageError where pictures are read with other channels than the detector sees."""
    wanted = detector.backbone.in_channels
    if reading.channels != wanted:
        stated = "none" if reading.bands is None else ", ".join(map(str, reading.bands))
        raise UsageError(
            f"The detector sees {wanted} channels and the pictures would have {reading.channels} "
            f"(bands: {stated}): name {wanted} bands, or leave them as in training."
        )


# The parts of a detector that a file may hold one without the other; the backbone it must hold.
_PARTS = {
    "neck": ("neck.",),
    **{name: tuple(f"head.{start}" for start in starts) for name, starts in BRANCHES.items()},
}
_TAKEN = {"all": frozenset(_PARTS), "neck": frozenset({"neck"}), "backbone": frozenset[str]()}
_LAST_BIAS = "head.classes.0.2.bias"  # as long as there are classes


@dataclass(frozen=True)
class DetectorInit:
    """What a file gave a detector: a report for each part it holds, and a sentence for the rest."""

    path: Path
    parts: tuple[InitReport, ...]
    left: tuple[str, ...]
    reading: Reading | None = None  # how its pictures were read, where the file says so

    @property
    def loaded(self) -> frozenset[str]:
        """The parts that have the file's weights: backbone, neck, head's box branch, ..."""
        return frozenset(report.part for report in self.parts)

    def sentence(self) -> str:
        """Say it for a person, one sentence a part."""
        said = [f"{report.account()}." for report in self.parts] + list(self.left)
        return f"Loaded from {self.path}: {' '.join(said)}"


def load_init(
    detector: Detector,
    path: str | Path,
    take_parts: Taken = "all",
    classes: Sequence[str] | None = None,
) -> DetectorInit:
    """Give a detector what a file holds of it: safetensors, or a torch file without code in it.

    The file may be a pretrained.safetensors (backbone, and neck where one was trained), a
    detector.safetensors, a checkpoint of the timm model, or YOLOv12's tensors under their public
    names. The class branch is taken where the number of classes is the same, and where their names
    are, as far as the file has names and `classes` says the detector's. BatchNorm statistics
    come with the weights. Of `take_parts` "neck" takes backbone and neck, "backbone" nothing more.

    Raises CheckpointError where the file cannot be read, has no backbone, fits less than 90 % of
    the tensors of a part that it holds (BatchNorm counters do not count), or holds numbers that
    are not finite; the detector is then as it was.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if isinstance(detector.backbone, YOLO12):
        tensors = from_ultralytics(tensors)
    own = dict(detector.state_dict())
    body, body_tensors, chosen = _choose(detector, own, tensors)
    spread = _by_part(own, tensors)
    inner = dict(detector.backbone.state_dict())
    rest = body_tensors if body_tensors is not tensors else spread["backbone"]
    channels = detector.backbone.in_channels
    refuse_other_channels(path, inner, body_tensors, body, channels)
    reports = [report_of(path, inner, rest, body)]
    left = []
    for part in _PARTS:
        names = {name: own[name] for name in own if _part(name) == part}
        keys = spread.get(part, {})
        reason = _not_taken(part, names, keys, own)
        if reason is None and part == CLASS_BRANCH:
            reason = other_classes((metadata or {}).get("names"), classes)
        if reason is None and part not in _TAKEN[take_parts]:
            reason = f"The {part} is left as initialised (detector.take={take_parts})."
        if reason is None:
            fitted = {name: key for name, key in chosen.items() if name in names}
            reports.append(report_of(path, names, keys, fitted, part))
            continue
        if reason:
            left.append(reason)
        chosen = {name: key for name, key in chosen.items() if name not in names}
    for report in reports:
        if report.share < ENOUGH:
            raise CheckpointError(_refusal(report, detector, metadata))
    taken = {f"backbone.{name}": body_tensors[key] for name, key in body.items()}
    taken |= {name: tensors[key] for name, key in chosen.items()}
    take(own, taken, {name: name for name in taken}, path)
    read = _reading_of(metadata) if metadata is not None and metadata.get("recipe") else None
    return DetectorInit(path, tuple(reports), tuple(left), read)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a file's tensors and metadata; of a pickled YOLO model, say how to get at them."""
    try:
        return read_tensors(path)
    except CheckpointError as error:
        if "ultralytics" not in str(error.__cause__):
            raise
        plain = f"{path.stem}_tensors.pt"
        raise CheckpointError(
            f"{path} is a pickled model, which can run code and is not read: save its tensors "
            f"where it was made, by `torch.save(YOLO('{path.name}').model.state_dict(), "
            f"'{plain}')`, and start from {plain}."
        ) from error


def _choose(
    detector: Detector, own: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor], dict[str, str]]:
    """Map names to the file's: the backbone's (and in which tensors), and those of neck and head.

    Both are of one network of the file: a whole detector, or where more of the backbone fits so, a
    backbone alone.
    """
    channels = detector.backbone.in_channels
    whole = fit(own, tensors, channels)
    of_backbone = "backbone."
    body = {n.removeprefix(of_backbone): k for n, k in whole.items() if n.startswith(of_backbone)}
    rest = {name: key for name, key in whole.items() if not name.startswith(of_backbone)}
    inner = dict(detector.backbone.state_dict())
    alone, converted = fit_backbone(detector.backbone, inner, tensors, channels)
    if len(alone) > len(body):
        return alone, converted, {}
    return body, tensors, rest


def _by_part(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Sort a file's tensors by the part they belong to; what is of none counts as backbone."""
    spread: dict[str, dict[str, Tensor]] = {"backbone": {}}
    for key, value in tensors.items():
        spread.setdefault(_part(unwrap(key, own)[0]), {})[key] = value
    return spread


def _part(name: str) -> str:
    return next((part for part, starts in _PARTS.items() if name.startswith(starts)), "backbone")


def _not_taken(
    part: str,
    names: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str | None:
    """Say why a part is left as initialised; None: it is to be taken, "": there is no such part."""
    if not names:
        return f"The file's {len(keys)} tensors of the {part} are not wanted." if keys else ""
    if not keys:
        return f"The {part} is not in the file and left as initialised."
    if part == CLASS_BRANCH:
        there = next((v for k, v in keys.items() if unwrap(k, own)[0] == _LAST_BIAS), None)
        here = own[_LAST_BIAS]
        if there is not None and there.shape != here.shape:
            return (
                f"The {part} is left as initialised: the file's is for {len(there)} classes, "
                f"this one for {len(here)}."
            )
    return None


def _refusal(report: InitReport, detector: Detector, metadata: Mapping[str, Any] | None) -> str:
    name = detector.backbone.name
    if report.part == "backbone":
        return report.refusal(name, advice(name, metadata))
    letter = detector.neck.letter
    made = (metadata or {}).get("detector") or {}
    said = made.get("width")
    todo = (
        f"The file says that its width is {said}: set detector.width={said}."
        if said and said != letter
        else "Set backbone.name and detector.width to what the file was made with."
    )
    return report.refusal(f"the {report.part} of {name} with width {letter}", todo)
