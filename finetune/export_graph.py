"""A detector as one traced graph, from pictures between 0 and 1 to boxes and scores.

Input `images`: N C H W, float32, RGB (or other channels) divided by 255, sides multiples of 32; the
backbone's own mean and std are inside. Outputs: `boxes` N A 4 (left, top, right, bottom in pixels
of the input) and `scores` N A C in 0..1, for every anchor point, before any suppression. N, H and W
are free.

torch.export traces it (https://docs.pytorch.org/docs/stable/export.html). Two things keep the sizes
free. Sizes are symbols that are compared with nothing (`backed_size_oblivious`): otherwise every
comparison that the layout of a tensor asks for, true of the example by chance, would become a
condition on the pictures. And convolutions inside attention get their input in plain layout: in
another they would be traced for more than one picture.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from finetune.detector import Detector
from groundwork.backbones.yolo12 import AreaAttention
from groundwork.errors import UsageError

MULTIPLE = 32  # of pixels: a picture's sides
SMALLEST = 64  # pixels: shorter sides are not in the traced graph's range
ABOUT_FILE = "groundwork.json"  # inside a .pt2

_EXAMPLE = (64, 96)  # pixels, not square


class Predictor(nn.Module):
    """Pictures between 0 and 1 -> boxes and scores, with the backbone's normalisation inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        for name in ("mean", "std"):
            values = torch.tensor(getattr(detector.backbone, name)).view(-1, 1, 1)
            self.register_buffer(name, values)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """N C H W -> boxes N A 4 in pixels, scores N A C."""
        return self.detector.predict((images - self.mean) / self.std)


def predictor(detector: Detector) -> Predictor:
    """Return a copy of a detector, on the CPU in float32 and eval mode, as a Predictor."""
    detector = copy.deepcopy(detector).cpu().float().eval()
    detector.to(memory_format=torch.contiguous_format)
    return Predictor(detector).eval()


def trace(detector: Detector) -> ExportedProgram:
    """Trace a detector for any number of pictures of any sides (multiples of 32, 64 at least).

    Raises UsageError where the backbone cannot be traced so.
    """
    module = predictor(detector)
    for block in module.modules():
        if isinstance(block, AreaAttention):
            block.pe.register_forward_pre_hook(_in_plain_layout)
            block.proj.register_forward_pre_hook(_in_plain_layout)
    least = SMALLEST // MULTIPLE
    free = {
        0: Dim("batch", min=1),
        2: MULTIPLE * Dim("rows", min=least),
        3: MULTIPLE * Dim("columns", min=least),
    }
    example = torch.rand(2, detector.backbone.in_channels, *_EXAMPLE)
    tracing: Any = importlib.import_module("torch.fx.experimental._config")  # not typed
    try:
        with tracing.patch(backed_size_oblivious=True):
            return torch.export.export(module, (example,), dynamic_shapes={"images": free})
    except Exception as error:  # the tracer raises anything at all
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{detector.backbone.name} cannot be exported for pictures of any size by torch "
            f"{torch.__version__} ({reason}): choose another backbone."
        ) from error


def save_torch_export(detector: Detector, path: Path, about: Mapping[str, Any]) -> None:
    """Write a .pt2, with `about` as JSON inside it under ABOUT_FILE."""
    program = trace(detector)
    torch.export.save(program, path, extra_files={ABOUT_FILE: json.dumps(about)})


def _in_plain_layout(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].clone(memory_format=torch.contiguous_format),)
