"""Layouts of drawn aerial scenes: which ground, roads and things lie where.

They are farmland, suburb, depot (halls and a parking lot), airfield, harbour and junction. Each may
hold stray things of other kinds (a boat on a trailer, a lorry at a farm), so that what lies around
a thing does not quite give its class away.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from groundwork.data.scene_shapes import disc, jitter, rectangle
from groundwork.data.scene_site import (
    WHITE,
    YELLOW,
    Material,
    Site,
    asphalt,
    concrete,
    fields,
    grass,
    parking,
    road,
    water,
)
from groundwork.data.scene_vehicles import VEHICLES


def farmland(site: Site) -> None:
    """Fields and woods, a lane, a farm with its yard."""
    random, r = site.random, site.reach
    fields(site, (-r, -r, r, r))
    along = random.uniform(-0.5, 0.5) * r
    road(
        site, (-r, along), (r, along + random.uniform(-8, 8)), random.uniform(3.5, 7.0), 0.02, 0.015
    )
    side = 1 if along < 0 else -1
    x, y = random.uniform(-0.5, 0.5) * r, along + side * random.uniform(14, 24)
    site.grounds.append(
        (rectangle(x - 17, y - 13, x + 17, y + 13, 4), random.choice([asphalt, grass])(random))
    )
    for dx, dy in ((-10, 7), (9, 8), (-10, -7), (10, -8)):
        if random.random() < 0.7:
            site.house(
                x + dx, y + dy, random.uniform(9, 16), random.uniform(6, 10), random.gauss(0, 0.1)
            )
    site.scatter(5, (x - 16, y - 12, x + 16, y + 12), ("car", "truck", "truck", "box", "boat"), 2.5)
    site.plant(14, (x - 20, y - 16, x + 20, y + 16))
    if random.random() < 0.35:
        pond = (random.uniform(-0.6, 0.6) * r, -y + random.uniform(-6, 6))
        blob = [
            (pond[0] + (px - pond[0]) * random.uniform(0.8, 1.2), py)
            for px, py in disc(*pond, 9.0, 14)
        ]
        site.grounds.append((blob, water(random)))
        if site.free(*pond, 6.0):
            site.vehicle("boat", *pond, random.uniform(0, 6.3))


def suburb(site: Site) -> None:
    """Streets with houses, gardens, drives, parked cars and trees."""
    random, r = site.random, site.reach
    site.grounds.append((rectangle(-r, -r, r, r), grass(random)))
    block, wide = random.uniform(44, 56), random.uniform(5.0, 8.0)
    cross = random.uniform(-0.6, 0.6) * r
    first = -r + random.uniform(0, 25)
    streets = [first + block * i for i in range(4) if first + block * i < r]
    for y in streets:
        for side in (-1, 1):
            x = -r + random.uniform(0, 8)
            while x < r:
                lot, set_back = random.uniform(13, 21), wide / 2 + random.uniform(8, 12)
                middle = x + lot / 2
                x += lot
                if abs(middle - cross) < wide / 2 + lot / 2 or random.random() < 0.08:
                    continue
                hy = y + side * set_back
                near, far = sorted((y, hy + side * 12))
                garden = rectangle(middle - lot / 2, near, middle + lot / 2, far)
                site.grounds.append((garden, grass(random)))
                site.house(
                    middle,
                    hy,
                    random.uniform(8, min(13, lot - 2)),
                    random.uniform(6, 10),
                    random.gauss(0, 0.04),
                )
                drive = middle + random.choice((-1, 1)) * (lot / 2 - 1.8)
                site.grounds.append(
                    (rectangle(drive - 1.5, min(y, hy), drive + 1.5, max(y, hy)), asphalt(random))
                )
                if random.random() < 0.6:
                    kind = random.choices(("car", "boat", "truck"), (0.84, 0.1, 0.06))[0]
                    site.vehicle(
                        kind, drive, y + side * (wide / 2 + random.uniform(3.2, 6)), math.pi / 2
                    )
                if random.random() < 0.2:
                    pool = Material((86, 160, 176), 0.02, 0.03)
                    site.grounds.append(
                        (
                            rectangle(middle - 3, hy + side * 7, middle + 2, hy + side * 10, 0.6),
                            pool,
                        )
                    )
                if random.random() < 0.4:
                    site.box(
                        middle + random.uniform(-3, 3),
                        hy + side * 8,
                        random.uniform(2, 4),
                        2.2,
                        0.0,
                    )
    for y in streets:
        road(site, (-r, y), (r, y), wide, 0.02, 0.006)
    road(site, (cross, -r), (cross, r), wide, 0.012, 0.006)
    site.plant(46, (-r, -r, r, r))


def depot(site: Site) -> None:
    """Halls with loading docks, a parking lot, containers, lorries."""
    random, r = site.random, site.reach
    site.grounds.append((rectangle(-r, -r, r, r), random.choice([asphalt, grass])(random)))
    split = random.uniform(-0.25, 0.25) * r
    parking(site, (-r, -r, r, split - 5), random.uniform(0.25, 0.8), random.uniform(0.02, 0.2))
    site.grounds.append((rectangle(-r, split - 4, r, r), asphalt(random)))
    x = -r
    while x < r:
        long, wide = random.uniform(14, 30), random.uniform(10, 18)
        site.house(x + long / 2, split + 18 + wide / 2, long, wide)
        dock = x + 2.0
        while dock < x + long - 2 and random.random() < 0.9:
            if random.random() < 0.5:
                site.vehicle("truck", dock, split + 10, math.pi / 2)
            dock += random.uniform(3.6, 6.0)
        x += long + random.uniform(3, 12)
    for _ in range(random.randrange(2, 6)):
        x, y = random.uniform(-r, r), random.uniform(split + 38, r)
        for i in range(random.randrange(1, 6)):
            site.box(x, y + 2.6 * i, random.choice((6.1, 12.2)), 2.4, random.gauss(0, 0.02))
    site.scatter(8, (-r, split, r, r), ("car", "truck", "box", "building", "boat"), 4.0)
    site.plant(12, (-r, -r, r, r))


def airfield(site: Site) -> None:
    """An apron with parked aircraft, a taxiway, a runway, hangars, service cars."""
    random, r = site.random, site.reach
    site.grounds.append((rectangle(-r, -r, r, r), grass(random)))
    top = random.uniform(0.0, 0.45) * r
    apron = (-r, -random.uniform(0.35, 0.8) * r, random.uniform(0.6, 1.0) * r, top)
    ground = concrete if random.random() < 0.8 else asphalt
    site.grounds.append((rectangle(*apron), ground(random)))
    slab = random.uniform(4, 9)
    for i in range(int((apron[2] - apron[0]) / slab)):
        site.line((apron[0] + i * slab, apron[1]), (apron[0] + i * slab, top), 0.1, (60, 60, 58))
    for i in range(int((top - apron[1]) / slab)):
        site.line(
            (apron[0], apron[1] + i * slab), (apron[2], apron[1] + i * slab), 0.1, (60, 60, 58)
        )
    runway = apron[1] - random.uniform(8, 16)
    site.grounds.append((rectangle(-r, runway - 22, r, runway), asphalt(random)))
    site.line((-r, runway - 11), (r, runway - 11), 0.6, WHITE, 9.0)
    for edge in (runway - 21.2, runway - 0.8):
        site.line((-r, edge), (r, edge), 0.4, WHITE)
    if random.random() < 0.4:  # the threshold
        for i in range(8):
            site.line(
                (r * 0.3, runway - 20 + 2.5 * i), (r * 0.3 + 14, runway - 20 + 2.5 * i), 1.2, WHITE
            )
    lane = random.uniform(apron[1] + 4, top - 4)
    site.line((-r, lane), (r, lane), 0.3, YELLOW)
    x = -r + 6
    while x < r:  # hangars beside the apron
        long = random.uniform(12, 24)
        if random.random() < 0.75:
            site.house(x + long / 2, top + random.uniform(10, 12), long, random.uniform(10, 16))
        x += long + random.uniform(2, 9)
    facing = random.choice((math.pi / 2, 0.6, 2.3, random.uniform(0, 3.1)))
    for _ in range(26):
        shape = VEHICLES["aircraft"](random)
        half = shape.radius
        x, y = random.uniform(-r, apron[2]), random.uniform(apron[1], top)
        if not site.free(x, y, half * 0.75):
            continue
        turn = facing if random.random() < 0.7 else random.uniform(0, 6.3)
        site.line((x - half * math.cos(turn), y - half * math.sin(turn)), (x, y), 0.25, YELLOW)
        site.put("aircraft", shape, x, y, turn)
        if len(site.things) > 18:
            break
    site.scatter(
        9, (-r, apron[1], apron[2], top + 4), ("car", "truck", "truck", "box", "building"), 3.0
    )
    if random.random() < 0.5:
        parking(site, (random.uniform(-r, 0), top + 20, r, r), 0.6)
    site.plant(8, (-r, top + 18, r, r))


def _jetties(site: Site, shore: float) -> None:
    """Jetties from the shore into the water, and boats at the berths on both sides."""
    random, r = site.random, site.reach
    plank = jitter(random, random.choice([(138, 120, 98), (160, 156, 148), (112, 100, 88)]))
    x = -r + random.uniform(3, 16)
    while x < r:  # a jetty, and berths on both sides of it
        long = random.uniform(14, 40)
        site.grounds.append(
            (
                rectangle(x - 1.0, shore - long, x + 1.0, shore + 1),
                Material(plank, 0.05, 0.05, 0.08, 0.5),
            )
        )
        y = shore - 3.5
        while y > shore - long:
            for side in (-1, 1):
                shape = VEHICLES["boat"](random)
                half = max(p[0] for p in shape.parts[0][0])
                if random.random() < 0.72 and half < 7:
                    site.put(
                        "boat",
                        shape,
                        x + side * (half + 1.4),
                        y,
                        random.choice((0.0, math.pi)) + random.gauss(0, 0.06),
                    )
            y -= random.uniform(3.6, 5.2)
        x += random.uniform(20, 30)


def _under_way(site: Site, shore: float) -> None:
    """Boats under way or at anchor, with or without a wake."""
    random, r = site.random, site.reach
    for _ in range(random.randrange(1, 5)):
        x, y, turn = random.uniform(-r, r), random.uniform(-r, shore - 8), random.uniform(0, 6.3)
        if site.free(x, y, 9.0):
            c, s = math.cos(turn), math.sin(turn)
            if random.random() < 0.5:
                for spread in (-0.22, 0.22):
                    tail = (x - 22 * math.cos(turn + spread), y - 22 * math.sin(turn + spread))
                    site.line((x - c, y - s), tail, 0.9, (206, 214, 216))
            site.put("boat", VEHICLES["boat"](random), x, y, turn)


def harbour(site: Site) -> None:
    """A shore or quay, jetties with boats at their berths, boats under way."""
    random, r = site.random, site.reach
    site.grounds.append((rectangle(-r, -r, r, r), water(random)))
    shore = random.uniform(-0.1, 0.5) * r
    natural = random.random() < 0.4
    edge = [
        (-r + 2 * r * i / 14, shore + (random.gauss(0, 1.6) if natural else 0.0)) for i in range(15)
    ]
    site.grounds.append(([*edge, (r, r), (-r, r)], grass(random) if natural else asphalt(random)))
    if not natural:
        site.line((-r, shore + 0.3), (r, shore + 0.3), 0.7, (150, 146, 138))
    _jetties(site, shore)
    _under_way(site, shore)
    if random.random() < 0.4:  # floats and pontoons: clutter on the water
        site.scatter(5, (-r, -r, r, shore - 6), ("box",), 5.0)
    road(site, (-r, shore + 9), (r, shore + 9), random.uniform(5, 8), 0.025, 0.02)
    if r - shore > 34 and random.random() < 0.6:
        parking(site, (-r, shore + 15, random.uniform(-0.2, 1) * r, r), 0.55, 0.1)
    else:
        for _ in range(7):
            x, y = random.uniform(-r, r), random.uniform(shore + 20, max(shore + 21, r))
            if site.free(x, y, 9):
                site.house(
                    x, y, random.uniform(8, 18), random.uniform(6, 11), random.choice((0.0, 1.57))
                )
    site.scatter(8, (-r, shore + 3, r, shore + 30), ("boat", "car", "truck", "box", "box"), 3.5)
    site.plant(12, (-r, shore + 4, r, r))


def junction(site: Site) -> None:
    """Two main roads that cross, traffic in every lane, what lies in the corners."""
    random, r = site.random, site.reach
    fields(site, (-r, -r, r, r), 1)
    lean, wide = random.gauss(0, 0.25) * r, random.choice((7.0, 7.5, 14.0))
    other, x, y = (
        random.choice((6.5, 10.5)),
        random.uniform(-0.4, 0.4) * r,
        random.uniform(-0.4, 0.4) * r,
    )
    road(site, (x - lean, -r), (x + lean, r), other, 0.03, 0.03)
    road(site, (-r, y), (r, y), wide, 0.04, 0.04)
    if random.random() < 0.5:  # a crossing for walkers
        for i in range(int(wide)):
            site.line((x - other - 3, y - wide / 2 + i), (x - other, y - wide / 2 + i), 0.5, WHITE)
    for sx in (-1, 1):
        for sy in (-1, 1):
            draw = random.random()
            cx, cy = x + sx * (other / 2 + 20), y + sy * (wide / 2 + 16)
            if draw < 0.3:
                parking(site, (cx - 14, cy - 12, cx + 14, cy + 12), 0.5, 0.1)
            elif draw < 0.65:
                site.house(
                    cx,
                    cy,
                    random.uniform(10, 22),
                    random.uniform(8, 14),
                    random.choice((0.0, 1.57)),
                )
            site.scatter(
                2, (cx - 14, cy - 12, cx + 14, cy + 12), ("box", "building", "truck", "boat"), 6.0
            )
    site.plant(24, (-r, -r, r, r))


LAYOUTS: tuple[Callable[[Site], None], ...] = (farmland, suburb, depot, airfield, harbour, junction)
