"""Claims about tiles: every object once, wherever tile borders cut it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from finetune.detector import Detections, Limits
from finetune.tiles import Find, find_in_tiles, merge, needs_tiles
from groundwork.data.tiles import tiles_of

TILE, OVERLAP = 128, 0.25
Pixels = npt.NDArray[np.uint8]


def detections(boxes: object, scores: object = None, classes: object = None) -> Detections:
    box = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    number = len(box)
    return Detections(
        box,
        torch.ones(number) if scores is None else torch.tensor(scores),
        torch.zeros(number, dtype=torch.int64) if classes is None else torch.tensor(classes),
    )


def painted(boxes: npt.NDArray[np.int64], width: int, height: int) -> Pixels:
    """Paint each box in a value of its own, from 101 up; every second one is of class 1."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for value, (left, top, right, bottom) in enumerate(boxes.tolist(), 101):
        pixels[top:bottom, left:right] = value
    return pixels


def finder(whole: bool, seen: list[tuple[int, int]] | None = None) -> Find:
    """Find painted boxes exactly: in tiles, and in the picture as a whole if `whole`."""

    def find(areas: Sequence[Pixels], longer: int) -> list[Detections]:
        return [find_one(area, longer) for area in areas]

    def find_one(pixels: Pixels, longer: int) -> Detections:
        if seen is not None:
            seen.append(pixels.shape[:2])
        boxes, values = [], []
        if longer == max(pixels.shape[:2]) or whole:
            for value in np.unique(pixels[pixels > 100]).tolist():
                rows, columns = np.nonzero(pixels[:, :, 0] == value)
                boxes.append((columns.min(), rows.min(), columns.max() + 1.0, rows.max() + 1.0))
                values.append(value)
        scores = [0.9 - 0.001 * len(values)] * len(values)
        return detections(boxes, scores, [value % 2 for value in values])

    return find


def rows(found: Detections | npt.NDArray[np.int64]) -> list[list[float]]:
    boxes = found.boxes if isinstance(found, Detections) else found
    return sorted([float(edge) for edge in box] for box in boxes.tolist())


def run(boxes: npt.NDArray[np.int64], width: int, height: int, *, whole: bool) -> Detections:
    return find_in_tiles(
        painted(boxes, width, height), finder(whole),
        image_size=96, tile=TILE, overlap=OVERLAP, limits=Limits(),
    )  # fmt: skip


def scattered(seed: int, width: int, height: int) -> npt.NDArray[np.int64]:
    """Draw boxes that do not touch, from 3 pixels to beyond a tile."""
    generator = np.random.default_rng(seed)
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(300):
        sides = np.exp(generator.uniform(np.log(3), np.log(200), 2)).astype(int)
        if (sides >= (width, height)).any():
            continue
        left, top = generator.integers(0, np.array((width, height)) - sides).tolist()
        box = (left, top, left + int(sides[0]), top + int(sides[1]))
        if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in boxes):
            boxes.append(box)
    return np.array(boxes[:150], np.int64)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_box_is_found_once(seed: int, whole: bool) -> None:
    width, height = 500 + 13 * seed, 330 + 7 * seed
    boxes = scattered(seed, width, height)
    assert len(boxes) > 30
    assert rows(run(boxes, width, height, whole=whole)) == rows(boxes)


@pytest.mark.parametrize("whole", [True, False])
def test_every_place_and_length_along_a_border(whole: bool) -> None:
    # Tiles begin at 0, 86, 172: strips of 42 pixels, at 86 to 128 and 172 to 214.
    assert [tile.left for tile in tiles_of(300, 64, TILE, OVERLAP)] == [0, 86, 172]
    for left in range(60, 140, 3):
        for length in (1, 2, 3, 20, 40, 41, 42, 43, 44, 60, 86, 127, 128, 129, 150):
            box = np.array([[left, 10, left + length, 30]])
            assert rows(run(box, 300, 64, whole=whole)) == rows(box), (left, length)


def test_a_box_larger_than_a_tile() -> None:
    box = np.array([[20, 20, 450, 300]])
    for whole in (True, False):
        assert rows(run(box, 500, 330, whole=whole)) == rows(box)


def test_tiles_cover_and_overlap() -> None:
    for width, height in ((961, 300), (1000, 1000), (5000, 641)):
        tiles = tiles_of(width, height, 640, 0.2)
        assert {(t.right - t.left, t.bottom - t.top) for t in tiles} == {(640, min(640, height))}
        lefts = sorted({tile.left for tile in tiles})
        assert lefts[0] == 0 and lefts[-1] + 640 == width
        assert max(np.diff(lefts)) <= 512
        assert max(tile.bottom for tile in tiles) == height and min(t.top for t in tiles) == 0
    assert needs_tiles(961, 10, 640) and not needs_tiles(960, 960, 640)


@pytest.mark.parametrize("at_once", [1, 7, 8, 50])
def test_the_detector_sees_each_tile_once_and_the_whole(at_once: int) -> None:
    seen: list[tuple[int, int]] = []
    boxes = scattered(1, 500, 330)
    found = find_in_tiles(
        painted(boxes, 500, 330), finder(True, seen), image_size=96, tile=128, overlap=0.25,
        limits=Limits(), at_once=at_once,
    )  # fmt: skip
    assert seen == [(128, 128)] * 20 + [(330, 500)]
    assert rows(found) == rows(boxes)


def merged(first: Detections, second: Detections, whole: Detections, most: int = 300) -> Detections:
    tiles = tiles_of(200, 100, 120, 0.3)  # 0 to 120 and 80 to 200
    assert len(tiles) == 2
    return merge(tiles, [first, second], whole, Limits().iou, most)


NONE = detections([])


def test_a_piece_goes_though_its_score_is_better_and_it_misses_the_edge_a_little() -> None:
    piece = detections([[90, 10, 118.5, 40]], [0.9])
    clear = detections([[90, 10, 140, 40]], [0.3])
    assert rows(merged(piece, clear, NONE)) == rows(clear)
    long_piece = detections([[20, 10, 117, 40]], [0.9])  # beyond the strip, 3 pixels of 97
    assert rows(merged(long_piece, NONE, detections([[20, 10, 150, 40]], [0.3]))) == [
        [20, 10, 150, 40]
    ]


def test_classes_are_kept_apart() -> None:
    piece = detections([[20, 10, 120, 40]], [0.9], [1])
    whole = detections([[20, 10, 150, 40]], [0.3], [0])
    assert len(merged(piece, NONE, whole).boxes) == 2


def test_a_piece_that_nobody_sees_better_stays() -> None:
    piece = detections([[20, 10, 120, 40]], [0.9])
    assert rows(merged(piece, NONE, NONE)) == rows(piece)
    # In the strip the neighbour saw it better, and nothing there.
    assert not len(merged(detections([[100, 10, 120, 40]]), NONE, NONE).boxes)


def test_a_tile_is_believed_before_the_small_picture() -> None:
    exact = detections([[20, 10, 40, 30], [50, 10, 70, 30]], [0.5, 0.5])
    rough = detections([[24, 14, 44, 34], [45, 5, 75, 35]], [0.9, 0.9])
    assert rows(merged(exact, NONE, rough)) == rows(exact)
    # Larger than the strip, it may be what tiles see parts of.
    large = detections([[10, 5, 90, 90]], [0.9])
    assert len(merged(exact, NONE, large).boxes) == 3


def test_best_first_and_no_more_than_asked() -> None:
    first = detections([[0, 0, 10, 10], [20, 0, 30, 10]], [0.2, 0.8])
    second = detections([[150, 0, 160, 10]], [0.5])
    found = merged(first, second, NONE, most=2)
    assert found.scores.tolist() == pytest.approx([0.8, 0.5])
    assert not len(merged(NONE, NONE, NONE).boxes)


def test_a_scene_has_as_many_boxes_as_its_tiles() -> None:
    """The limit of a view is none of a scene, unless one is given."""

    def find(areas: Sequence[Pixels], longer: int) -> list[Detections]:
        if longer != TILE:
            return [NONE]
        spots = [(x, y, x + 4, y + 4) for x in range(8, 118, 10) for y in range(8, 118, 10)]
        scores = np.linspace(0.9, 0.3, len(spots)).tolist()
        return [detections(spots, scores, [0] * len(spots)) for _ in areas]

    def seen(most: int | None) -> Detections:
        return find_in_tiles(
            np.zeros((330, 500, 3), np.uint8), find, image_size=96, tile=TILE, overlap=OVERLAP,
            limits=Limits(), most=most,
        )  # fmt: skip

    every, some = seen(None), seen(20)
    assert len(every.boxes) > 1000
    assert torch.equal(some.boxes, every.boxes[:20])
