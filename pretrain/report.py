"""What a person looks at: one HTML page for a run, and the sheets of pictures it is made of.

    python -m pretrain.report RUN [--out page.html]

The page has everything in it and asks for nothing else: curves, what a probe found, what the task
saw and did (puzzles, holes filled), the features' main directions as colours, nearest neighbours,
the recipe and the machine. It can be written while a run goes on, and is written at its end.
"""

from __future__ import annotations

import contextlib
import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from groundwork import colour
from groundwork.backbones import build_backbone
from groundwork.backbones.contract import Backbone
from groundwork.backbones.product import backbone_from_file
from groundwork.checkpoint import latest
from groundwork.config import read_yaml
from groundwork.data.samples import open_samples
from groundwork.errors import CheckpointError, GroundworkError
from groundwork.page import (
    check_run,
    curves,
    embedded,
    read_metrics,
    run_command,
    sheet,
    table,
    write_page,
)
from pretrain.probe_pictures import read_unlabeled
from pretrain.recipe import Recipe, build
from pretrain.report_pictures import look

GAP = 4  # pixels of white between pictures
_LOOKED_AT = 128  # pictures among which neighbours are looked for
_SIDE = 160  # of a picture on the page, pixels
# Curves worth a plot of their own, by the beginning of their names; the rest are in metrics.jsonl.
_CURVES = ("train/", "probe/", "optim/lr", "speed/images_per_second")
_OF_BACKBONE = re.compile(r"((?:tasks\.[^.]+\.)?)backbone\.(.+)")
_SHEET = re.compile(r"step-(\d+)-(.+)\.png")


def sheet_of(pictures: Tensor, columns: int = 8) -> Image.Image:
    """Lay uint8 N 3 H W pictures side by side."""
    n, _, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8
    )
    for i, picture in enumerate(pictures.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def save_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Write uint8 N 3 H W pictures side by side as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(pictures, columns).save(path)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder and return its path (report.html in the folder).

    What is missing is left out with a sentence: weights of a run that has only begun, data that is
    not here any more. Raises UsageError where the folder is no pretraining run.
    """
    check_run(run, "pretrain")
    recipe = build(read_yaml(run / "recipe.yaml"))
    lines = read_metrics(run / "metrics.jsonl")
    sections = {
        "Before and after": _changes(lines),
        "Curves": curves(lines, _CURVES),
        "What the task sees and does": _sheets(run / "pictures"),
        "What the features see": _features(run, recipe),
    }
    return write_page(run, f"{recipe.task_name} on {recipe.backbone.name}", sections, out)


def _changes(lines: Sequence[Mapping[str, float]]) -> str:
    """Return a table of the first and last value of the loss and of everything that was probed."""
    rows = []
    names = sorted({name for line in lines for name in line if name.startswith("probe/")})
    for name in ["train/loss", *names]:
        # What was not finite is written as null.
        values = [value for line in lines if (value := line.get(name)) is not None]
        if values:
            rows.append((name, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    return table(("", "first", "last"), rows)


def _sheets(folder: Path) -> str:
    """Return the first and the last sheet of every kind of picture."""
    found: dict[str, dict[int, Path]] = {}
    for file in folder.glob("step-*.png") if folder.is_dir() else ():
        if match := _SHEET.fullmatch(file.name):
            found.setdefault(match[2], {})[int(match[1])] = file
    if not found:
        return "<p>No pictures yet.</p>"
    figures = []
    for name, files in sorted(found.items()):
        first, last = files[min(files)].read_bytes(), files[max(files)].read_bytes()
        if first == last:  # views, which no network is in
            figures.append(embedded("image/png", first, name, name))
            continue
        figures.append(embedded("image/png", first, name, f"{name}, step {min(files)}"))
        figures.append(embedded("image/png", last, name, f"{name}, step {max(files)}"))
    return "".join(figures)


def _features(run: Path, recipe: Recipe) -> str:
    """Return colours of the features' main directions, and nearest neighbours."""
    try:
        backbone, note = _backbone(run, recipe)
        cache, cache_bytes = recipe.data.cache_folder(), recipe.data.cache_bytes()
        samples = open_samples(recipe.data.train, cache=cache, cache_bytes=cache_bytes)
        pixels = read_unlabeled(samples, _LOOKED_AT, _SIDE, recipe.data.reading()).pixels
        samples.close()
    except GroundworkError as error:
        return f"<p>Not shown: {html.escape(str(error))}</p>"
    return note + features_shown(backbone, pixels)


def _backbone(run: Path, recipe: Recipe) -> tuple[Backbone, str]:
    """Return what a run keeps, or of one that goes on what its newest checkpoint has; and a note.

    Raises GroundworkError where there is neither.
    """
    product = run / "pretrained.safetensors"
    saved = None if product.is_file() else latest(run / "checkpoints")
    if saved is None:
        return backbone_from_file(product), ""
    backbone = build_backbone(recipe.backbone.name, recipe.data.reading().channels)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.tensors.get("task", {}).items():
        if match := _OF_BACKBONE.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = tensor
    for tensors in found.values():  # of several tasks all have the same
        with contextlib.suppress(RuntimeError):
            backbone.load_state_dict(tensors)
            return backbone, f"<p>Of the checkpoint of step {saved.step}: the run goes on.</p>"
    raise CheckpointError(f"{saved.path} holds no {recipe.backbone.name}.")


def features_shown(backbone: Backbone, pixels: Tensor) -> str:
    """Return HTML: what a backbone makes of uint8 N side side C."""
    seen = look(backbone, pixels)
    figures = [_sheet(seen.pictures, "pictures", "Pictures of the training set")]
    for name, colours in seen.levels.items():
        caption = f"{name}: the three main directions of its cells as red, green and blue"
        figures.append(_sheet(colours, name, caption))
    rows = seen.neighbours
    pictures = colour.shown(pixels)[rows.flatten()]
    caption = "Nearest neighbours by pooled C5: a picture, and the ones most like it"
    figures.append(_sheet(pictures, "neighbours", caption, columns=rows.shape[1]))
    return "".join(figures)


def _sheet(pictures: Tensor, name: str, caption: str, columns: int = 8) -> str:
    return sheet(sheet_of(pictures, columns), name, caption)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("pretrain", write_report, arguments)


if __name__ == "__main__":
    sys.exit(main())
