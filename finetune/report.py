"""What a person looks at: one HTML page for a fine-tuning.

    python -m finetune.report RUN [--out page.html]

The page has everything in it and asks for nothing else: figures by class, which class is taken for
which, curves, what training saw, held-out pictures with what is labeled and what is found, the
recipe and the machine. It can be written while a run goes on, and is written at its end.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.detector import Detector
from finetune.draw import as_image, draw_boxes, sheet_of
from finetune.finder import DetectorFinder, frame_of, show, whole_of
from finetune.metrics import CONFUSION_SCORE, FIGURES
from finetune.plots import confusion_of
from finetune.recipe import Recipe, build
from finetune.sets import open_sets
from finetune.weights import detector_from_file
from groundwork.config import read_yaml
from groundwork.data.labels import LabeledSamples
from groundwork.errors import GroundworkError
from groundwork.page import (
    check_run,
    curves,
    drawing,
    embedded,
    read_json,
    read_metrics,
    sheet,
    table,
    write_page,
)

logger = logging.getLogger("finetune.report")

_CURVES = ("train/", "eval/", "optim/lr", "speed/images_per_second")
_LOOKED_AT = 8  # held-out pictures on the page
_SIDE = 480  # of one, pixels


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder and return its path (report.html in the folder).

    What is missing is left out with a sentence: weights of a run that goes on, data that is not
    here any more. Raises UsageError where the folder is no run folder.
    """
    check_run(run)
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
        held_out = sets.val or sets.test
        try:
            if held_out is None:
                return "<p>Not shown: no picture is held out.</p>"
            rows = _pictures(detector, about.image_size, held_out, results.get("per_class", {}))
        finally:
            sets.close()
    except GroundworkError as error:
        return f"<p>Not shown: {error}</p>"
    labeled, found = (sheet_of(one) for one in zip(*rows, strict=True))
    return sheet(labeled, "labels", "What is labeled") + sheet(
        found, "found", "What is found, with the score of the best F1 of its class or more"
    )


def _pictures(
    detector: Detector,
    image_size: int,
    held_out: LabeledSamples,
    per_class: Mapping[str, Mapping[str, float | None]],
) -> list[tuple[Image.Image, Image.Image]]:
    """Draw some pictures of a set, evenly over it: labels, and what is found."""
    finder = DetectorFinder(detector)
    names = held_out.names
    known = [per_class.get(name, {}).get("f1_score") for name in names]
    least = np.array([CONFUSION_SCORE if one is None else one for one in known])
    places = [(s, i) for s, size in enumerate(held_out.shard_sizes) for i in range(int(size))]
    drawn = []
    for place in places[:: -(-len(places) // _LOOKED_AT)]:
        _, picture, labels = held_out.look(*place)
        frame = frame_of(picture.width, picture.height, image_size)
        [found] = finder(show(picture, whole_of(picture), frame)[None])
        kept = found.scores >= least[found.classes]
        boxes = frame.undo(found.boxes[kept])
        scale = _SIDE / max(picture.width, picture.height)
        sides = (round(picture.height * scale), round(picture.width * scale))
        image = as_image(picture.cut([whole_of(picture)], sides)[0])
        crowded = np.where(labels.crowd, ~labels.classes, labels.classes)
        drawn.append(
            (
                draw_boxes(image, labels.boxes * scale, crowded, names),
                draw_boxes(image, boxes * scale, found.classes[kept], names, found.scores[kept]),
            )
        )
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m finetune.report")
    parser.add_argument("run", type=Path, help="a run folder of fine-tuning")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    options = parser.parse_args(arguments)
    try:
        logger.info("%s", write_report(options.run, options.out))
        return 0
    except GroundworkError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
