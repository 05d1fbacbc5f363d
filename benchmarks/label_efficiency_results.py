"""What the label efficiency study found, as a table and as curves."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import cycle, groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from groundwork.files import write_file

Results = Sequence[dict[str, Any]]
Curve = npt.NDArray[np.float64]

# Of a command: where things are, how long and by which seed it trains.
_NO_SETTING = re.compile(
    r" (--out|--init) \S+| (data\.(train|train_list|cache)|budget\.steps|seed)=\S+"
)


def settings_of(row: dict[str, Any]) -> tuple[str, list[float]]:
    """Return of a row what makes its figures others, whatever the seed and length."""
    averages = row.get("averages", [row.get("average", 0.0)])
    return _NO_SETTING.sub("", row["command"]), averages


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return json.loads(file.read_text()) if file.is_file() else []


def update(file: Path, rows: list[dict[str, Any]]) -> None:
    """Put these rows, all of one set, init and fraction, in the place of those that are there.

    The folder is locked meanwhile, so that other studies may write the same file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        cells = {(one["dataset"], one["init"], one["fraction"]) for one in rows}
        others = [
            one for one in read(file) if (one["dataset"], one["init"], one["fraction"]) not in cells
        ]
        write(others + rows, file)
    finally:
        os.close(folder)


def write(results: list[dict[str, Any]], file: Path) -> None:
    """Sort the results and write them to `file`, with table and curves beside it."""
    results.sort(key=lambda one: (one["dataset"], one["init"], one["fraction"], one["seed"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(results, indent=1) + "\n")
    write_file(file.with_suffix(".md"), table(results))
    draw(results, file.parent)


def table(results: Results) -> str:
    """Return a Markdown table: a row for each set, fraction and init; AP as mean and spread."""
    lines = [
        "| data set | labels | init | minutes | steps | seeds | AP | AP50 | over scratch "
        "| there at step | pays after |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, fraction), cells in _by(results, "dataset", "fraction"):
        rows = {init: list(found) for (init,), found in _by(cells, "init")}
        pace = _pace(cells)
        for init, found in rows.items():
            aps = [one["ap"] for one in found]
            # On the same seeds; of several baselines the best one: scratch is to be at its best.
            pairs = [_on_common_seeds(found, rows[name]) for name in rows if _is_scratch(name)]
            pairs = [(mine, its) for mine, its in pairs if its]
            mine, its = min(pairs, key=_gain, default=(found, []))
            gain = f"{100 * _gain((mine, its)):+.1f}" if its else ""
            spent = found[0]["pretrain_minutes"] * pace
            there = _there(_curves(mine).mean(0), [_curves(its).mean(0)] if its else [], spent)
            lines.append(
                f"| {dataset} | {fraction:g} % | {init} | {found[0]['pretrain_minutes']:.0f} "
                f"| {found[0]['steps']} | {len(found)} | {_spread(aps)} "
                f"| {_spread([one['ap50'] for one in found])} | {gain} "
                f"| {there} |"
            )
    return "\n".join(lines) + "\n"


def _is_scratch(init: str) -> bool:
    return init.startswith("scratch")


def _on_common_seeds(first: Results, second: Results) -> tuple[Results, Results]:
    """Return the rows of the seeds that both have."""
    common = {one["seed"] for one in first} & {one["seed"] for one in second}
    return [one for one in first if one["seed"] in common], [
        one for one in second if one["seed"] in common
    ]


def _gain(pair: tuple[Results, Results]) -> float:
    mine, its = (np.mean([one["ap"] for one in found]) for found in pair)
    return float(mine - its)


def _curves(found: Results) -> Curve:
    """Return steps, minutes and AP on val of each seed, S P 3, of the points that all of them have.

    Runs that stopped early have shorter curves.
    """
    length = min(len(one["val_curve"]) for one in found)
    return np.array([one["val_curve"][:length] for one in found]).reshape(len(found), -1, 3)


def _pace(found: Results) -> float:
    """Return steps a minute of the run that was least disturbed: all train the same network."""
    ends = [one["val_curve"][-1] for one in found if one["val_curve"]]
    return max((steps / minutes for steps, minutes, _ in ends), default=0.0)


def _there(curve: Curve, baselines: Sequence[Curve], spent: float) -> str:
    """Say at which step scratch's best AP on val is reached, and after how many fine-tunings.

    `spent` is the time of pretraining, in steps of fine-tuning: it is paid once by the steps that
    every fine-tuning saves. Two cells; empty where there is no baseline.
    """
    baselines = [one for one in baselines if len(one)]
    if not baselines or not len(curve):
        return " |"
    best = max(baselines, key=lambda one: one[:, 2].max())
    goal = best[best[:, 2].argmax()]
    reached = np.flatnonzero(curve[:, 2] >= goal[2])
    if not len(reached):
        return "never |"
    step = curve[reached[0], 0]
    if not spent:
        return f"{step:g} |"
    saved = goal[0] - step
    pays = f"{spent / saved:.1f} fine-tunings" if saved > 0 else "never"
    return f"{step:g} of {goal[0]:g} | {pays}"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw AP on val over steps and over minutes, one PNG for each set and fraction."""
    files = []
    for (dataset, fraction), cells in _by(results, "dataset", "fraction"):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        # Ten colours, and from the eleventh init on the same ones dashed.
        styles = cycle(product(("-", "--", ":"), (f"C{n}" for n in range(10))))
        for ((init,), found), (dashes, colour) in zip(_by(cells, "init"), styles, strict=False):
            curves = _curves(found)
            if not curves.size:
                continue
            steps, minutes, ap = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 2]
            for axes, x in ((left, steps), (right, minutes + found[0]["pretrain_minutes"])):
                label = f"{init} ({len(ap)})"
                axes.plot(x, ap.mean(0), dashes, color=colour, marker=".", label=label)
                axes.fill_between(x, ap.min(0), ap.max(0), alpha=0.15, color=colour)
        left.set(xlabel="steps of fine-tuning", ylabel="AP on val")
        right.set(xlabel="minutes, pretraining counted")
        lines, labels = left.get_legend_handles_labels()
        figure.legend(lines, labels, title="init (seeds)", loc="outside right upper")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.set_figheight(max(4.2, 0.23 * len(labels) + 0.6))  # the legend has a line for each
        figure.suptitle(f"{dataset}, {fraction:g} % of the labels")
        FigureCanvasAgg(figure)
        files.append(folder / f"label_efficiency-{dataset}-{fraction:g}pct.png")
        figure.savefig(files[-1], format="png", dpi=110)
    return files


def _by(results: Results, *keys: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(one[name] for name in keys)

    for group, found in groupby(sorted(results, key=key), key):
        yield group, list(found)


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
