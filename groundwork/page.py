"""One HTML page for a run: what both stages' pages have in common.

A page has everything in it and asks for nothing else: pictures and curves are in the file. It can
be written while a run goes on: a metric that is not there yet has no curve.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from groundwork.command import exit_code_of, stage_of
from groundwork.errors import UsageError
from groundwork.files import write_file

logger = logging.getLogger("groundwork.page")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #1c2733; background: #fff; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #d5dce3; }
img { max-width: 100%; vertical-align: top; } figure { margin: 0 0 1em; }
figcaption { color: #556; font-size: 13px; } .curves { display: grid; gap: 1em;
grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); } table { border-collapse: collapse; }
td, th { text-align: left; padding: .25em 1em .25em 0; } pre { background: #f4f6f8; padding: 1em;
overflow: auto; font-size: 12px; } .muted { color: #667; }
"""


def write_page(run: Path, title: str, sections: Mapping[str, str], out: Path | None = None) -> Path:
    """Write a run's page and return its path: HTML by heading, then recipe and machine.

    `out` is the page, by default report.html in the run folder. Raises UsageError where it cannot
    be written.
    """
    status = read_json(run / "status.json")
    state = str(status.get("state", "unknown"))
    if status.get("message"):
        state += f": {status['message']}"
    machine = json.dumps(read_json(run / "machine.json"), indent=1)
    sections = {
        **sections,
        "Recipe": f"<pre>{html.escape((run / 'recipe.yaml').read_text())}</pre>",
        "Machine": f"<pre>{html.escape(machine)}</pre>",
    }
    page = (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{html.escape(title)}"
        f"</title><style>{STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p class=muted>{html.escape(str(run))} &middot; {html.escape(state)}</p>\n"
        + "".join(f"<h2>{heading}</h2>\n{content}\n" for heading, content in sections.items())
        + "</body></html>\n"
    )
    out = out or run / "report.html"
    try:
        write_file(out, page)
    except OSError as error:
        raise UsageError(f"The page {out} cannot be written: {error.strerror}.") from error
    return out


def check_run(run: Path, stage: str) -> None:
    """Raise UsageError where a folder is no run folder of a stage."""
    if not (run / "recipe.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        raise UsageError(f"{run} is no run folder: it has no recipe.yaml and metrics.jsonl.")
    if (own := stage_of(run)) != stage:
        raise UsageError(f"{run} is a run of {own}/run.py: `python -m {own}.report {run}`.")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; the last line of a run that goes on may be half written, and is left."""
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of the run folder; of a missing one nothing."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def run_command(
    stage: str, write: Callable[[Path, Path | None], Path], arguments: Sequence[str] | None
) -> int:
    """Run the command that writes a stage's page, and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog=f"python -m {stage}.report")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    options = parser.parse_args(arguments)
    return exit_code_of(lambda: logger.info("%s", write(options.run, options.out)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, a row's first cell being its heading."""
    top = "".join(f"<th>{html.escape(one)}</th>" for one in head)
    body = [
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{top}</tr>{''.join(body)}</table>"


def curves(lines: Sequence[Mapping[str, float]], starts: tuple[str, ...]) -> str:
    """Return a plot over the steps of each metric whose name has one of these beginnings."""
    names = sorted({n for line in lines for n in line if n.startswith(starts)})
    plots = []
    for name in names:
        # What was not finite is written as null.
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if len(points) < 2:
            continue
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        plots.append(drawing(figure, name))
    return f"<div class=curves>{''.join(plots)}</div>" if plots else "<p>No curve yet.</p>"


def drawing(figure: Figure, name: str, caption: str = "") -> str:
    """Return a plot."""
    FigureCanvasSVG(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    return embedded("image/svg+xml", drawn.getvalue(), name, caption)


def sheet(image: Image.Image, name: str, caption: str) -> str:
    """Return a picture that is in memory."""
    drawn = io.BytesIO()
    image.save(drawn, "PNG")
    return embedded("image/png", drawn.getvalue(), name, caption)


def embedded(kind: str, data: bytes, name: str, caption: str) -> str:
    """Return a picture whose file's bytes these are."""
    text = base64.b64encode(data).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{html.escape(name)}" src="data:{kind};base64,{text}">{below}</figure>'
    )
