"""The command that writes a detector, or a pretrained backbone, for others to load.

    python -m finetune.export WEIGHTS --format onnx|torch_export|ultralytics|timm|torchvision

WEIGHTS is a detector.safetensors or, for ultralytics, timm and torchvision, a
pretrained.safetensors. What is written and how it is loaded is told when it is done; the formats
are described in finetune/export_onnx.py, export_graph.py, exchange.py and export_backbone.py.
Nothing is fetched or sent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.detector import DEFAULT_LIMITS, Detector, Limits
from finetune.exchange import (
    backbone_to_ultralytics,
    from_ultralytics,
    neck_to_ultralytics,
    to_ultralytics,
)
from finetune.export_backbone import Form, to_timm, to_torchvision
from finetune.weights import About, detector_from_file
from groundwork.backbones.contract import Backbone
from groundwork.backbones.product import backbone_from_file, read_product
from groundwork.command import exit_code_of
from groundwork.errors import CheckpointError, UsageError
from groundwork.files import replacing

__all__ = ["from_ultralytics", "main", "to_ultralytics"]

_FORMATS = ("onnx", "torch_export", "ultralytics", "timm", "torchvision")
_ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2"}
_TENSORS = (".safetensors", ".pt", ".pth")
_PUBLIC_CLASSES = 80  # what yolo12n.yaml and its kind are for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 usage, 4 weights."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        _check(options)
        sys.stdout.write(_export(options))

    return exit_code_of(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.export", description="Write a detector for others to load."
    )
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="a .safetensors of ours")
    parser.add_argument("--format", required=True, choices=_FORMATS)
    parser.add_argument("--out", type=Path, help="the file (default: beside WEIGHTS)")
    parser.add_argument(
        "--image-size", type=int, help="side to note in the file (default: that of training)"
    )
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument("--nms", action="store_true", help="with non-maximum suppression inside")
    onnx.add_argument("--score", type=float, help=f"least score ({DEFAULT_LIMITS.score})")
    onnx.add_argument("--iou", type=float, help=f"largest overlap ({DEFAULT_LIMITS.iou})")
    onnx.add_argument("--most", type=int, help=f"boxes of a picture ({DEFAULT_LIMITS.most})")
    onnx.add_argument("--opset", type=int, default=18, help="of the ONNX standard (%(default)s)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Find mistakes in the flags before any file is read."""
    if options.nms and options.format != "onnx":
        raise UsageError("--nms goes with --format onnx; the other formats have raw outputs.")
    given = {name: getattr(options, name) for name in Limits._fields}
    said = {name: value for name, value in given.items() if value is not None}
    if said and not options.nms:
        names = ", ".join(f"--{name}" for name in said)
        raise UsageError(f"{names}: without --nms nothing is suppressed; add it.")
    limits: Limits = DEFAULT_LIMITS._replace(**said)
    options.limits = limits
    if options.image_size is not None and options.format not in ("onnx", "torch_export"):
        raise UsageError(f"--image-size is noted in onnx and torch_export, not {options.format}.")
    if options.opset < 18:
        raise UsageError(f"--opset {options.opset} is too old: 18 is the first that has it all.")
    if not (0 <= limits.score < 1 and 0 < limits.iou <= 1 and limits.most > 0):
        raise UsageError("--score and --iou are between 0 and 1, and --most is 1 or more.")
    if options.image_size is not None and (options.image_size < 64 or options.image_size % 32):
        raise UsageError(
            f"--image-size {options.image_size}: it must be a multiple of 32, 64 at least."
        )
    endings = (_ENDINGS[options.format],) if options.format in _ENDINGS else _TENSORS
    if options.out is not None and options.out.suffix not in endings:
        raise UsageError(f"--out {options.out}: the file must end in {' or '.join(endings)}.")
    if options.format == "onnx":
        from finetune.export_onnx import require_onnx

        require_onnx()


def _export(options: argparse.Namespace) -> str:
    """Write the file; return what to tell."""
    weights: Path = options.weights
    ending = _ENDINGS.get(options.format, ".safetensors")
    out: Path = options.out or weights.with_name(f"{weights.stem}-{options.format}{ending}")
    if out.exists() and weights.exists() and out.samefile(weights):
        raise UsageError(f"--out {out} is WEIGHTS itself: choose another name.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}.")
    if options.format == "onnx":
        return _onnx(options, out)
    if options.format == "torch_export":
        return _torch_export(options, out)
    if options.format == "ultralytics":
        return _ultralytics(weights, out)
    return _backbone_form(_backbone(weights), options.format, out)


# ---- whole detectors ---------------------------------------------------------------------------


def _onnx(options: argparse.Namespace, out: Path) -> str:
    from finetune.export_onnx import check_onnx, check_runs, onnx_model, save_onnx, with_suppression

    detector, about = detector_from_file(options.weights)
    noted = _noted(detector, about, options.image_size)
    model = onnx_model(detector, noted, opset=options.opset)
    off, rounding = check_onnx(model, detector)
    outputs = "boxes: N A 4 (left, top, right, bottom, pixels); scores: N A C"
    if options.nms:
        model = with_suppression(model, noted, options.limits)
        check_runs(model, detector)
        outputs = "detections: K 7: picture, left, top, right, bottom (pixels), score, class"
    _write(out, lambda path: save_onnx(model, path))
    return (
        f"Wrote {out}; onnxruntime is off by {off:.1e} (scores, and boxes over the side), where "
        f"torch's own rounding is {rounding:.1e}.\n  {noted['input']}\n  {outputs}\n"
    )


def _torch_export(options: argparse.Namespace, out: Path) -> str:
    from finetune.export_graph import save_torch_export

    detector, about = detector_from_file(options.weights)
    noted = _noted(detector, about, options.image_size)
    _write(out, lambda path: save_torch_export(detector, path, noted))
    return (
        f"Wrote {out}. Load it: boxes, scores = torch.export.load('{out}').module()(images)\n"
        f"  {noted['input']}\n"
    )


def _noted(detector: Detector, about: About, image_size: int | None) -> dict[str, Any]:
    """Return what is noted in the file beside the graph."""
    reading = about.reading()
    return {
        "names": list(about.names),
        "stride": 32,
        "image_size": image_size or about.image_size,
        "input": _input_of(detector),
        "bands": reading.bands,
        "value_range": reading.value_range,
        "backbone": detector.backbone.name,
    }


def _input_of(detector: Detector) -> str:
    channels = detector.backbone.in_channels
    colours = "RGB" if channels == 3 else "the bands of training"
    return (
        f"images: N {channels} H W, float32, {colours} / 255; H and W multiples of 32, 64 at least"
    )


# ---- tensors -----------------------------------------------------------------------------------


def _ultralytics(weights: Path, out: Path) -> str:
    if _is_detector(weights):
        detector, _ = detector_from_file(weights)
        tensors = to_ultralytics(detector)
        backbone = detector.backbone
        name, classes, strict = backbone.name, detector.head.num_classes, "strict=True"
        remark = ""
    else:
        backbone = backbone_from_file(weights)
        tensors = backbone_to_ultralytics(backbone)
        neck = neck_to_ultralytics(backbone, read_product(weights)[0])
        tensors |= neck
        name, classes, strict = backbone.name, _PUBLIC_CLASSES, "strict=False"
        remark = (
            "It holds backbone and neck (model.0 to model.20); model.21, the head, is missing and "
            "stays as it is there.\n"
            if neck
            else "It holds the backbone (model.0 to model.8); model.9 to model.21, neck and head, "
            "are missing and stay as they are there.\n"
        )
    _save_tensors(tensors, out)
    channels = "" if backbone.in_channels == 3 else f", ch={backbone.in_channels}"
    if classes == _PUBLIC_CLASSES and not channels:
        model = f"from ultralytics import YOLO; model = YOLO('{name}.yaml').model"
    else:
        model = (
            "from ultralytics.nn.tasks import DetectionModel; "
            f"model = DetectionModel('{name}.yaml'{channels}, nc={classes})"
        )
    return (
        f"Wrote {out}, {len(tensors)} tensors.\n{remark}Load it:\n"
        f"  {model}\n  {_reading(out)}; model.load_state_dict(tensors, {strict})\n"
    )


def _backbone_form(backbone: Backbone, kind: str, out: Path) -> str:
    form: Form = to_timm(backbone) if kind == "timm" else to_torchvision(backbone)
    _save_tensors(form.tensors, out)
    told = f"Wrote {out}, {len(form.tensors)} tensors.\n"
    if form.filled:
        told += (
            f"{len(form.filled)} of them are behind the last feature map, were not trained and "
            f"are as freshly initialised: {', '.join(form.filled)}.\n"
        )
    if kind == "timm":
        channels = "" if backbone.in_channels == 3 else f", in_chans={backbone.in_channels}"
        return told + (
            "Load it:\n"
            f"  timm.create_model('{form.name}', num_classes=0{channels}, "
            f"checkpoint_path='{out}')\n"
            f"  timm.create_model('{form.name}', features_only=True{channels}, pretrained=True, "
            f"pretrained_cfg_overlay=dict(file='{out}', num_classes=0))\n"
        )
    return told + (
        "Load it; only the classifier is missing, and stays as it is there:\n"
        f"  model = torchvision.models.{form.name}()\n"
        f"  {_reading(out)}; model.load_state_dict(tensors, strict=False)\n"
    )


def _is_detector(weights: Path) -> bool:
    return "detector" in read_product(weights)[1]


def _backbone(weights: Path) -> Backbone:
    if _is_detector(weights):
        return detector_from_file(weights)[0].backbone
    return backbone_from_file(weights)


def _reading(out: Path) -> str:
    """Return the Python that reads the file's tensors."""
    if out.suffix == ".safetensors":
        return f"from safetensors.torch import load_file; tensors = load_file('{out}')"
    return f"import torch; tensors = torch.load('{out}', weights_only=True)"


def _save_tensors(tensors: dict[str, Tensor], out: Path) -> None:
    if out.suffix == ".safetensors":
        _write(out, lambda path: save_file(tensors, path))
    else:
        _write(out, lambda path: torch.save(tensors, path))


def _write(out: Path, save: Callable[[Path], object]) -> None:
    """Save beside the place and rename, so that a reader never sees half a file."""
    try:
        with replacing(out) as unfinished:
            save(unfinished)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} could not be written ({error}): choose a folder with room that can be "
            "written to."
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
