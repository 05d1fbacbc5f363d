"""Drawing an aerial scene: a layout in metres becomes a picture with exact boxes and classes.

The ground is one map of materials; its colour, grain, blotches and rows are made for all pixels at
once. Markings, shadows and things are drawn at twice the size and averaged down. Then the camera:
uneven light, a colour cast, haze, blur and noise.

The same (seed, index, size) draws the same scene: every choice comes from generators keyed by them,
whose streams the makers of Python and numpy keep stable. Pixels may differ by rounding between
builds of Pillow and numpy.
"""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from groundwork.data.scene_labels import View, in_order, label_things
from groundwork.data.scene_layouts import LAYOUTS
from groundwork.data.scene_shapes import Point
from groundwork.data.scene_site import Material, Site, Thing

VERSION = 1  # raise it when anything here draws differently: caches are named by it
_STRENGTH = 400.0  # strengths up to 0.64 are kept in a byte

Floats = npt.NDArray[np.float32]


class Scene(NamedTuple):
    """A picture (H W 3), boxes (N 4: left, top, right, bottom in pixels), places in CLASSES (N)."""

    picture: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]


def draw_scene(seed: int, index: int, size: int = 256) -> Scene:
    """Draw scene `index` of the endless row that `seed` names; `size` is only its resolution."""
    random = Random(f"scene {VERSION} {seed} {index}")
    site = plan_scene(random)
    # What is coarse is drawn before what depends on the size, and each has a stream of its own.
    ground, camera = (
        np.random.Generator(np.random.Philox(key=random.getrandbits(128))) for _ in range(2)
    )
    image = _draw_ground(site, size, ground)
    _draw_things(image, site, View(site, 2 * size))
    picture = _photograph(image.reduce(2), camera, random)
    boxes, classes = label_things(site, size)
    return Scene(picture, boxes, classes)


def plan_scene(random: Random) -> Site:
    """Choose a layout, its heading, the ground that the picture covers and the sun, and fill it."""
    extent = 44.0 * (96.0 / 44.0) ** random.random()
    azimuth = random.uniform(0, 2 * math.pi)
    site = Site(
        random, extent, random.uniform(0, 2 * math.pi), (math.cos(azimuth), math.sin(azimuth))
    )
    random.choice(LAYOUTS)(site)
    side = extent / 2
    view = View(site, 2)  # two pixels a side: the middle is (1, 1)

    def near(x: float, y: float, margin: float) -> bool:
        return all(abs(p - 1) * side < side + margin for p in view.point(x, y))

    # Shadows are no longer than 1.1 times the height.
    site.things = [t for t in site.things if near(t.x, t.y, t.shape.radius + 1.1 * t.shape.height)]
    site.trees = [t for t in site.trees if near(t[0], t[1], 3 * t[2])]
    return site


def _smooth(noise: np.random.Generator, cells: int, size: int) -> Floats:
    """Noise without steps: random values on a coarse grid, of unit variance there."""
    grid = Image.fromarray(noise.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _draw_ground(site: Site, size: int, noise: np.random.Generator) -> Image.Image:
    """The ground with its texture and markings, at twice the size."""
    view = View(site, 2 * size)
    materials = [Material((110, 110, 96))]
    patches = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(patches)
    for points, material in site.grounds:
        polygon = view.points(points)
        # A byte names the material; what lies outside needs none, and a scene never has so many.
        if _crosses(polygon, 2 * size) and len(materials) < 256:
            draw.polygon(polygon, fill=len(materials))
            materials.append(material)

    def spread(values: list[float]) -> Floats:
        table = [min(255, round(_STRENGTH * v)) for v in values] + [0] * (256 - len(values))
        return np.asarray(patches.point(table).reduce(2), np.float32) / _STRENGTH

    blotches = 0.6 * _smooth(noise, 51, size) + 0.7 * _smooth(noise, 9, size)
    grain = noise.standard_normal((size, size), dtype=np.float32)
    which = np.asarray(patches)[::2, ::2]
    turns = [4 * math.pi / (m.pitch * view.scale) for m in materials]
    across = np.asarray(
        [t * math.cos(m.angle + view.heading) for t, m in zip(turns, materials, strict=True)],
        np.float32,
    )
    down = np.asarray(
        [t * math.sin(m.angle + view.heading) for t, m in zip(turns, materials, strict=True)],
        np.float32,
    )
    place = np.arange(size, dtype=np.float32)
    phase = across[which] * place + down[which] * place[:, None] + 0.8 * blotches
    texture = (
        1
        + spread([m.fine for m in materials]) * grain
        + spread([m.coarse for m in materials]) * blotches
    )
    texture += spread([m.rows for m in materials]) * np.sin(phase)
    patches.putpalette([channel for m in materials for channel in m.colour])
    bands = [np.asarray(band) * texture for band in patches.convert("RGB").reduce(2).split()]
    ground = _merged(bands).resize((2 * size, 2 * size), Image.Resampling.NEAREST)
    brush = ImageDraw.Draw(ground, "RGBA")
    for points, paint, opacity in site.marks:
        brush.polygon(view.points(points), fill=(*paint, opacity))
    return ground


def _crosses(polygon: list[Point], side: int) -> bool:
    """Whether the extent of a polygon meets the canvas."""
    return all(
        min(p[axis] for p in polygon) < side and max(p[axis] for p in polygon) > -1
        for axis in (0, 1)
    )


def _merged(bands: list[Floats]) -> Image.Image:
    """Three channels as one picture; one channel at a time is several times as fast in numpy."""
    whole = [np.clip(band, 0, 255).astype(np.uint8) for band in bands]
    return Image.merge("RGB", [Image.fromarray(band) for band in whole])


def _hull(points: list[Point]) -> list[Point]:
    """The convex hull (Andrew's monotone chain)."""
    points = sorted(points)
    chains: list[list[Point]] = []
    for run in (points, points[::-1]):
        chain: list[Point] = []
        for x, y in run:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2], chain[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        chains.append(chain[:-1])
    return chains[0] + chains[1]


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, view: View) -> None:
    """Draw one thing without its shadow."""
    for polygon, (_, colour) in zip(
        view.parts(thing, outline=False), thing.shape.parts, strict=True
    ):
        draw.polygon(polygon, fill=colour)


def _draw_things(image: Image.Image, site: Site, view: View) -> None:
    """Shadows and things, what lies lower first; trees last."""
    random = site.random
    length, darkness = random.uniform(0.25, 1.1), random.randrange(70, 165)
    dx, dy = view.point(-site.sun[0] * length, -site.sun[1] * length)
    dx, dy = dx - view.middle, dy - view.middle
    draw = ImageDraw.Draw(image)
    for buildings in (False, True):
        layer = [thing for thing in in_order(site) if (thing.kind == "building") == buildings]
        shadows = Image.new("L", image.size)
        dark = ImageDraw.Draw(shadows)
        for thing in layer:
            sx, sy = dx * thing.shape.height, dy * thing.shape.height
            for outline in view.parts(thing, outline=True):
                moved = [(x + sx, y + sy) for x, y in outline]
                # Things on wheels and keels are lower than wide: nothing shows between the two.
                dark.polygon(_hull(outline + moved) if buildings else moved, fill=darkness)
        for x, y, radius in site.trees if buildings else ():
            (px, py), r = view.point(x, y), radius * view.scale
            px, py = px + dx * radius * 1.5, py + dy * radius * 1.5
            dark.ellipse((px - r, py - r, px + r, py + r), fill=darkness)
        if where := shadows.getbbox():
            image.paste((12, 15, 28), where, shadows.crop(where))
        for thing in layer:
            draw_thing(draw, thing, view)
    _draw_trees(draw, site, view)


def _draw_trees(draw: ImageDraw.ImageDraw, site: Site, view: View) -> None:
    """Crowns of tufts, brighter on the side that the sun is on."""
    random = site.random
    red, green, blue = random.choice(
        [(62, 82, 46), (78, 96, 54), (52, 70, 48), (112, 104, 60), (96, 88, 72)]
    )
    sun = view.point(*site.sun)
    sun = ((sun[0] - view.middle) / view.scale, (sun[1] - view.middle) / view.scale)
    for x, y, radius in site.trees:
        (px, py), r = view.point(x, y), radius * view.scale
        tone = random.uniform(0.75, 1.25)
        hue = random.uniform(0.85, 1.2)
        wide, high = r * random.uniform(0.85, 1.0), r * random.uniform(0.85, 1.0)
        fill = (int(red * tone * hue), int(green * tone), int(blue * tone))
        draw.ellipse((px - wide, py - high, px + wide, py + high), fill=fill)
        for _ in range(1 + int(1.2 * radius)):
            turn, far, tuft = (
                6.28 * random.random(),
                r * (0.25 + 0.4 * random.random()),
                r * (0.2 + 0.2 * random.random()),
            )
            c, s = math.cos(turn), math.sin(turn)
            lit = tone * (1 + 0.3 * (c * sun[0] + s * sun[1]) + 0.1 * random.random())
            tx, ty = px + far * c, py + far * s
            fill = (int(red * lit * hue), int(green * lit), int(blue * tone))
            draw.ellipse((tx - tuft, ty - tuft, tx + tuft, ty + tuft), fill=fill)


def _photograph(
    image: Image.Image, noise: np.random.Generator, random: Random
) -> npt.NDArray[np.uint8]:
    """What a camera in the air makes of it: blur, uneven light, a colour cast, haze and noise."""
    if random.random() < 0.5:
        image = image.filter(ImageFilter.BoxBlur(random.uniform(0.2, 0.6)))
    size = image.width
    light = 1 + random.uniform(0, 0.09) * _smooth(noise, 3, size)
    cast, exposure = [random.gauss(1, 0.03) for _ in range(3)], random.uniform(0.88, 1.12)
    contrast, haze, strength = (
        random.uniform(0.86, 1.1),
        random.uniform(-4, 10),
        random.uniform(1, 4),
    )
    speckle = strength * noise.standard_normal((size, size), dtype=np.float32)
    bands = []
    for band, gain, shift in zip(image.split(), cast, (17, 29, 41), strict=True):
        gain *= exposure
        values = np.asarray(band, np.float32) * np.float32(gain * contrast)
        values += np.float32(110 * gain * (1 - contrast) + haze)
        values *= light
        # One field of noise, shifted: the channels' noise is alike only in part, as a sensor's is.
        values += 0.7 * speckle
        values += 0.6 * np.roll(speckle, shift, axis=0)
        bands.append(values)
    picture: npt.NDArray[np.uint8] = np.asarray(_merged(bands))
    return picture
