"""One detector of several: the mean of their weights.

    python -m finetune.average detector.safetensors pretrained.safetensors --out mean.safetensors

Of a detector and of the detector that its fine-tuning began with (a file of self-training), the
mean may be better than either: fine-tuning on a few labels forgets a part of what it began with
(Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903). Several
fine-tunings that began with one file can be averaged too ("Model soups", arXiv 2203.05482).
Detectors that did not begin alike have nothing in common: their mean finds nothing. So score what
comes out: `python -m finetune.evaluate mean.safetensors data.val=ROOT`.

BatchNorm's statistics are averaged like weights. What the first file says of its training is kept.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.detector import Detector
from finetune.weights import About, detector_from_file, parts_of, save_detector
from groundwork.command import exit_code_of
from groundwork.errors import UsageError

logger = logging.getLogger("finetune.average")


def average(files: Sequence[Path], shares: Sequence[float]) -> tuple[Detector, About]:
    """Return the mean of detectors' weights, in eval mode, and what the first file says of itself.

    `shares` are the files' weights in the mean; their sum need not be 1. Raises CheckpointError
    for a file that is no detector, UsageError for detectors that are not built alike, know other
    classes or see pictures in another way, and for shares without a meaning.
    """
    if len(files) < 2 or len(shares) != len(files):
        raise UsageError(
            f"{len(files)} file(s) and {len(shares)} share(s): name two files or more, and a share "
            "for each."
        )
    total = math.fsum(shares)
    if not all(share >= 0 for share in shares) or not 0 < total < math.inf:
        raise UsageError(f"Shares are 0 or more, and one is above 0; these are {list(shares)}.")
    loaded = [detector_from_file(file) for file in files]
    states = [detector.state_dict() for detector, _ in loaded]
    detector, first = loaded[0]
    for file, (_, about), state in zip(files, loaded, states, strict=True):
        if reason := _unlike(first, states[0], about, state):
            raise UsageError(
                f"{files[0]} and {file} {reason}: only detectors of one kind have a mean."
            )
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            parts = [s[name].double() * (w / total) for s, w in zip(states, shares, strict=True)]
            tensor.copy_(torch.stack(parts).sum(0))
    return detector, first


def _unlike(
    first: About, mine: dict[str, Tensor], about: About, theirs: dict[str, Tensor]
) -> str | None:
    """Return why a mean of two detectors would be of unlike things."""
    shapes = [{name: tensor.shape for name, tensor in these.items()} for these in (mine, theirs)]
    if shapes[0] != shapes[1]:
        return "are not built alike"
    if first.names != about.names:
        return f"know other classes ({', '.join(first.names)}; {', '.join(about.names)})"
    if first.reading().mapping != about.reading().mapping:
        return "see other bands or values"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m finetune.average", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="detectors")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="SHARE", help="of each file (default: equal)"
    )
    options = parser.parse_args(arguments)
    files, shares = options.files, options.shares or [1.0] * len(options.files)

    def work() -> None:
        if options.out.resolve() in [file.resolve() for file in files]:
            raise UsageError(f"--out {options.out} is one of the files: name another.")
        write(options.out, files, shares)
        logger.info("%s is the mean of %s.", options.out, ", ".join(map(str, files)))

    return exit_code_of(work)


def write(out: Path, files: Sequence[Path], shares: Sequence[float]) -> None:
    """Write the mean as a detector's file, which says what it is the mean of. Raises as above."""
    detector, about = average(files, shares)
    averaged = [
        {"file": str(file), "share": share} for file, share in zip(files, shares, strict=True)
    ]
    save_detector(
        out, parts_of(detector), names=about.names, image_size=about.image_size,
        metadata={**about.metadata, "averaged": averaged},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
