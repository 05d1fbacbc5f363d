"""Regions of a picture that stand out from what is around them, found without labels.

Maximally stable extremal regions (Matas et al. 2002, "Robust wide baseline stereo from maximally
stable extremal regions"; OpenCV's) are parts that keep their outline while a threshold moves. They
are looked for in brightness and in two differences of colours, each as it is and less its local
mean, at two sizes of the picture. An outline that holds over many thresholds, in several of these
maps and at both sizes is found many times with nearly the same box: how many boxes agree with one
is its score. The best boxes stay, none of them much overlapped by a better one or inside it, each
the mean of those that agree with it.

Each region is of a kind, by four questions whose answers need no label: how large it is (below a
sixteenth of the view's side, below an eighth, or above), whether it is darker than what is around
it, whether it is redder, and whether it is bluer.

OpenCV enters the project here and nowhere else.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL
from pydantic import Field

from groundwork.config import Section

Boxes = npt.NDArray[np.float32]  # K 4: left, top, right, bottom in pixels
Share = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[int, Field(ge=32)]

KINDS = 24  # three sizes, two answers to each of three questions

_VERSION = 1  # of what is found; to be raised where this file's doing changes, or the decoder's

_SIZES = (1 / 16, 1 / 8)  # of the view's side
_AROUND = 0.3  # of a region's sides: how far beyond its box "around" goes
_LEAST_PIXELS = 12  # of a region
_LEAST_VIEW = 3  # pixels of either side: OpenCV looks at no smaller picture
_CANDIDATES = 3000  # of a picture, the largest: time and memory are as their square
_CONTRAST = 0.01  # grey levels: what colours' arithmetic makes of a grey is no contrast
_SMOOTH = 0.6  # pixels: sigma of the Gaussian before thresholds
_TAIL = 0.5  # percent of a map's pixels that may be clipped at either end of its 256 levels
_LEAST_RANGE = 10.0  # grey levels that are stretched to 256 at most, so that noise stays small


class RegionKeys(Section):
    """What counts as a region. All values are ours; LOG.md has what they find."""

    most: int = Field(default=100, ge=1)  # boxes of a picture
    # Pixels of the picture's longer side at which regions are looked for; a smaller picture stays
    # as it is. All values in pixels are at these sizes, and the time is as their squares.
    resolutions: Annotated[tuple[Resolution, ...], Field(min_length=1)] = (384, 256)
    # A box's score, at least: how many others agree, and what `larger` adds. At these values that
    # alone is 6.4 for the smallest box, so no box is left out for want of votes.
    votes: float = Field(default=5.0, ge=0)
    larger: float = Field(default=4.0, ge=0)  # votes for being e times as large: outer outlines win
    agree: Share = 0.7  # intersection over union from which on two boxes are the same
    apart: Share = 0.4  # and up to which two that are kept may overlap
    inside: Share = 0.8  # of a box that may lie in a better one: no cells in cells
    delta: int = Field(default=10, ge=1)  # levels of 256 over which an outline is to hold
    variation: float = Field(default=0.3, gt=0)  # of its area over these, at most
    diversity: float = Field(default=0.05, ge=0)  # of the areas of nested ones, at least
    local: int = Field(default=41, ge=3)  # pixels: side of the square of the local mean
    side: float = Field(default=5.0, gt=0)  # pixels, at least
    area: Share = 0.15  # of the picture's, at most
    ratio: float = Field(default=3.0, ge=1)  # of the longer to the shorter side, at most
    fill: Share = 0.2  # of the box that is region, at least


def stable_regions(picture: npt.NDArray[np.uint8], keys: RegionKeys) -> Boxes:
    """Return the boxes of the regions of a picture (H W C), best first; there may be none."""
    full = picture.shape[1::-1]
    found = []
    for width, height in dict.fromkeys(_fitted(full, longest) for longest in keys.resolutions):
        smaller = picture if (width, height) == full else _smaller(picture, width, height)
        back = np.tile(np.divide(full, (width, height)), 2).astype(np.float32)
        found.append(_candidates(smaller, keys) * back)
    boxes = np.concatenate(found)
    if not len(boxes):
        return boxes
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if len(boxes) > _CANDIDATES:
        largest = np.sort(np.argsort(-areas, kind="stable")[:_CANDIDATES])
        boxes, areas = boxes[largest], areas[largest]
    shared = shared_areas(boxes, boxes)
    overlap = shared / (areas[:, None] + areas - shared)
    same = overlap > keys.agree
    score = same.sum(1) - 1 + keys.larger * np.log(np.sqrt(areas))
    kept: list[int] = []
    free = np.ones(len(boxes), np.bool_)
    for row in np.argsort(-score, kind="stable").tolist():
        if len(kept) == keys.most or score[row] < keys.votes:
            break
        if free[row]:
            kept.append(row)
            free &= (overlap[row] <= keys.apart) & (shared[row] <= keys.inside * areas)
    means = [boxes[same[row]].mean(0) for row in kept]
    regions: Boxes = np.array(means, np.float32).reshape(-1, 4)
    return regions


def size_for(width: int, height: int, keys: RegionKeys) -> tuple[int, int]:
    """Return the largest width and height at which regions of such a picture are looked for."""
    return _fitted((width, height), max(keys.resolutions))


@functools.cache
def signature(keys: RegionKeys) -> bytes:
    """Return bytes that change where the same picture may have other regions."""
    readers = f"OpenCV {cv2.__version__}, Pillow {PIL.__version__}"
    return f"regions {_VERSION}, {readers}: {keys.model_dump_json()}".encode()


def kinds_of(
    view: npt.NDArray[np.uint8], boxes: Boxes, colours: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.int64]:
    """Return the kind of each box (K 4) of a view (H W C): K numbers from 0 to KINDS - 1.

    `colours`, 3 x 3, is what the view's RGB is multiplied by before a network sees it: the kinds
    are those of what it sees.
    """
    height, width = view.shape[:2]
    seen = view[:, :, :3]
    sums = cv2.integral(seen).reshape(height + 1, width + 1, -1)  # of everything above and left
    sides = boxes[:, 2:] - boxes[:, :2]
    limits = np.array([width, height, width, height])

    def total(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        left, top, right, bottom = np.clip(rows, 0, limits).round().astype(int).T
        area = (right - left) * (bottom - top)
        found = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return found, area[:, None]

    middle, grown = (
        np.concatenate((boxes[:, :2] - share * sides, boxes[:, 2:] + share * sides), 1)
        for share in (-0.15, _AROUND)
    )
    inner, own = total(middle)
    whole, box = total(boxes)
    outer, larger = total(grown)
    difference = inner / np.maximum(own, 1) - (outer - whole) / np.maximum(larger - box, 1)
    if colours is not None and difference.shape[1] == 3:
        difference = difference @ colours.T
    contrast = np.stack(_opponents(difference), 1)
    size = np.searchsorted(_SIZES, np.sqrt(sides.prod(1)) / max(height, width))
    answers = (contrast > _CONTRAST).astype(np.int64) @ np.array([1, 2, 4])
    kinds: npt.NDArray[np.int64] = size * 8 + answers
    return kinds


def _candidates(view: npt.NDArray[np.uint8], keys: RegionKeys) -> Boxes:
    """Find the boxes of all stable regions of all maps that could be an object by their shape."""
    height, width = view.shape[:2]
    if min(height, width) < _LEAST_VIEW:
        return np.zeros((0, 4), np.float32)
    largest = int(keys.area * height * width)
    finder = cv2.MSER_create(  # type: ignore[attr-defined]
        delta=keys.delta, min_area=_LEAST_PIXELS, max_area=max(largest, _LEAST_PIXELS + 1),
        max_variation=keys.variation, min_diversity=keys.diversity,
    )  # fmt: skip
    places, areas = [], []
    for levels in _maps(view, keys.local):
        regions, rectangles = finder.detectRegions(levels)
        if len(regions):
            places.append(np.asarray(rectangles, np.float32))
            areas.append([len(region) for region in regions])
    if not places:
        return np.zeros((0, 4), np.float32)
    left, top, wide, tall = np.concatenate(places).T
    shorter, longer = np.minimum(wide, tall), np.maximum(wide, tall)
    possible = (
        (shorter >= keys.side)
        & (longer <= keys.ratio * shorter)
        & (wide * tall <= keys.area * height * width)
        & (np.concatenate(areas) >= keys.fill * wide * tall)
    )
    boxes: Boxes = np.stack((left, top, left + wide, top + tall), 1)[possible]
    return boxes


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return the width and height of a picture whose longer side is to be `longest` at most."""
    scale = min(1.0, longest / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def _smaller(view: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Resize H W C; OpenCV takes four channels at most, and drops the axis of one."""
    parts = [
        cv2.resize(view[:, :, first : first + 4], (width, height), interpolation=cv2.INTER_AREA)
        for first in range(0, view.shape[2], 4)
    ]
    return np.concatenate([np.asarray(p, np.uint8).reshape(height, width, -1) for p in parts], 2)


def _maps(view: npt.NDArray[np.uint8], local: int) -> list[npt.NDArray[np.uint8]]:
    """Return maps H W of 256 levels: three of brightness and colour, as they are and local.

    Of a view with more than three channels each further one is a map, too.
    """
    maps = []
    further = np.moveaxis(view[:, :, 3:].astype(np.float32), 2, 0)
    for channel in (*_opponents(view), *further):
        smooth = cv2.GaussianBlur(channel, (0, 0), _SMOOTH)
        for values in (smooth, smooth - cv2.blur(smooth, (local, local))):
            low, high = np.percentile(values[::2, ::2], (_TAIL, 100 - _TAIL))
            stretched = (values - low) * (255 / max(float(high - low), _LEAST_RANGE))
            maps.append(np.clip(stretched, 0, 255).astype(np.uint8))
    return maps


def _opponents(colours: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
    """Return brightness, red less green, and blue less yellow of ... C, in grey levels.

    Of two channels the mean, the first less the second, and nothing; of one, itself and nothing.
    """
    channels = np.moveaxis(colours[..., :3].astype(np.float32), -1, 0)
    if len(channels) < 3:
        nothing = np.zeros_like(channels[0])
        return [channels.mean(0), channels[0] - channels[-1], nothing]
    red, green, blue = channels
    return [(red + green + blue) / 3, red - green, blue - (red + green) / 2]


def shared_areas(first: Boxes, second: Boxes) -> Boxes:
    """Return the areas that boxes (K 4 and L 4) have in common: K L.

    In place and without a third axis, several times as fast as the textbook's form: a view has
    about a thousand candidates.
    """
    wide = np.minimum(first[:, None, 2], second[None, :, 2])
    wide -= np.maximum(first[:, None, 0], second[None, :, 0])
    np.maximum(wide, 0, out=wide)
    tall = np.minimum(first[:, None, 3], second[None, :, 3])
    tall -= np.maximum(first[:, None, 1], second[None, :, 1])
    np.maximum(tall, 0, out=tall)
    shared: Boxes = np.multiply(wide, tall, out=wide)
    return shared
