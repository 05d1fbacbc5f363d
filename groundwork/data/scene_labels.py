"""Boxes and classes of what a drawn aerial scene shows, from the polygons that are drawn.

What is labeled: a thing of which at least half of the outline is to be seen, neither outside the
picture nor under what was drawn later (trees, roofs), and whose box has sides of at least 4 pixels.
Its box is the extent of the part of its outline inside the picture, hidden or not, without shadow.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from groundwork.data.scene_shapes import Point
from groundwork.data.scene_site import Site, Thing

CLASSES = ("car", "truck", "aircraft", "building", "boat")
SMALLEST_SIDE = 4.0
LEAST_VISIBLE = 0.5


class View:
    """From metres in the layout to pixels: turn, scale, shift.

    A polygon that Pillow draws covers every pixel that an edge touches, up to one too many on each
    side: drawn at twice the size, half a pixel of the picture.
    """

    def __init__(self, site: Site, side: int) -> None:
        """A view on a canvas with sides of so many pixels."""
        self.scale = side / site.extent
        self.middle = side / 2
        self.heading = site.heading
        self.cosine, self.sine = (
            math.cos(self.heading) * self.scale,
            math.sin(self.heading) * self.scale,
        )

    def point(self, x: float, y: float) -> Point:
        """The pixel of one point."""
        return (
            self.middle + x * self.cosine - y * self.sine,
            self.middle + x * self.sine + y * self.cosine,
        )

    def points(self, points: list[Point]) -> list[Point]:
        """The pixels of points."""
        m, c, s = self.middle, self.cosine, self.sine
        return [(m + x * c - y * s, m + x * s + y * c) for x, y in points]

    def parts(self, thing: Thing, outline: bool) -> list[list[Point]]:
        """The pixels of a thing's polygons: all of them, or those that cover it."""
        left, top = self.point(thing.x, thing.y)
        turn = thing.heading + self.heading
        c, s = math.cos(turn) * self.scale, math.sin(turn) * self.scale
        parts = thing.shape.parts[: thing.shape.outline] if outline else thing.shape.parts
        return [
            [(left + x * c - y * s, top + x * s + y * c) for x, y in points] for points, _ in parts
        ]


def label_things(site: Site, size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Boxes and classes of what is to be seen, by the rule in the module's docstring."""
    owners = Image.new("I", (size, size))
    draw = ImageDraw.Draw(owners)
    things, view = in_order(site), View(site, size)
    for number, thing in enumerate(things, start=1):
        for polygon in view.parts(thing, outline=True):
            draw.polygon(polygon, fill=number)
    for x, y, radius in site.trees:
        (px, py), r = view.point(x, y), radius * view.scale
        draw.ellipse((px - r, py - r, px + r, py + r), fill=0)
    seen = np.bincount(np.asarray(owners).ravel(), minlength=len(things) + 1)
    boxes: list[tuple[float, float, float, float]] = []
    classes: list[int] = []
    for number, thing in enumerate(things, start=1):
        if thing.kind is None or not seen[number]:
            continue
        box = _box(view.parts(thing, outline=True), size)
        if min(box[2] - box[0], box[3] - box[1]) < SMALLEST_SIDE:
            continue
        whole = view.parts(thing, outline=True)
        # Most things are seen whole; only for the others is it worth counting pixels.
        if seen[number] >= LEAST_VISIBLE * _area(whole):
            boxes.append(box)
            classes.append(CLASSES.index(thing.kind))
    return np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(classes, np.int64)


def in_order(site: Site) -> list[Thing]:
    """What lies on the ground first, buildings over it."""
    return sorted(site.things, key=lambda thing: thing.kind == "building")


def _area(polygons: list[list[Point]]) -> int:
    """How many pixels polygons cover together, hidden or not, inside the picture or not."""
    xs, ys = [x for p in polygons for x, _ in p], [y for p in polygons for _, y in p]
    left, top = math.floor(min(xs)) - 1, math.floor(min(ys)) - 1
    alone = Image.new("L", (math.ceil(max(xs)) - left + 2, math.ceil(max(ys)) - top + 2))
    draw = ImageDraw.Draw(alone)
    for polygon in polygons:
        draw.polygon([(x - left, y - top) for x, y in polygon], fill=1)
    return alone.histogram()[1]


def _box(polygons: list[list[Point]], size: int) -> tuple[float, float, float, float]:
    """The extent of the part of polygons inside the picture."""
    points = [point for polygon in polygons for point in _clip(polygon, size)]
    if not points:
        return 0.0, 0.0, 0.0, 0.0
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def _clip(polygon: list[Point], size: int) -> list[Point]:
    """The part of a polygon inside the picture (Sutherland and Hodgman 1974)."""
    for axis in (0, 1):
        for limit, sign in ((0.0, 1.0), (float(size), -1.0)):
            if all((p[axis] - limit) * sign >= 0 for p in polygon):
                continue
            kept: list[Point] = []
            for before, point in zip([polygon[-1], *polygon[:-1]], polygon, strict=True):
                a, b = (before[axis] - limit) * sign, (point[axis] - limit) * sign
                if (a >= 0) != (b >= 0):
                    t = a / (a - b)
                    cut = [
                        before[0] + t * (point[0] - before[0]),
                        before[1] + t * (point[1] - before[1]),
                    ]
                    cut[axis] = limit
                    kept.append((cut[0], cut[1]))
                if b >= 0:
                    kept.append(point)
            polygon = kept
            if not polygon:
                return []
    return polygon
