"""What a person looks at: one HTML page for a fine-tuning.

    python -m finetune.report RUN [--out page.html]

The page has everything in it and asks for nothing else: figures by class, which class is taken for
which, curves, what training saw, held-out pictures with what is labeled and what is found, the
recipe and the machine. It can be written while a run goes on, and is written at its end.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.detector import Detector
from finetune.draw import draw_boxes, draw_labels, scaled, sheet_of
from finetune.evaluate import class_numbers
from finetune.finder import DetectorFinder, frame_of, show
from finetune.metrics import CONFUSION_SCORE, FIGURES
from finetune.plots import confusion_of
from finetune.recipe import Recipe, build
from finetune.sets import open_sets
from finetune.weights import About, detector_from_file
from groundwork.config import read_yaml
from groundwork.data.labels import LabeledSamples
from groundwork.data.shards import evenly
from groundwork.errors import GroundworkError
from groundwork.page import (
    check_run,
    curves,
    drawing,
    embedded,
    read_json,
    read_metrics,
    run_command,
    sheet,
    table,
    write_page,
)

_CURVES = ("train/", "eval/", "optim/lr", "speed/images_per_second")
_LOOKED_AT = 8  # held-out pictures on the page
_SIDE = 480  # of one, pixels


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder and return its path (report.html in the folder).

    What is missing is left out with a sentence: weights of a run that goes on, data that is not
    here any more. Raises UsageError where the folder is no run folder.
    """
    check_run(run, "finetune")
    recipe = build(read_yaml(run / "recipe.yaml"))
    results = read_json(run / "results.json")
    sections = {
        "How good it is": _figures(results),
        "Curves": curves(read_metrics(run / "metrics.jsonl"), _CURVES),
        "What training saw": _seen(run / "pictures" / "step-0.png"),
        "What it finds": _found(run, recipe, results),
    }
    return write_page(run, f"A detector on {recipe.backbone.name}", sections, out)


def _figures(results: Mapping[str, Any]) -> str:
    """Return the figures of the sets that were scored, by class those of the first."""
    if not results:
        return "<p>Not scored yet, or nothing is held out: see the curves.</p>"
    sets = {str(results["split"]): results}
    sets |= {name: results[name] for name in ("val", "test") if name in results}
    rows = [(name, *(_number(one[name]) for one in sets.values())) for name in FIGURES]
    counted = [(name, *(str(one[name]) for one in sets.values())) for name in ("pictures", "boxes")]
    classes = [
        (
            name,
            *(_number(one.get(key)) for key in ("ap", "ap50")),
            str(one["boxes"]),
            *(_number(one.get(key)) for key in ("f1", "f1_score")),
        )
        for name, one in results["per_class"].items()
    ]
    confusion = confusion_of(np.array(results["confusion"], np.int64), list(results["per_class"]))
    return (
        table(("", *sets), [*counted, *rows])
        + f"<h3>By class, {results['split']}</h3>"
        + table(("", "AP", "AP50", "boxes", "best F1", "at score"), classes)
        + drawing(confusion, "confusion", "Which class is found for which")
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seen(file: Path) -> str:
    if not file.is_file():
        return "<p>No pictures yet.</p>"
    caption = "Pictures and boxes as the first batch had them"
    return embedded("image/png", file.read_bytes(), "batch", caption)


def _found(run: Path, recipe: Recipe, results: Mapping[str, Any]) -> str:
    """Return held-out pictures with their labels, and below with what the detector finds."""
    try:
        detector, about = detector_from_file(run / "detector.safetensors")
        sets = open_sets(recipe)
        try:
            held_out, split = (sets.test, "test") if sets.val is None else (sets.val, "val")
            if not held_out:
                return "<p>Not shown: no picture is held out.</p>"
            scored = results if results.get("split") == split else results.get(split, {})
            rows = _pictures(detector, about, held_out, scored.get("per_class", {}))
        finally:
            sets.close()
    except GroundworkError as error:
        return f"<p>Not shown: {html.escape(str(error))}</p>"
    labeled, found = (sheet_of(one) for one in zip(*rows, strict=True))
    least = f"{CONFUSION_SCORE} where that is not known"
    return sheet(labeled, "labels", f"What is labeled ({split})") + sheet(
        found, "found", f"What is found, with the score of its class's best F1 or more ({least})"
    )


def _pictures(
    detector: Detector,
    about: About,
    held_out: LabeledSamples,
    per_class: Mapping[str, Mapping[str, float | None]],
) -> list[tuple[Image.Image, Image.Image]]:
    """Draw some pictures of a set, evenly over it: labels, and what is found.

    Raises DataError where a picture cannot be read, or the classes are not the detector's.
    """
    class_numbers(held_out.name, held_out.names, about.names)
    finder = DetectorFinder(detector)
    known = [per_class.get(name, {}).get("f1_score") for name in about.names]
    least = np.array([CONFUSION_SCORE if one is None else one for one in known])
    drawn = []
    for place in evenly(held_out.shard_sizes, _LOOKED_AT):
        _, picture, labels = held_out.look(*place)
        frame = frame_of(picture.width, picture.height, about.image_size)
        [found] = finder(show(picture, picture.whole, frame)[None])
        kept = found.scores >= least[found.classes]
        boxes, classes, scores = frame.undo(found.boxes[kept]), found.classes[kept], found.scores
        image, scale = scaled(picture, _SIDE)
        drawn.append(
            (
                draw_labels(image, scale, labels, held_out.names),
                draw_boxes(image, boxes * scale, classes, about.names, scores[kept]),
            )
        )
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("finetune", write_report, arguments)


if __name__ == "__main__":
    sys.exit(main())
