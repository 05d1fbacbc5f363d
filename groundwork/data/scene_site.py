"""The ground of drawn aerial scenes: materials, roads, parking lots, and the site that they fill.

A `Site` is a scene before it is drawn, in metres around the middle of the picture.
groundwork.data.scene_layouts fills one; groundwork.data.scene_drawing turns it by its heading and
draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

from groundwork.data.scene_shapes import (
    Colour,
    Point,
    Shape,
    building,
    jitter,
    paint,
    rectangle,
)
from groundwork.data.scene_vehicles import VEHICLES

Flat = tuple[float, float, float, float]  # left, low, right, high
WHITE, YELLOW = (226, 226, 220), (214, 180, 70)


@dataclass(frozen=True, slots=True)
class Material:
    """What covers a piece of ground; strengths are relative to its brightness."""

    colour: Colour
    fine: float = 0.05  # grain of one pixel
    coarse: float = 0.06  # blotches of several pixels
    rows: float = 0.0  # furrows, swaths, ripples
    pitch: float = 2.0  # metres from row to row
    angle: float = 0.0  # where the rows point


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape at its place; `kind` is None for what is drawn and never labeled."""

    kind: str | None
    shape: Shape
    x: float
    y: float
    heading: float


@dataclass(slots=True)
class Site:
    """A scene before it is drawn."""

    random: Random
    extent: float  # metres along the picture's side
    heading: float  # what the whole layout is turned by
    sun: Point  # points to the sun, in the layout's axes
    grounds: list[tuple[list[Point], Material]] = field(default_factory=list)
    marks: list[tuple[list[Point], Colour, int]] = field(
        default_factory=list
    )  # ..., opacity of 255
    things: list[Thing] = field(default_factory=list)
    trees: list[tuple[float, float, float]] = field(default_factory=list)
    taken: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def reach(self) -> float:
        """How far from the middle the layout has to go, whatever its heading."""
        return self.extent * 0.72

    def line(
        self, start: Point, end: Point, width: float, colour: Colour, dash: float = 0.0
    ) -> None:
        """Paint a line on the ground, whole or dashed, more or less worn."""
        long = math.hypot(end[0] - start[0], end[1] - start[1])
        if not long:
            return
        ux, uy = (end[0] - start[0]) / long, (end[1] - start[1]) / long
        vx, vy = -uy * width / 2, ux * width / 2
        opacity, at = self.random.randrange(110, 235), 0.0
        while at < long:
            to = min(long, at + dash) if dash else long
            a, b = (
                (start[0] + ux * at, start[1] + uy * at),
                (start[0] + ux * to, start[1] + uy * to),
            )
            quad = [
                (a[0] + vx, a[1] + vy),
                (b[0] + vx, b[1] + vy),
                (b[0] - vx, b[1] - vy),
                (a[0] - vx, a[1] - vy),
            ]
            self.marks.append((quad, colour, opacity))
            at = to + dash * 1.5 + 1e-6

    def free(self, x: float, y: float, radius: float) -> bool:
        """Whether nothing that was put down comes nearer."""
        return all((x - a) ** 2 + (y - b) ** 2 >= (radius + r) ** 2 for a, b, r in self.taken)

    def put(self, kind: str | None, shape: Shape, x: float, y: float, heading: float) -> None:
        """Put a thing down."""
        self.things.append(Thing(kind, shape, x, y, heading))
        self.taken.append((x, y, shape.radius * 0.8))

    def vehicle(self, kind: str, x: float, y: float, heading: float) -> None:
        """Put a car, truck, aircraft or boat down, nose either way."""
        turn = heading + self.random.choice((0.0, math.pi)) + self.random.gauss(0.0, 0.035)
        self.put(kind, VEHICLES[kind](self.random), x, y, turn)

    def house(self, x: float, y: float, long: float, wide: float, heading: float = 0.0) -> None:
        """Put a building down."""
        cosine, sine = math.cos(heading), math.sin(heading)
        sun = (self.sun[0] * cosine + self.sun[1] * sine, self.sun[1] * cosine - self.sun[0] * sine)
        self.put("building", building(self.random, long, wide, sun), x, y, heading)

    def box(self, x: float, y: float, long: float, wide: float, heading: float) -> None:
        """Put down clutter that is not labeled: a container, a shed, a pile of pallets."""
        colour = paint(self.random)
        parts = [(rectangle(-long / 2, -wide / 2, long / 2, wide / 2), colour)]
        if self.random.random() < 0.5:
            inner = rectangle(-long * 0.45, -wide * 0.1, long * 0.45, wide * 0.1)
            parts.append((inner, jitter(self.random, colour, 30)))
        self.put(None, Shape(parts, 1, self.random.uniform(0.5, 2.6)), x, y, heading)

    def scatter(self, count: int, where: Flat, kinds: tuple[str, ...], margin: float = 5.0) -> None:
        """Put things down at random headings where there is room; "box" is unlabeled clutter."""
        for _ in range(count):
            x, y = self.random.uniform(where[0], where[2]), self.random.uniform(where[1], where[3])
            kind, heading = self.random.choice(kinds), self.random.uniform(0, 2 * math.pi)
            if not self.free(x, y, margin):
                continue
            if kind == "box":
                self.box(x, y, self.random.uniform(2, 9), self.random.uniform(1.4, 2.6), heading)
            elif kind == "building":
                self.house(x, y, self.random.uniform(4, 9), self.random.uniform(3, 6), heading)
            else:
                self.vehicle(kind, x, y, heading)

    def plant(self, count: int, where: Flat, keep_clear: bool = True) -> None:
        """Plant trees and bushes."""
        for _ in range(count):
            x, y = self.random.uniform(where[0], where[2]), self.random.uniform(where[1], where[3])
            radius = self.random.uniform(0.7, 3.4)
            if not keep_clear or self.free(x, y, radius * 0.6):
                self.trees.append((x, y, radius))


def asphalt(random: Random) -> Material:
    """Asphalt, new or old."""
    grey = random.randrange(70, 112)
    tint = random.randrange(-6, 10)
    return Material(
        (grey + tint, grey, grey - tint // 2),
        random.uniform(0.03, 0.07),
        random.uniform(0.03, 0.08),
    )


def concrete(random: Random) -> Material:
    """Concrete slabs, paler than asphalt."""
    grey = random.randrange(130, 170)
    tint = random.randrange(-3, 9)
    strengths = random.uniform(0.03, 0.06), random.uniform(0.03, 0.07)
    return Material((grey + tint, grey, grey - tint), *strengths)


def grass(random: Random) -> Material:
    """Meadow, lawn or dry grass."""
    colour = random.choice([(88, 106, 62), (104, 116, 70), (128, 122, 82), (74, 94, 58)])
    return Material(jitter(random, colour), random.uniform(0.06, 0.14), random.uniform(0.06, 0.16))


def crop_field(random: Random) -> Material:
    """A field: green, ripe, ploughed or mown, mostly in rows."""
    colours = [
        (96, 116, 60),
        (70, 100, 54),
        (168, 150, 96),
        (140, 112, 80),
        (112, 92, 70),
        (190, 172, 118),
        (122, 132, 74),
    ]
    return Material(
        jitter(random, random.choice(colours), 22),
        random.uniform(0.03, 0.12),
        random.uniform(0.05, 0.16),
        random.choice([0.0, random.uniform(0.03, 0.2)]),
        random.uniform(0.9, 5.0),
        random.choice([0.0, math.pi / 2, random.uniform(0, math.pi)]),
    )


def water(random: Random) -> Material:
    """Sea, river or basin, dull or green or blue, with ripples."""
    colour = random.choice([(46, 84, 104), (58, 92, 98), (40, 70, 96), (64, 98, 92), (52, 92, 112)])
    return Material(
        jitter(random, colour), random.uniform(0.02, 0.06), random.uniform(0.03, 0.1),
        random.uniform(0.0, 0.08), random.uniform(1.2, 3.5), random.uniform(0, math.pi),
    )  # fmt: skip


def road(site: Site, start: Point, end: Point, width: float, cars: float, trucks: float) -> None:
    """A straight road with markings, and traffic in its lanes; cars and trucks per metre."""
    random = site.random
    long, heading = (
        math.hypot(end[0] - start[0], end[1] - start[1]),
        math.atan2(end[1] - start[1], end[0] - start[0]),
    )
    ux, uy = math.cos(heading), math.sin(heading)

    def at(along: float, across: float) -> Point:
        return start[0] + ux * along - uy * across, start[1] + uy * along + ux * across

    h = width / 2
    verge = Material(jitter(random, (134, 130, 108)), 0.08, 0.1)
    for half, material in ((h + random.uniform(0.3, 1.5), verge), (h, asphalt(random))):
        site.grounds.append(
            ([at(0, -half), at(long, -half), at(long, half), at(0, half)], material)
        )
    lanes = max(2, int(width / 3.2))
    for i in range(1, lanes):
        across = -h + width * i / lanes
        whole = random.random() < 0.25
        site.line(
            at(0, across),
            at(long, across),
            0.18,
            random.choice([WHITE, WHITE, YELLOW]),
            0.0 if whole else 2.5,
        )
    for across in (-h + 0.3, h - 0.3) if random.random() < 0.6 else ():
        site.line(at(0, across), at(long, across), 0.16, WHITE)
    for i in range(lanes):
        across, along = -h + width * (i + 0.5) / lanes, random.uniform(0, 20)
        while along < long:
            kind = "truck" if random.random() * (cars + trucks) < trucks else "car"
            x, y = at(along, across + random.gauss(0, 0.15))
            if site.free(x, y, 3.0 if kind == "car" else 6.0):
                site.vehicle(kind, x, y, heading)
            along += (9.0 if kind == "car" else 18.0) + random.expovariate(cars + trucks)


def parking(site: Site, where: Flat, full: float, trucks: float = 0.06) -> None:
    """A lot with marked stalls, a share `full` of them taken; a lorry takes several stalls."""
    random = site.random
    left, low, right, high = where
    site.grounds.append((rectangle(*where), asphalt(random)))
    deep, stall = 5.0, random.uniform(2.5, 2.9)
    y, up = low + 0.4, True
    while y + deep <= high:
        x = left + 0.6
        site.line((left, y if up else y + deep), (right, y if up else y + deep), 0.12, WHITE)
        while x + stall <= right:
            site.line((x, y), (x, y + deep), 0.12, WHITE)
            draw = random.random()
            if draw < trucks and x + 13 < right:
                site.vehicle("truck", x + 7, y + deep / 2, 0.0)
                x += 14
                continue
            if draw < full:
                site.vehicle(
                    "car", x + stall / 2, y + deep / 2 + random.gauss(0, 0.25), math.pi / 2
                )
            elif draw > 0.97:
                site.trees.append((x + stall / 2, y + deep / 2, random.uniform(1.0, 2.4)))
            x += stall
        y, up = (y + deep + 6.2, False) if up else (y + deep + 0.2, True)


def fields(site: Site, where: Flat, depth: int = 0) -> None:
    """Cut an area into fields, woods and meadows, again and again."""
    random = site.random
    left, low, right, high = where
    if depth < 2 or (depth < 5 and random.random() < 0.55 and min(right - left, high - low) > 14):
        cut = random.uniform(0.3, 0.7)
        if right - left > high - low:
            middle = left + cut * (right - left)
            halves = ((left, low, middle, high), (middle, low, right, high))
        else:
            middle = low + cut * (high - low)
            halves = ((left, low, right, middle), (left, middle, right, high))
        for half in halves:
            fields(site, half, depth + 1)
        return
    slant = [(x + random.uniform(-2, 2), y + random.uniform(-2, 2)) for x, y in rectangle(*where)]
    if random.random() < 0.16:
        site.grounds.append((slant, Material(jitter(random, (58, 74, 46)), 0.2, 0.2)))
        site.plant(int((right - left) * (high - low) / 17), where, keep_clear=False)
    else:
        site.grounds.append(
            (slant, crop_field(random) if random.random() < 0.75 else grass(random))
        )
        if random.random() < 0.3:
            site.plant(random.randrange(3, 9), (left, low, right, low + 1.5), keep_clear=False)
