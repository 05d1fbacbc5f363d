"""Precision over recall, and which class is taken for which, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.metrics import CONFUSION_IOU, CONFUSION_SCORE, Results

_LEGEND = 20  # classes that still have a line of their own
_COUNTS = 25  # classes whose cells have room for a number
_NAMED = 40  # classes that have room for their names; the others are told by their numbers
_LARGEST = 20.0  # inches of a side: what is drawn is held in memory as pixels


def save_curves(results: Results, names: Sequence[str], path: Path) -> None:
    """Draw precision over recall at IoU 0.5, a line a class and their mean."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    known = [n for n in range(len(names)) if results.precision[n].min() >= 0]
    for number in known[:_LEGEND]:
        ap50 = results.per_class[names[number]]["ap50"]
        label = f"{_plain(names[number])} {ap50:.3f}"
        axes.plot(results.recall, results.precision[number], label=label)
    if known:
        mean = results.precision[known].mean(axis=0)
        label = f"mean of {len(known)} {mean.mean():.3f}"
        axes.plot(results.recall, mean, color="black", linewidth=2.5, label=label)
        axes.legend(title="AP50")
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("Precision over recall at IoU 0.5")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")


def _plain(name: str) -> str:
    """Return a name as matplotlib writes it, and not as a formula."""
    return name.replace("$", r"\$")


def save_confusion(results: Results, names: Sequence[str], path: Path) -> None:
    """Draw confusion_of a set's counts, as a file."""
    figure = confusion_of(results.confusion, names)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")


def confusion_of(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw how often each true class was found as each class; shares of the row, and counts."""
    labels = [*map(_plain, names), "background"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.5, 0.45 * len(labels) + 2.5), _LARGEST)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="Share of the true class")
    if len(labels) <= _NAMED:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="Found", ylabel="True")
    axes.set_title(f"Score from {CONFUSION_SCORE}, IoU from {CONFUSION_IOU}")
    if len(labels) <= _COUNTS:
        for row in range(len(labels)):
            for column in range(len(labels)):
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour)
    return figure
