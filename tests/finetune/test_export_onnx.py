"""ONNX and torch.export against torch, on real pictures of several sizes and batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.detector import Detector, Limits, build_detector, suppress
from finetune.export_graph import ABOUT_FILE, predictor, save_torch_export
from finetune.export_onnx import check_onnx, onnx_model, require_onnx, with_suppression
from groundwork.errors import GroundworkError, UsageError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ABOUT = {"names": ["plane", "ship"], "stride": 32, "image_size": 640}
SIZES = ((1, 64, 64), (3, 96, 160), (2, 320, 256))  # pictures, height, width


def _lively(name: str, images: Tensor, **options: Any) -> Detector:
    """Build a detector whose features and logits differ from point to point of these pictures."""
    torch.manual_seed(3)
    detector = build_detector(name, 2, **options).eval()

    def measure(norm: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        # Divided by the root of the mean square: to subtract the mean of features that hardly
        # differ would leave their rounding errors alone. A bias keeps them in one range.
        square = inputs[0].square().mean((0, 2, 3))
        statistics = {"running_var": square, "bias": torch.full_like(square, 0.5)}
        norm.load_state_dict(statistics, strict=False)

    norms = [one for one in detector.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        for branch in (*detector.head.boxes, *detector.head.classes):
            assert isinstance(branch, torch.nn.Sequential)
            last = branch[-1]
            assert isinstance(last, torch.nn.Conv2d) and last.bias is not None
            last.weight.normal_(0, 2 * last.in_channels**-0.5)
            last.bias.zero_()
        backbone = detector.backbone
        mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (backbone.mean, backbone.std))
        detector((images - mean) / std)
    for hook in hooks:
        hook.remove()
    return detector


def _run(model: Any, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [torch.from_numpy(one) for one in session.run(None, {"images": images.numpy()})]


@pytest.fixture(scope="module")
def pictures(shared_data: Path) -> Callable[[int, int, int], Tensor]:
    paths = sorted((shared_data / "medical-bccd" / "images").rglob("*.jp*g"))
    paths += sorted((shared_data / "aerial-hrplanes" / "images").rglob("*.jp*g"))
    assert paths

    def load(count: int, height: int, width: int) -> Tensor:
        # From both ends: blood cells first, aeroplanes last.
        chosen = [paths[0], paths[-1], paths[1], paths[-2]][:count]
        arrays = [np.asarray(Image.open(p).convert("RGB").resize((width, height))) for p in chosen]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(255).contiguous()

    return load


# ---- suppression alone -------------------------------------------------------------------------


def _suppression(limits: Limits) -> Any:
    """Build a model that is suppression and nothing else: its input are boxes and scores."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    plain (float[batch, anchors, 4] b, float[batch, anchors, classes] s)
        => (float[batch, anchors, 4] boxes, float[batch, anchors, classes] scores)
    { boxes = Identity (b)  scores = Identity (s) }
    """
    model = with_suppression(onnx.parser.parse_model(text), ABOUT, limits)
    return onnxruntime.InferenceSession(model.SerializeToString())


def _boxes(pictures: int, anchors: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    low = 100 * torch.rand(pictures, anchors, 2, generator=generator)
    sides = 10 + 30 * torch.rand(pictures, anchors, 2, generator=generator)
    scores = torch.rand(pictures, anchors, classes, generator=generator)
    return torch.cat((low, low + sides), 2), scores


@pytest.mark.parametrize(
    "limits",
    [
        Limits(0.3, 0.5, 300),
        Limits(0.001, 0.7, 10),
        Limits(0.9, 0.1, 300),
        Limits(0.9999, 0.5, 300),  # nothing is left
    ],
)
def test_suppression_is_what_suppress_does(limits: Limits) -> None:
    boxes, scores = _boxes(3, 80, 4)
    scores[1] *= 0.5  # a picture with fewer boxes
    feed = {"b": boxes.numpy(), "s": scores.numpy()}
    rows = torch.from_numpy(_suppression(limits).run(["detections"], feed)[0])
    _same_as_suppress(rows, boxes, scores, limits)


def _same_as_suppress(rows: Tensor, boxes: Tensor, scores: Tensor, limits: Limits) -> None:
    assert rows.shape[1] == 7
    assert (rows[:, 0].diff() >= 0).all()
    for number, one in enumerate(zip(boxes, scores, strict=True)):
        wanted = suppress(*one, limits)
        found = rows[rows[:, 0] == number]
        assert len(found) == len(wanted.boxes)
        torch.testing.assert_close(found[:, 1:5], wanted.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(found[:, 5], wanted.scores, atol=1e-5, rtol=0)
        assert found[:, 6].tolist() == wanted.classes.tolist()


# ---- whole detectors ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("yolo12n", {}),
        ("timm/resnet18", {"objectness": True}),
        ("timm/convnext_atto", {}),
    ],
)
def test_onnx_gives_what_torch_gives_on_real_pictures(
    name: str, options: dict[str, Any], pictures: Callable[[int, int, int], Tensor]
) -> None:
    detector = _lively(name, pictures(*SIZES[2]), **options)
    model = onnx_model(detector, ABOUT)
    noted = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(noted["names"]) == ABOUT["names"]
    assert noted["stride"] == "32"
    sizes = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]
    found, rounding = check_onnx(model, detector)
    assert found < max(1e-4, 3 * rounding)

    module = predictor(detector)
    with torch.no_grad():  # a fifth of all scores are above the least one
        least = module(pictures(*SIZES[0]))[1].flatten().quantile(0.8).item()
    limits = Limits(round(least, 3), 0.5, 40)
    whole = with_suppression(model, ABOUT, limits)
    for size in SIZES:
        images = pictures(*size)
        with torch.no_grad():
            boxes, scores = module(images)
        found_boxes, found_scores = _run(model, images)
        torch.testing.assert_close(found_boxes, boxes, atol=0.01, rtol=0)  # pixels
        torch.testing.assert_close(found_scores, scores, atol=1e-4, rtol=0)
        # Of what onnxruntime itself found, so that rounding decides nothing.
        [rows] = _run(whole, images)
        assert len(rows)
        _same_as_suppress(rows, found_boxes, found_scores, limits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo12n", "timm/resnet18"])
def test_torch_export_gives_what_torch_gives_on_real_pictures(
    tmp_path: Path, name: str, pictures: Callable[[int, int, int], Tensor]
) -> None:
    detector = _lively(name, pictures(*SIZES[2]))
    save_torch_export(detector, tmp_path / "detector.pt2", ABOUT)
    files = {ABOUT_FILE: ""}
    loaded = torch.export.load(tmp_path / "detector.pt2", extra_files=files).module()
    assert json.loads(files[ABOUT_FILE]) == ABOUT
    module = predictor(detector)
    for size in SIZES:
        images = pictures(*size)
        with torch.no_grad():
            for found, wanted in zip(loaded(images), module(images), strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_the_graph_normalises_with_the_backbones_own_mean_and_std() -> None:
    detector = build_detector("timm/test_resnet", 2).to(memory_format=torch.channels_last).train()
    images = torch.rand(1, 3, 64, 64)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (detector.backbone.mean, detector.backbone.std)
    )
    assert mean.sum() > 0
    found, _ = predictor(detector)(images)
    assert detector.training  # what is exported is a copy
    wanted, _ = detector.eval().predict((images - mean) / std)
    torch.testing.assert_close(found, wanted)


def test_a_model_that_differs_from_torch_is_refused() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    wrong (float[N, 3, H, W] images) => (float[1, 1, 1] boxes, float[1, 1, 1] scores)
    <float[1, 1, 1] one = {1000.0}>
    { boxes = Identity (one)  scores = Identity (one) }
    """
    with pytest.raises(GroundworkError, match=r"differs from torch by .* it was not written"):
        check_onnx(onnx.parser.parse_model(text), build_detector("timm/test_resnet", 1))


def test_a_missing_extra_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs onnxscript, .*pip install onnx onnxscript"):
        require_onnx()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo12n", "timm/resnet10t"])
def test_five_channels(name: str) -> None:
    images = torch.rand((2, 5, 64, 96), generator=torch.Generator().manual_seed(0))
    detector = _lively(name, images, in_channels=5)
    assert detector.backbone.in_channels == 5
    assert len(detector.backbone.std) == 5
    model = onnx_model(detector, ABOUT)
    with torch.no_grad():
        exact = predictor(detector).double()(images.double())
    for found, wanted in zip(_run(model, images), exact, strict=True):
        assert (found - wanted).abs().max() < 1e-3 * max(1.0, float(wanted.abs().max()))
