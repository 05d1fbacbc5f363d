"""YOLOv12 here and in ultralytics: same tensors in, same numbers out, in both directions.

    python -m benchmarks.ultralytics_parity --python OTHER_ENVIRONMENT/bin/python

ultralytics (AGPL-3.0) is installed in an environment of its own and called as a program; nothing of
it is imported or read here. For every scale it builds a random model, in which weights and
BatchNorm statistics are drawn anew, and runs it on a random picture. Its tensors are loaded here
through the names of finetune/exchange.py, every one of them, and the raw logits of each anchor
point and the decoded boxes are compared. Then a random detector of ours is loaded there with
strict=True, and compared again.

Weights are drawn so that features keep a spread near 1: the differences can then be read as they
are. One JSON object is written for each scale; the command fails where a logit differs by more
than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.detector import Detector, build_detector
from finetune.exchange import from_ultralytics, to_ultralytics

ALLOWED = 1e-4  # of a logit, float32

# The other program: `theirs` makes a random model's tensors, `ours` loads those of a file; both
# write what the model makes of the picture.
_PEER = """
import sys
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics import YOLO, __version__
folder, scale, classes, whose = sys.argv[1:]
if classes == "80":
    model = YOLO(f"yolo12{scale}.yaml").model
else:
    model = DetectionModel(f"yolo12{scale}.yaml", nc=int(classes), verbose=False)
start = torch.load(f"{folder}/{whose}.pt", weights_only=True)
if whose == "ours":
    model.load_state_dict(start, strict=True)
else:
    exec(open(f"{folder}/fill.py").read())
    fill(model, 1, torch.load(f"{folder}/picture.pt", weights_only=True))
    torch.save(dict(model.state_dict()), f"{folder}/theirs.pt")
picture = torch.load(f"{folder}/picture.pt", weights_only=True)
for name, type_ in (("float32", torch.float32), ("float64", torch.float64)):
    with torch.no_grad():
        decoded, raw = model.eval().to(type_)(picture.to(type_))
    found = {"decoded": decoded, "boxes": raw["boxes"], "classes": raw["scores"]}
    torch.save(found, f"{folder}/{name}.pt")
print(__version__)
"""

# What both programs fill their models with: a function of the module and a seed.
_FILL = '''
import torch
from torch import nn


def fill(model, seed, picture):
    """Draw all weights, and BatchNorm statistics near those that the picture has."""
    torch.manual_seed(seed)

    def measure(norm, inputs):
        spread, mean = torch.std_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean + 0.2 * spread * torch.randn_like(mean))
        norm.running_var.copy_(spread.square() * (0.7 + 0.6 * torch.rand_like(spread)) + 1e-3)

    for name, parameter in model.named_parameters():
        if parameter.dim() == 4 and "dfl" not in name:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        elif name.endswith("gamma"):
            parameter.data.uniform_(0.1, 1)
        elif name.endswith("bn.weight"):
            parameter.data.uniform_(0.5, 1.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model.eval()(picture)
    for hook in hooks:
        hook.remove()
'''


def compare(python: str, letter: str, classes: int) -> dict[str, Any]:
    """Compare one scale in both directions; returns the largest differences."""
    detector = build_detector(f"yolo12{letter}", classes)
    picture = random_picture()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(picture, folder / "picture.pt")
        (folder / "fill.py").write_text(_FILL, encoding="utf-8")
        torch.save({}, folder / "theirs.pt")
        version = _run(python, folder, letter, classes, "theirs")
        theirs = torch.load(folder / "theirs.pt", weights_only=True)
        detector.load_state_dict(from_ultralytics(theirs), strict=True)
        from_there = differences(detector, picture, folder)

        filler: dict[str, Any] = {}
        exec(_FILL, filler)
        filler["fill"](detector, 2, picture)
        ours = to_ultralytics(detector)
        torch.save(ours, folder / "ours.pt")
        _run(python, folder, letter, classes, "ours")
        to_there = differences(detector, picture, folder)
    return {
        "scale": letter,
        "classes": classes,
        "ultralytics": version,
        "tensors": len(theirs),
        "same_names": set(theirs) == set(ours),
        "parameters": sum(p.numel() for p in detector.parameters()),
        "from_there": from_there,
        "to_there": to_there,
    }


def random_picture() -> Tensor:
    """Return smooth noise and fine noise, 2 3 96 128: of fine noise alone, nothing is left deep in
    a network but differences that are too small to compare.
    """
    torch.manual_seed(0)
    coarse = functional.interpolate(torch.rand(2, 3, 6, 8), scale_factor=16.0, mode="bilinear")
    return 0.8 * coarse + 0.2 * torch.rand_like(coarse)


@torch.no_grad()
def differences(detector: Detector, picture: Tensor, folder: Path) -> dict[str, float]:
    """Return the largest differences of logits, boxes (pixels) and scores, and logits' spreads."""
    found = torch.load(folder / "float32.pt", weights_only=True)
    raw = detector.eval()(picture)
    boxes, scores = detector.predict(picture)
    middle, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    decoded = found["decoded"].transpose(1, 2)

    def largest(first: Tensor, second: Tensor) -> float:
        return (first - second).abs().max().item()

    told = {
        "box_logits": largest(raw.boxes, found["boxes"].transpose(1, 2)),
        "class_logits": largest(raw.classes, found["classes"].transpose(1, 2)),
        "boxes": largest(torch.cat((middle, sides), -1), decoded[..., :4]),
        "scores": largest(scores, decoded[..., 4:]),
        "box_logits_spread": raw.boxes.std().item(),
        "class_logits_spread": raw.classes.std().item(),
    }
    # Without rounding, what is left would be a difference of structure.
    exact = torch.load(folder / "float64.pt", weights_only=True)
    raw = detector.double()(picture.double())
    detector.float()
    told["box_logits_float64"] = largest(raw.boxes, exact["boxes"].transpose(1, 2))
    told["class_logits_float64"] = largest(raw.classes, exact["classes"].transpose(1, 2))
    return told


def _run(python: str, folder: Path, letter: str, classes: int, whose: str) -> str:
    """Run the other program; return the version it names."""
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(folder),
        "YOLO_CONFIG_DIR": str(folder),
        "YOLO_OFFLINE": "true",
    }
    done = subprocess.run(
        [python, "-c", _PEER, str(folder), letter, str(classes), whose],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{python} failed on yolo12{letter}:\n{done.stderr}")
    return done.stdout.split()[-1]


def main() -> None:
    """Compare the scales that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the interpreter that has ultralytics")
    parser.add_argument("--scales", default="nsmlx", help="letters of n s m l x")
    parser.add_argument("--classes", type=int, default=80)
    options = parser.parse_args()
    worst = 0.0
    for letter in options.scales:
        found = compare(options.python, letter, options.classes)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
        for way in ("from_there", "to_there"):
            worst = max(worst, found[way]["box_logits"], found[way]["class_logits"])
    if worst > ALLOWED:
        raise SystemExit(f"A logit differs by {worst:.1e}, and {ALLOWED:.0e} is allowed.")


if __name__ == "__main__":
    main()
