"""Cars, trucks, aircraft and boats of drawn aerial scenes, from straight above.

All take their colours from one palette: colour does not give the class away, shape does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from groundwork.data.scene_shapes import Part, Point, Shape, disc, mirrored, paint, rectangle, shade


def car(random: Random) -> Shape:
    """A saloon, an estate or van, or a pick-up: 3.6 to 5.4 m."""
    colour, glass = paint(random), random.choice([(36, 44, 54), (58, 68, 80), (120, 138, 152)])
    kind = random.random()
    long = random.uniform(3.6, 4.9) if kind < 0.75 else random.uniform(4.7, 5.4)
    wide = random.uniform(1.65, 2.0)
    a, b = long / 2, wide / 2
    inner = b * 0.8
    nose = random.uniform(0.3, 0.55)
    side = [(a, b * 0.55), (a - 0.3, b * 0.95), (0.0, b), (0.3 - a, b * 0.97), (-a, b * 0.7)]
    parts: list[Part] = [(side + mirrored(side)[::-1], colour)]
    screen = a * nose
    parts.append(
        (
            [
                (screen, inner),
                (screen, -inner),
                (screen - 0.75, -inner * 0.85),
                (screen - 0.75, inner * 0.85),
            ],
            glass,
        )
    )
    rear = -a * (random.uniform(0.45, 0.65) if kind < 0.45 else 0.88)
    if kind < 0.75:
        rear_glass = [
            (rear, inner),
            (rear, -inner),
            (rear + 0.45, -inner * 0.85),
            (rear + 0.45, inner * 0.85),
        ]
        parts.append((rear_glass, glass))
    else:  # the open bed of a pick-up, sometimes loaded
        bed = shade(colour, 0.5) if random.random() < 0.6 else paint(random)
        parts.append((rectangle(-a * 0.92, -b * 0.75, -a * 0.1, b * 0.75), bed))
        rear = -a * 0.05
    roof = rectangle(rear + 0.5, -inner * 0.82, screen - 0.75, inner * 0.82)
    parts.append((roof, shade(colour, random.uniform(1.0, 1.18))))
    return Shape(parts, 1, random.uniform(1.3, 1.8))


def truck(random: Random) -> Shape:
    """A lorry of 5.5 to 16 m: box, flatbed or tanker; long ones have a trailer that turns."""
    b = random.uniform(1.15, 1.32)
    cab_long, load_long = random.uniform(1.7, 2.6), random.uniform(3.6, 7.0)
    trailer = random.random() < 0.45
    if trailer:
        load_long = random.uniform(7.5, 12.5)
    cab, load = paint(random), paint(random)
    total = cab_long + 0.3 + load_long
    front = total / 2
    back = front - cab_long
    parts: list[Part] = [
        (rectangle(back - 0.4, -b * 0.93, front, b * 0.93, 0.2), cab),
    ]
    turn = random.uniform(-0.3, 0.3) if trailer else 0.0
    cosine, sine = math.cos(turn), math.sin(turn)

    def turned(points: list[Point]) -> list[Point]:
        return [
            (back + (x - back) * cosine - y * sine, (x - back) * sine + y * cosine)
            for x, y in points
        ]

    start, end = back - 0.3, back - 0.3 - load_long
    parts.append((turned(rectangle(end, -b, start, b)), load))
    glass = (40, 48, 58)
    parts.append((rectangle(front - 0.65, -b * 0.8, front - 0.2, b * 0.8), glass))
    kind = random.random()
    if kind < 0.5:  # box or tarpaulin: a lighter middle, sometimes ribs
        parts.append(
            (turned(rectangle(end + 0.2, -b * 0.55, start - 0.2, b * 0.55)), shade(load, 1.1))
        )
        if random.random() < 0.4:
            for i in range(1, int(load_long / 1.2)):
                x = end + 1.2 * i
                parts.append(
                    (turned(rectangle(x, -b * 0.95, x + 0.2, b * 0.95)), shade(load, 0.75))
                )
    elif kind < 0.8:  # flatbed or tipper with a load
        parts.append(
            (turned(rectangle(end + 0.2, -b * 0.85, start - 0.2, b * 0.85)), shade(load, 0.55))
        )
        x = end + 0.4
        while x < start - 1.0:
            deep = min(random.uniform(0.8, 2.6), start - 0.4 - x)
            parts.append((turned(rectangle(x, -b * 0.7, x + deep, b * 0.7)), paint(random)))
            x += deep + random.uniform(0.1, 1.2)
    else:  # tanker: a rounded back with a bright ridge
        parts.append(
            (turned(rectangle(end + 0.15, -b * 0.3, start - 0.2, b * 0.3)), shade(load, 1.25))
        )
        for x in (end + load_long * 0.25, end + load_long * 0.5, end + load_long * 0.75):
            parts.append((turned(disc(x, 0.0, 0.3, 8)), shade(load, 0.6)))
    return Shape(parts, 2, random.uniform(2.6, 4.0))


def _wing(root: float, chord: float, tip: Point, tip_chord: float) -> list[Point]:
    """Half a wing, from its leading edge at the root to the tip."""
    return [(root, 0.0), tip, (tip[0] - tip_chord, tip[1]), (root - chord, 0.0)]


def aircraft(random: Random) -> Shape:
    """A light aircraft (8 m), a business jet, an airliner (to 36 m) or a delta-winged jet."""
    colour = paint(random)
    second = paint(random) if random.random() < 0.3 else shade(colour, random.uniform(0.82, 1.0))
    kind = random.random()
    if kind < 0.4:  # light: straight wing
        long = random.uniform(7.0, 10.5)
        half, chord, tip_chord, sweep, at, round_ = (
            long * random.uniform(0.58, 0.72),
            0.19,
            0.15,
            0.02,
            0.22,
            0.075,
        )
    elif kind < 0.85:  # business jet or airliner: swept wing
        long = random.uniform(13.0, 22.0) if kind < 0.66 else random.uniform(24.0, 36.0)
        half, chord, tip_chord, sweep, at, round_ = (
            long * random.uniform(0.42, 0.5),
            0.2,
            0.06,
            0.24,
            0.16,
            0.052,
        )
    else:  # delta
        long = random.uniform(11.0, 18.0)
        half, chord, tip_chord, sweep, at, round_ = (
            long * random.uniform(0.3, 0.38),
            0.48,
            0.1,
            0.36,
            0.18,
            0.06,
        )
    a, r = long / 2, long * round_
    root = long * at
    wing = _wing(root, long * chord, (root - long * sweep, half), long * tip_chord)
    tail_root, tail_span = -a + long * 0.14, half * random.uniform(0.34, 0.42)
    tail = _wing(tail_root, long * 0.11, (tail_root - long * 0.07, tail_span), long * 0.06)
    body = [(a, r * 0.25), (a - r * 1.4, r * 0.85), (a * 0.45, r), (-a * 0.3, r), (-a, r * 0.2)]
    parts: list[Part] = [
        (wing, second),
        (mirrored(wing), second),
        (tail, second),
        (mirrored(tail), second),
    ]
    if 0.4 <= kind < 0.85:  # engines under the wings or at the tail
        x, y = (root - long * 0.02, half * 0.33) if kind >= 0.66 else (-a * 0.45, r * 1.5)
        e = long * 0.028
        for side in (y, -y):
            parts.append(
                (rectangle(x - 3 * e, side - e, x + 2 * e, side + e, e * 0.5), shade(second, 0.75))
            )
    parts.append((body + mirrored(body)[::-1], colour))
    outline = len(parts)
    if kind < 0.4:
        parts.append(
            (rectangle(root - long * 0.02, -r * 0.7, root + long * 0.05, r * 0.7), (44, 52, 62))
        )
    else:
        parts.append((rectangle(a - r * 1.6, -r * 0.6, a - r * 1.1, r * 0.6), (44, 52, 62)))
    if random.random() < 0.5:  # the fin, seen on edge
        parts.append((rectangle(-a + 0.02 * long, -r * 0.16, -a * 0.62, r * 0.16), paint(random)))
    if random.random() < 0.3:  # flaps
        inner = [(x - long * 0.01, y * 0.96) for x, y in wing]
        for flap in (inner, mirrored(inner)):
            x0, x1 = flap[3][0], flap[2][0]
            y1 = flap[2][1]
            edge = [(x0 + 0.25 * (x1 - x0), y1 * 0.25), (x0 + 0.7 * (x1 - x0), y1 * 0.7)]
            strip = [
                *edge,
                (edge[1][0] + 0.03 * long, edge[1][1]),
                (edge[0][0] + 0.03 * long, edge[0][1]),
            ]
            parts.append((strip, shade(second, 0.8)))
    return Shape(parts, outline, long * 0.09)


def boat(random: Random) -> Shape:
    """A motor boat, a sailing yacht or a small barge: 4 to 18 m."""
    kind = random.random()
    long = random.uniform(9.0, 18.0) if kind > 0.8 else random.uniform(4.0, 12.0)
    slim = random.uniform(0.16, 0.21) if long < 7 else random.uniform(0.12, 0.17)
    a, b = long / 2, long * slim
    colour = paint(random)
    blunt = 0.5 if kind > 0.8 else 0.08
    shoulder = 0.75 if kind > 0.8 else random.uniform(0.2, 0.45)
    hull = [
        (a, b * blunt),
        (a * (1 + shoulder) / 2, b * 0.72),
        (a * shoulder, b),
        (-a * 0.7, b),
        (-a, b * 0.78),
    ]
    parts: list[Part] = [(hull + mirrored(hull)[::-1], colour)]
    inside = [(x * 0.88, y * 0.78) for x, y in parts[0][0]]
    parts.append(
        (
            inside,
            shade(colour, random.uniform(0.6, 0.85)) if random.random() < 0.5 else paint(random),
        )
    )
    if kind < 0.45:  # motor boat: wind screen, cabin or open seats
        parts.append((rectangle(-a * 0.25, -b * 0.6, a * 0.3, b * 0.6, b * 0.2), paint(random)))
        parts.append((rectangle(a * 0.2, -b * 0.55, a * 0.34, b * 0.55), (44, 54, 66)))
        if random.random() < 0.5:
            parts.append((rectangle(-a * 0.85, -b * 0.6, -a * 0.6, b * 0.6), (70, 72, 76)))
    elif kind < 0.8:  # sailing yacht: coach roof, cockpit, boom on the long axis
        parts.append((rectangle(-a * 0.1, -b * 0.45, a * 0.45, b * 0.45, b * 0.2), paint(random)))
        parts.append((rectangle(-a * 0.75, -b * 0.4, -a * 0.2, b * 0.4), (110, 92, 72)))
        parts.append((rectangle(-a * 0.6, -0.14, a * 0.15, 0.14), (225, 225, 220)))
    else:  # barge: hatches and a wheel house
        for i in range(4):
            x = -a * 0.45 + i * a * 0.3
            parts.append((rectangle(x, -b * 0.6, x + a * 0.24, b * 0.6), paint(random)))
        parts.append((rectangle(-a * 0.9, -b * 0.6, -a * 0.55, b * 0.6), (228, 228, 224)))
    return Shape(parts, 1, random.uniform(0.8, 2.5))


VEHICLES: dict[str, Callable[[Random], Shape]] = {
    "car": car,
    "truck": truck,
    "aircraft": aircraft,
    "boat": boat,
}
