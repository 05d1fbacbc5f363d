"""Several looks at one picture: boxes come back to where they are, and become one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from finetune.detector import Detector, Limits
from finetune.finder import DetectorFinder
from finetune.looks import LOOKS, LooksFinder, fuse, looking
from finetune.metrics import Found
from finetune.weights import detector_from_file
from groundwork.errors import UsageError
from tests.record_golden import write_detector


def _found(*rows: tuple[list[float], float, int]) -> Found:
    return Found(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.int64),
    )


class _White:
    """Finds the white rectangle of a frame, `off` pixels too far to the right."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
        self.shapes.append(frames.shape)
        assert frames.flags.c_contiguous
        found = []
        for frame in frames:
            y, x = np.nonzero(frame[:, :, 0])
            box = [x.min() + self.off, y.min(), x.max() + 1 + self.off, y.max() + 1]
            found.append(_found(([float(edge) for edge in box], 0.8, 2)))
        return found


@pytest.fixture
def frames() -> npt.NDArray[np.uint8]:
    made = np.zeros((2, 64, 96, 3), np.uint8)
    made[0, 5:12, 20:50] = 255
    made[1, 40:64, 0:7] = 255
    return made


@pytest.mark.parametrize("looks", [2, 4, 8])
def test_boxes_of_every_look_come_back(looks: int, frames: npt.NDArray[np.uint8]) -> None:
    white = _White()
    first, second = LooksFinder(white, looks)(frames)
    np.testing.assert_allclose(first.boxes, [[20, 5, 50, 12]], atol=1e-4)
    np.testing.assert_allclose(second.boxes, [[0, 40, 7, 64]], atol=1e-4)
    assert first.scores == pytest.approx([0.8]) and first.classes.tolist() == [2]
    assert len(white.shapes) == looks
    turned = [shape for shape in white.shapes if shape == (2, 96, 64, 3)]
    assert len(turned) == (4 if looks == 8 else 0)


@pytest.mark.parametrize("looks", [2, 4, 8])
def test_what_is_off_to_one_side_in_every_look_is_off_no_more(
    looks: int, frames: npt.NDArray[np.uint8]
) -> None:
    [alone, _] = _White(off=1.0)(frames)
    [mean, _] = LooksFinder(_White(off=1.0), looks)(frames)
    assert alone.boxes[0, 0] == 21
    np.testing.assert_allclose(mean.boxes, [[20, 5, 50, 12]], atol=1e-4)


def test_corners_are_the_mean_by_score_and_a_look_without_a_box_counts_as_nothing() -> None:
    looks = [
        _found(([10.0, 10.0, 30.0, 30.0], 0.9, 0)),
        _found(([12.0, 10.0, 32.0, 30.0], 0.3, 0)),
        _found(),
        _found(),
    ]
    fused = fuse(looks, 0.55)
    np.testing.assert_allclose(fused.boxes, [[10.5, 10, 30.5, 30]], atol=1e-5)
    assert fused.scores == pytest.approx([0.3])


def test_boxes_of_other_classes_of_one_look_or_far_apart_stay_two() -> None:
    box, near, far = [10.0, 10.0, 30.0, 30.0], [11.0, 10.0, 31.0, 30.0], [22.0, 10.0, 42.0, 30.0]
    two = fuse([_found((box, 0.9, 0)), _found((near, 0.8, 1))], 0.55)
    assert sorted(two.classes.tolist()) == [0, 1]
    assert len(fuse([_found((box, 0.9, 0), (near, 0.8, 0)), _found()], 0.55).boxes) == 2
    assert len(fuse([_found((box, 0.9, 0)), _found((far, 0.8, 0))], 0.55).boxes) == 2
    assert len(fuse([_found((box, 0.9, 0)), _found((near, 0.8, 0))], 0.55).boxes) == 1


def test_a_box_joins_the_one_that_it_has_most_in_common_with() -> None:
    first = _found(([0.0, 0.0, 20.0, 20.0], 0.9, 0), ([5.0, 0.0, 25.0, 20.0], 0.8, 0))
    second = _found(([6.0, 0.0, 26.0, 20.0], 0.8, 0))
    fused = fuse([first, second], 0.5)
    assert fused.scores == pytest.approx([0.8, 0.45])
    np.testing.assert_allclose(fused.boxes[0], [5.5, 0, 25.5, 20], atol=1e-5)


class _Some:
    """Finds four boxes in the frame as it is, the first two mirrored too, surer than before."""

    boxes = ([2.0, 8, 12, 24], [20.0, 8, 30, 24], [40.0, 8, 50, 24], [60.0, 8, 70, 24])

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
        self.looks += 1
        if self.looks % 2:
            scores = (0.2, 0.6, 0.3, 0.9)
            return [_found(*((b, s, 0) for b, s in zip(self.boxes, scores, strict=True)))]
        width = frames.shape[2]
        mirrored = [[width - b[2], b[1], width - b[0], b[3]] for b in self.boxes[:2]]
        return [_found((mirrored[0], 0.8, 0), (mirrored[1], 0.7, 0))]


def test_best_first_above_the_score_and_at_most_so_many() -> None:
    frame = np.zeros((1, 32, 96, 3), np.uint8)
    [found] = LooksFinder(_Some(), 2, Limits(score=0.2))(frame)
    # The third has 0.15 in the mean, and the best of one look is not the best of two.
    assert found.scores == pytest.approx([0.65, 0.5, 0.45])
    np.testing.assert_allclose(found.boxes, [_Some.boxes[n] for n in (1, 0, 3)], atol=1e-4)
    [fewer] = LooksFinder(_Some(), 2, Limits(score=0.2, most=1))(frame)
    assert fewer.scores == pytest.approx([0.65])


def test_of_two_that_did_not_become_one_and_still_overlap_the_better_one_stays() -> None:
    class Two:
        def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
            # Of a frame of 64, mirrored: 16 to 56 and 8 to 48 have 60 % in common.
            return [_found(([8.0, 8.0, 48.0, 24.0], 0.9, 0))]

    frame = np.zeros((1, 32, 64, 3), np.uint8)

    def count(iou: float) -> int:
        [found] = LooksFinder(Two(), 2, Limits(iou=iou), common=0.99)(frame)
        return len(found.boxes)

    assert count(0.9) == 2 and count(0.3) == 1


def test_nothing_found_is_nothing() -> None:
    fused = fuse([_found(), _found()], 0.55)
    assert fused.boxes.shape == (0, 4) and fused.scores.shape == fused.classes.shape == (0,)


@pytest.fixture
def detector(tmp_path: Path) -> Detector:
    write_detector(tmp_path / "detector.safetensors")
    return detector_from_file(tmp_path / "detector.safetensors")[0]


def test_one_look_is_the_detectors_own(detector: Detector) -> None:
    assert type(looking(detector, 1)) is DetectorFinder
    assert LOOKS == (1, 2, 4, 8)
    with pytest.raises(UsageError, match="looks=3 is none of 1, 2, 4, 8"):
        looking(detector, 3)
