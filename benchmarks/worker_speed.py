"""What a data worker can do: two SimCLR views of 224 px, ours beside lightly's SimCLRTransform.

`python -m benchmarks.worker_speed --pictures DIR --count 200` makes both views of the same JPEGs in
one process with one thread, picture by picture and in turns, with SimCLR's values on both sides
(crop scale 0.08..1, jitter 0.8 of 0.8, 0.8, 0.8, 0.2, grayscale 0.2, blur 0.5, flip 0.5).

- lightly: Pillow decodes to RGB; the transform gives two normalised float tensors.
- ours: bytes to two uint8 views and their colours' numbers. That is all a worker does.
- ours, coloured: the same and what the device does with it (groundwork.colour.apply, batches of
  32), counted at what it costs one thread of the CPU. Both sides then end in the same tensors.

Times are CPU seconds of the process, so that whatever else the machine does counts little; samples
a second is 1 over the median. One line for people goes before the JSON.

`--picture OUT.png` writes views of both, side by side.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image, ImageDraw

from groundwork import colour
from groundwork.data.decode import open_picture
from groundwork.errors import UsageError
from pretext_tasks.crops import draw_crop
from pretext_tasks.simclr import SimCLR, SimCLRConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, lightly's default
SIDE = 224
BATCH = 32


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that an action took, and what it gave."""
    began = time.process_time()
    result = action()
    return time.process_time() - began, result


def colour_batch(samples: list[dict[str, Any]], number: int) -> torch.Tensor:
    """Stack one view of each sample, colour and normalise: float32 N 3 H W."""
    views = torch.from_numpy(np.stack([sample[f"view_{number}"] for sample in samples]))
    numbers = torch.from_numpy(np.stack([sample[f"colour_{number}"] for sample in samples]))
    return colour.apply(views, numbers, MEAN, STD)


def measure(pictures: list[bytes]) -> dict[str, Any]:
    """Time both pipelines in turns over the same pictures; seconds are of one sample."""
    make_views = SimCLR.views(SimCLRConfig(), SIDE)
    transform = SimCLRTransform(input_size=SIDE)
    generator = np.random.default_rng(0)
    torch.manual_seed(0)

    def ours(data: bytes) -> dict[str, Any]:
        return make_views(open_picture(data), generator)

    def theirs(data: bytes) -> Any:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    for data in pictures[:BATCH]:  # warm both up
        theirs(data)
        sample = ours(data)
    colour_batch([sample] * BATCH, 1)
    seconds: dict[str, list[float]] = {"ours": [], "lightly": [], "colour": []}
    stages: dict[str, list[float]] = {}
    waiting: list[dict[str, Any]] = []
    for index, data in enumerate(pictures):
        turn: list[tuple[str, Callable[[bytes], Any]]] = [("ours", ours), ("lightly", theirs)]
        for name, pipeline in turn if index % 2 else reversed(turn):
            spent, result = timed(partial(pipeline, data))
            seconds[name].append(spent)
            if name == "ours":
                waiting.append(result)
        measure_stages(data, generator, stages)
        if len(waiting) == BATCH or index == len(pictures) - 1:
            for number in (1, 2):
                spent, _ = timed(partial(colour_batch, waiting, number))
                seconds["colour"].append(spent / len(waiting))
            waiting = []
    return summary(seconds, stages)


def measure_stages(
    data: bytes, generator: np.random.Generator, stages: dict[str, list[float]]
) -> None:
    """Time the parts of both pipelines one by one, into `stages`."""
    config = SimCLRConfig()
    header, picture = timed(lambda: open_picture(data))
    boxes = [
        draw_crop(picture.width, picture.height, config.crop_scale, config.crop_ratio, generator)
        for _ in range(2)
    ]
    first, _ = timed(lambda: picture.cut(boxes, SIDE))
    again, _ = timed(lambda: picture.cut(boxes, SIDE))  # already decoded
    draw, _ = timed(lambda: [colour.draw(config.colour, generator) for _ in range(2)])
    pillow, _ = timed(lambda: Image.open(io.BytesIO(data)).convert("RGB"))
    for name, spent in {
        "ours: header": header,
        "ours: decode": first - again,
        "ours: crop and resize": again,
        "ours: draw colours": draw,
        "lightly: decode": pillow,
    }.items():
        stages.setdefault(name, []).append(spent)


def summary(seconds: dict[str, list[float]], stages: dict[str, list[float]]) -> dict[str, Any]:
    """Bring the times to medians, samples a second, ratios and shares."""
    ours, lightly = statistics.median(seconds["ours"]), statistics.median(seconds["lightly"])
    device = 2 * statistics.median(seconds["colour"])  # two views
    milliseconds = {name: 1000 * statistics.median(spent) for name, spent in stages.items()}
    milliseconds["ours: colour on the device, at its CPU cost"] = 1000 * device
    whole = {"ours": 1000 * (ours + device), "lightly": 1000 * lightly}
    return {
        "pictures": len(seconds["ours"]),
        "torch": torch.__version__,
        "samples_per_second": {
            "ours": 1 / ours,
            "ours_coloured": 1 / (ours + device),
            "lightly": 1 / lightly,
        },
        "ratio": lightly / ours,
        "ratio_coloured": lightly / (ours + device),
        "milliseconds": milliseconds,
        "share_of_its_whole": {
            name: spent / whole[name.partition(":")[0]] for name, spent in milliseconds.items()
        },
    }


def side_by_side(pictures: list[bytes], rows: int = 6) -> Image.Image:
    """Draw rows of views: the picture, four views of ours, four of lightly's."""
    make_views = SimCLR.views(SimCLRConfig(), SIDE)
    transform = SimCLRTransform(input_size=SIDE)
    generator = np.random.default_rng(3)
    torch.manual_seed(3)
    np.random.seed(3)  # lightly's blur draws from it
    tile, gap, title = 112, 4, 18
    width = 9 * (tile + gap) + 4 * gap
    sheet = Image.new("RGB", (width, title + rows * (tile + gap)), "white")
    text = ImageDraw.Draw(sheet)
    starts = [0, tile + 3 * gap, 5 * (tile + gap) + 4 * gap]
    for start, name in zip(starts, ("picture", "ours", "lightly"), strict=True):
        text.text((start, 3), name, fill="black")
    for row, data in enumerate(pictures[:rows]):
        picture = open_picture(data)
        samples = [make_views(picture, generator) for _ in range(2)]
        ours = [colour_batch([sample], number)[0] for sample in samples for number in (1, 2)]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        lightly = [view for _ in range(2) for view in transform(image)]
        (whole,) = picture.cut([(0, 0, picture.width, picture.height)], tile)
        top = title + row * (tile + gap)
        sheet.paste(Image.fromarray(whole), (starts[0], top))
        for start, views in zip(starts[1:], (ours, lightly), strict=True):
            for column, view in enumerate(views):
                small = Image.fromarray(to_bytes(view)).resize((tile, tile))
                sheet.paste(small, (start + column * (tile + gap), top))
    return sheet


def to_bytes(view: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Undo the normalisation of a view (3 H W): uint8, H W 3."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    levels = ((view * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    array: npt.NDArray[np.uint8] = levels.permute(1, 2, 0).numpy()
    return array


def read_pictures(folder: Path, count: int) -> list[bytes]:
    """Read `count` JPEGs, over again where the folder has fewer. Raises UsageError."""
    names = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not names:
        raise UsageError(f"--pictures {folder} holds no .jpg: name a folder of photographs.")
    return [names[index % len(names)].read_bytes() for index in range(count)]


def main() -> None:
    """Measure, and write a line for people and JSON; or draw the views."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--picture", type=Path, help="write views of both side by side (PNG)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
    pictures = read_pictures(options.pictures, options.count)
    if options.picture is not None:
        sheet = side_by_side(pictures[:: max(1, len(pictures) // 6)])
        palette = sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # a third of the size
        dithered = sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        dithered.save(options.picture, optimize=True)
        sys.stdout.write(f"Views of both are in {options.picture}\n")
        return
    found = measure(pictures)
    speed = found["samples_per_second"]
    sys.stdout.write(
        f"{speed['ours']:.0f} samples/s in a worker, {speed['ours_coloured']:.0f} with the colour "
        f"counted, {speed['lightly']:.0f} with lightly: {found['ratio']:.1f} and "
        f"{found['ratio_coloured']:.1f} times as fast.\n{json.dumps(found, indent=1)}\n"
    )


if __name__ == "__main__":
    main()
