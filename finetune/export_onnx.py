"""A detector as an ONNX model, with or without non-maximum suppression, checked by onnxruntime.

The traced graph of finetune/export_graph.py is translated by torch.onnx, with its input and outputs
as they are said there. With suppression the outputs become one, `detections`, K 7: the number of
the picture in the batch, left, top, right, bottom in pixels, score, class; picture after picture,
best first. It is ONNX's own NonMaxSuppression, class by class, then the best of each picture: the
result of finetune.detector.suppress, except that there is no limit on the candidates (there the
best 30,000 of a picture).

`metadata_props` say `names` (JSON), `stride`, `image_size`, `input` and `backbone`.

onnx, onnxscript and onnxruntime come with the extra `export`, and are imported when asked for.
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.detector import DEFAULT_LIMITS, Detector, Limits
from finetune.export_graph import SMALLEST, predictor, trace
from groundwork.errors import GroundworkError, UsageError

OPSET = 18  # of the ONNX standard; everything here is in it
ALLOWED = 1e-3  # of a score, and of a box's side over the picture's, between ONNX and torch

# What follows the network where suppression is asked for, in ONNX's own text form.
_SUPPRESSION = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
suppression (float[batch, anchors, 4] raw_boxes, float[batch, anchors, classes] raw_scores)
    => (float[found, 7] detections)
<int64[1] most = {{{most}}}, float[1] iou = {{{iou:.8f}}}, float[1] score = {{{score:.8f}}},
 int64 zero = {{0}}, int64 one = {{1}}, int64[1] zeros = {{0}}, int64[1] ones = {{1}},
 double two = {{2.0}}>
{{
    class_scores = Transpose <perm = [0, 2, 1]> (raw_scores)
    kept = NonMaxSuppression (raw_boxes, class_scores, most, iou, score)
    kept_scores = GatherND (class_scores, kept)
    picture, class, anchor = Split <axis = 1, num_outputs = 3> (kept)
    place = Concat <axis = 1> (picture, anchor)
    kept_boxes = GatherND (raw_boxes, place)
    score_column = Unsqueeze (kept_scores, ones)
    picture_float = Cast <to = 1> (picture)
    class_float = Cast <to = 1> (class)
    rows = Concat <axis = 1> (picture_float, kept_boxes, score_column, class_float)

    flat_picture = Squeeze (picture, ones)
    picture_double = Cast <to = 11> (flat_picture)
    score_double = Cast <to = 11> (kept_scores)
    behind = Mul (picture_double, two)
    key = Sub (score_double, behind)
    count = Shape (key)
    _, order = TopK <axis = 0, largest = 1, sorted = 1> (key, count)
    sorted_rows = Gather <axis = 0> (rows, order)
    sorted_picture = Gather <axis = 0> (flat_picture, order)

    batch_size = Shape <start = 0, end = 1> (raw_boxes)
    batch_scalar = Squeeze (batch_size, zeros)
    pictures = Range (zero, batch_scalar, one)
    column = Unsqueeze (sorted_picture, ones)
    belongs = Equal (column, pictures)
    belongs_number = Cast <to = 7> (belongs)
    of_each = ReduceSum <keepdims = 0> (belongs_number, zeros)
    starts = CumSum <exclusive = 1> (of_each, zero)
    start = Gather <axis = 0> (starts, sorted_picture)
    count_scalar = Squeeze (count, zeros)
    position = Range (zero, count_scalar, one)
    rank = Sub (position, start)
    among_best = Less (rank, most)
    detections = Compress <axis = 0> (sorted_rows, among_best)
}}
"""


def onnx_model(detector: Detector, about: Mapping[str, Any], *, opset: int = OPSET) -> Any:
    """Return a ModelProto without suppression; `about` becomes its metadata.

    Raises UsageError where onnx or onnxscript is not installed, or the backbone cannot be traced.
    """
    onnx = _import("onnx")
    _import("onnxscript")
    program = trace(detector)
    # The exporter tells its progress on standard output, and its own deprecations.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["boxes", "scores"],
            external_data=False,
        )
    assert exported is not None
    model: Any = exported.model_proto
    _name_sizes(model)
    _note(model, about)
    onnx.checker.check_model(model)
    return model


def with_suppression(model: Any, about: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> Any:
    """Put non-maximum suppression behind a model, as finetune.detector.suppress does it."""
    onnx = _import("onnx")
    opset = next(one.version for one in model.opset_import if not one.domain)
    text = _SUPPRESSION.format(ir=model.ir_version, opset=opset, **limits._asdict())
    joins = [("boxes", "raw_boxes"), ("scores", "raw_scores")]
    joined = onnx.compose.merge_models(model, onnx.parser.parse_model(text), io_map=joins)
    _note(joined, {**about, **limits._asdict()})
    onnx.checker.check_model(joined)
    return joined


def save_onnx(model: Any, path: Path) -> None:
    """Write the model as one file."""
    _import("onnx").save(model, path)


def check_onnx(model: Any, detector: Detector) -> tuple[float, float]:
    """Run a model without suppression on two batches; return how far it is off, and how far torch.

    Off is the largest difference of scores, and of boxes over the picture's side, from what torch
    finds in float64; torch's own is that of float32, which is rounding alone. Raises
    GroundworkError where the model is off by more than ALLOWED and by more than a few times torch's
    own, UsageError where onnxruntime is not installed.
    """
    runtime = _import("onnxruntime")
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    module = predictor(detector)
    exact = predictor(detector).double()
    worst = rounding = 0.0
    channels = detector.backbone.in_channels
    for shape in (
        (1, channels, 2 * SMALLEST, 3 * SMALLEST),
        (2, channels, SMALLEST, SMALLEST),
    ):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = exact(images.double())
            plain = module(images)
        found = [torch.from_numpy(one) for one in session.run(None, {"images": images.numpy()})]
        worst = max(worst, _difference(found, wanted, max(shape)))
        rounding = max(rounding, _difference(plain, wanted, max(shape)))
    if not worst <= max(ALLOWED, 4 * rounding):
        raise GroundworkError(
            f"The ONNX model differs from torch by {worst:.1e}, and {ALLOWED:.0e} is allowed: it "
            "was not written; try another version of torch or onnxscript. (A detector that was "
            "trained for a few steps only may change by as much from rounding: train it first.)"
        )
    return worst, rounding


def check_runs(model: Any, detector: Detector) -> None:
    """Run a model with suppression on two pictures. Raises GroundworkError where it does not run.

    What it finds is compared with torch in tests: boxes that nearly tie may be told in either way.
    """
    runtime = _import("onnxruntime")
    shape = (2, detector.backbone.in_channels, 2 * SMALLEST, 3 * SMALLEST)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).numpy()
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        [found] = session.run(None, {"images": images})
    except Exception as error:  # onnxruntime has no common class of its own
        raise GroundworkError(
            f"The ONNX model with suppression does not run ({error}): it was not written. Export "
            "it without --nms, or try another version of onnxruntime."
        ) from error
    if found.ndim != 2 or found.shape[1] != 7:
        raise GroundworkError(f"The ONNX model with suppression gives {found.shape}, not K x 7.")


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor], side: int) -> float:
    boxes, scores = ((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    return max(boxes / side, scores)


def require_onnx() -> None:
    """Raise UsageError, before anything is done, where the extra is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _import(name)


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"Export to ONNX needs {name}, which is not installed: run "
            "`pip install onnx onnxscript onnxruntime`."
        ) from error
    if name == "onnx":
        for part in ("checker", "compose", "helper", "parser"):
            importlib.import_module(f"onnx.{part}")
    return module


def _name_sizes(model: Any) -> None:
    """Call the free sizes of input and outputs what they are."""
    wanted = {
        "images": {0: "batch", 2: "height", 3: "width"},
        "boxes": {0: "batch", 1: "anchors"},
        "scores": {0: "batch", 1: "anchors"},
    }
    for value in (*model.graph.input, *model.graph.output):
        for place, name in wanted[value.name].items():
            value.type.tensor_type.shape.dim[place].dim_param = name


def _note(model: Any, about: Mapping[str, Any]) -> None:
    values = {key: _text(value) for key, value in about.items()}
    _import("onnx").helper.set_model_props(model, values)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
