"""Shapes of drawn aerial scenes, and those of buildings; vehicles are in scene_vehicles.

A shape is a list of coloured polygons in metres, nose along +x, centred near the origin. The first
polygons of a shape are its outline and cover all the others, so its box is the extent of the
outline. Colours are those of one palette, which all vehicles and some of the roofs share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

Point = tuple[float, float]
Colour = tuple[int, int, int]
Part = tuple[list[Point], Colour]

# White, silver, grey and black are as common as on real vehicles; the others share the rest.
PAINT: tuple[Colour, ...] = (
    *[(232, 233, 230)] * 8,
    *[(182, 186, 190)] * 5,
    *[(112, 116, 122)] * 3,
    *[(44, 46, 52)] * 3,
    (164, 44, 40),
    (196, 60, 48),
    (42, 62, 118),
    (72, 112, 168),
    (52, 92, 72),
    (198, 184, 152),
    (214, 178, 66),
    (202, 112, 54),
    (112, 84, 62),
    (64, 136, 140),
)
ROOFS: tuple[Colour, ...] = (
    (150, 84, 62),
    (126, 72, 58),
    (92, 88, 88),
    (138, 132, 126),
    (170, 166, 158),
    (104, 92, 80),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Polygons in drawing order; the first `outline` of them cover all the others."""

    parts: list[Part]
    outline: int
    height: float  # metres above the ground: how long its shadow is

    @property
    def radius(self) -> float:
        """How far it goes from its origin, in metres."""
        return max(math.hypot(x, y) for points, _ in self.parts[: self.outline] for x, y in points)


def jitter(random: Random, colour: Colour, by: int = 14) -> Colour:
    """The same colour in another light: one shift of all channels and a smaller one of each."""
    shift = random.uniform(-by, by)
    red, green, blue = (min(255, max(0, int(c + shift + random.uniform(-6, 6)))) for c in colour)
    return red, green, blue


def shade(colour: Colour, factor: float) -> Colour:
    """A colour made darker (factor below 1) or lighter."""
    red, green, blue = (min(255, int(c * factor)) for c in colour)
    return red, green, blue


def paint(random: Random) -> Colour:
    """One colour of the palette that all vehicles share."""
    return jitter(random, random.choice(PAINT))


def rectangle(
    left: float, low: float, right: float, high: float, corner: float = 0.0
) -> list[Point]:
    """A rectangle; its corners cut off by `corner` metres."""
    if not corner:
        return [(left, low), (right, low), (right, high), (left, high)]
    return [
        (left + corner, low),
        (right - corner, low),
        (right, low + corner),
        (right, high - corner),
        (right - corner, high),
        (left + corner, high),
        (left, high - corner),
        (left, low + corner),
    ]


def disc(x: float, y: float, radius: float, corners: int = 10) -> list[Point]:
    """A regular polygon, near enough a disc."""
    turns = (2 * math.pi * i / corners for i in range(corners))
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]


def mirrored(points: list[Point]) -> list[Point]:
    """The same polygon on the other side of the long axis."""
    return [(x, -y) for x, y in points]


def _roof(
    random: Random,
    edges: tuple[float, float, float, float],
    colour: Colour,
    sun: Point,
    kind: float,
) -> list[Part]:
    """One roof over a rectangle: flat, gabled or hipped; faces turned to the sun are brighter."""
    left, low, right, high = edges
    along, bright = right - left, 0.22
    middle = (low + high) / 2
    parts: list[Part] = [(rectangle(*edges), colour)]
    if kind < 0.35:  # flat: a parapet and what stands on it
        rim = 0.35
        parts.append(
            (
                rectangle(left + rim, low + rim, right - rim, high - rim),
                shade(colour, random.uniform(0.8, 0.93)),
            )
        )
        for _ in range(random.randrange(6)):
            w, h = random.uniform(0.6, 2.2), random.uniform(0.6, 2.2)
            x, y = (
                random.uniform(left + 1, max(left + 1, right - 3.3)),
                random.uniform(low + 1, max(low + 1, high - 3.3)),
            )
            parts.append((rectangle(x, y, x + w, y + h), shade(paint(random), 0.9)))
        return parts
    hip = 0.0 if kind < 0.75 else min((high - low) / 2, along * 0.35)
    faces = [
        ([(left, high), (right, high), (right - hip, middle), (left + hip, middle)], sun[1]),
        ([(left, low), (right, low), (right - hip, middle), (left + hip, middle)], -sun[1]),
    ]
    if hip:
        faces.append(([(right, low), (right, high), (right - hip, middle)], sun[0]))
        faces.append(([(left, low), (left, high), (left + hip, middle)], -sun[0]))
    parts += [(points, shade(colour, 1 + bright * facing)) for points, facing in faces]
    if random.random() < 0.35 and along > 7:  # solar panels or sky lights on one face
        x, y = left + hip + 0.8, middle + 0.6
        while x < right - hip - 1.6:
            parts.append(
                (
                    rectangle(x, y, x + 1.1, min(y + 1.8, high - 0.4)),
                    random.choice([(46, 54, 78), (176, 186, 192)]),
                )
            )
            x += 1.5
    elif random.random() < 0.5:
        x = random.uniform(left + 1, right - 2)
        parts.append((rectangle(x, middle + 0.4, x + 0.8, middle + 1.2), (96, 76, 70)))
    return parts


def building(random: Random, long: float, wide: float, sun: Point) -> Shape:
    """A house or a hall, plain or with a wing; `sun` points to the sun in its own axes."""
    colour = jitter(random, random.choice(ROOFS)) if random.random() < 0.7 else paint(random)
    kind = random.random()
    a, b = long / 2, wide / 2
    main = _roof(random, (-a, -b, a, b), colour, sun, kind)
    if random.random() < 0.55 or min(long, wide) < 6:
        return Shape(main, 1, random.uniform(3.0, 7.0))
    x = random.uniform(-a, a - wide * 0.6)
    side = _roof(
        random, (x, b * 0.2, x + wide * 0.6, b + wide * random.uniform(0.25, 0.5)), colour, sun, 0.0
    )
    return Shape([main[0], side[0], *side[1:], *main[1:]], 2, random.uniform(3.0, 7.0))
