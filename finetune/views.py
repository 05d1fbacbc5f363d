"""A labeled sample -> what training sees: a picture with its boxes, augmented, of one size a batch.

Everything is a function of the sample's position in the stream: its generator, the size of its
batch (multi-scale), and the other pictures that mosaic and mixing ask for, which are drawn from the
places behind it. So any number of workers and ranks makes the same batches, and a resumed run goes
on with them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.augment.contract import Compose, Item
from groundwork.data.decode import Picture
from groundwork.data.labels import LabeledSamples
from groundwork.data.loader import Arrays, Place, PlaceViews
from groundwork.data.order import sample_generator
from groundwork.data.shards import Sample
from groundwork.errors import DataError, UnavailableError

# Other pictures of a mosaic come from so many places ahead: near enough to lie in shards that are
# here already, far enough to differ.
REACH = 512
# Decoded pictures that each worker keeps: of a small labeled set all of them, which spares most of
# a mosaic's cost. No transform writes into what it is given.
KEPT_BYTES = 256 << 20
_FOR_SIZES = 1 << 40  # positions that no stream reaches: the generators of batches


@dataclass(frozen=True)
class DetectionViews(PlaceViews):
    """Augmented pictures for a detector.

    `sizes` are the sides that batches draw from; a batch is `batch_size` samples from `origin` on.
    """

    labeled: LabeledSamples
    augment: Compose
    sizes: Sequence[int]
    seed: int
    batch_size: int
    origin: int
    kept: Kept = field(default_factory=lambda: Kept(KEPT_BYTES))

    ragged = frozenset(("boxes", "classes", "crowds", "crowd_classes"))

    def at(self, place: Place) -> Arrays:
        """Return image (uint8 H W 3), colour, boxes (N 4, pixels of the image), classes (N).

        And crowds (M 4) with crowd_classes (M), which are neither objects nor background.
        """
        source = _Source(self, place, self.size_of(place.position))
        item = self.augment(source.load(place.sample, place.picture), source)
        crowd = item.classes < 0
        return {
            "image": item.pixels,
            "colour": item.colour,
            "boxes": item.boxes[~crowd],
            "classes": item.classes[~crowd],
            "crowds": item.boxes[crowd],
            "crowd_classes": ~item.classes[crowd],
        }

    def size_of(self, position: int) -> tuple[int, int]:
        """Return height and width of the pictures of the batch that a position is in."""
        if len(self.sizes) == 1:
            return self.sizes[0], self.sizes[0]
        batch = (position - self.origin) // self.batch_size
        generator = sample_generator(self.seed, _FOR_SIZES + self.origin + batch)
        side = int(self.sizes[int(generator.integers(len(self.sizes)))])
        return side, side


class Kept:
    """The items that were decoded last, up to a number of bytes of pixels."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._items: OrderedDict[tuple[object, ...], Item] = OrderedDict()

    def get(self, key: tuple[object, ...]) -> Item | None:
        """Return an item that is kept, and keep it longer."""
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: tuple[object, ...], item: Item) -> Item:
        """Keep an item; those not asked for longest go."""
        self._items[key] = item
        self._bytes += item.pixels.nbytes
        while self._bytes > self._most:
            self._bytes -= self._items.popitem(last=False)[1].pixels.nbytes
        return item


class _Source:
    """What the transforms of one sample may ask for."""

    def __init__(self, views: DetectionViews, place: Place, size: tuple[int, int]) -> None:
        self.views = views
        self.place = place
        self.generator = place.generator
        self.size = size
        self.reach = min(REACH, len(views.labeled) - 1)

    def other(self) -> Item:
        """Read another picture from near by in the stream; the same one where there is but one.

        One that is damaged is passed over: it is told where the stream itself comes to it.
        """
        distance = int(self.generator.integers(1, self.reach + 1)) if self.reach else 0
        for place in range(distance, distance + self.reach):
            try:
                return self.load(*self.place.neighbour(place))
            except UnavailableError:
                raise
            except DataError:
                continue
        return self.load(self.place.sample, self.place.picture)

    def load(self, sample: Sample, picture: Picture) -> Item:
        """Decode a picture with its boxes, the longer side as long as training's longer side."""
        key = (sample.source, sample.key, sample.offset, self.size)
        kept = self.views.kept.get(key)
        if kept is not None:
            return kept
        scale = max(self.size) / max(picture.width, picture.height)
        width = max(1, round(picture.width * scale))
        height = max(1, round(picture.height * scale))
        [pixels] = picture.cut([picture.whole], (height, width))
        found = self.views.labeled.annotations(sample, picture)
        by = np.array([width / picture.width, height / picture.height] * 2, np.float32)
        # A crowd goes through the chain as a box of the class ~c, which is below 0.
        classes = np.where(found.crowd, ~found.classes, found.classes)
        item = Item(pixels, found.boxes * by, classes)
        return self.views.kept.put(key, item)
