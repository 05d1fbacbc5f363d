"""Task-aligned assignment by hand-worked cases."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import complete_box_iou

from finetune.assign import Targets, assign, pairwise_ciou
from finetune.head import anchors_of

ANCHORS = anchors_of(64, 64, torch.zeros(1))  # 64 + 16 + 4 points


def targets(*rows: tuple[int, tuple[float, float, float, float], int]) -> Targets:
    return Targets(
        torch.tensor([row[0] for row in rows], dtype=torch.int64),
        torch.tensor([row[1] for row in rows], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )


def around_points(half: float, pictures: int = 1) -> torch.Tensor:
    """Every point predicts a square around itself."""
    points = ANCHORS.points
    return torch.cat((points - half, points + half), 1).repeat(pictures, 1, 1)


def test_ciou_of_pairs_is_the_diagonal_of_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, 2, generator=generator) * 50
    side = torch.rand(50, 2, 2, generator=generator) * 40 + 1
    first, second = torch.cat((corner, corner + side), 2).unbind(1)
    expected = complete_box_iou(first, second).diagonal()
    torch.testing.assert_close(pairwise_ciou(first, second), expected)


def test_two_boxes_without_area_have_a_finite_overlap() -> None:
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert torch.isfinite(pairwise_ciou(point, point)).all()


def test_only_points_inside_a_box_of_their_own_picture_are_positive() -> None:
    wanted = targets((0, (8, 8, 40, 40), 0), (1, (0, 0, 16, 16), 1))
    scores = torch.full((2, 84, 2), 0.5)
    found = assign(around_points(8, 2), scores, ANCHORS, wanted, topk=1000)
    for image, point, row in zip(found.image, found.point, found.target, strict=True):
        x, y = ANCHORS.points[point]
        left, top, right, bottom = wanted.boxes[row]
        assert left < x < right and top < y < bottom
        assert image == wanted.image[row]
    # 4 x 4 points of stride 8 in the first box, one of stride 16 (24, 24), one of stride 32.
    assert int((found.target == 0).sum()) == 16 + 1 + 1
    assert int((found.target == 1).sum()) == 4 + 1


def test_the_best_points_of_a_box_are_taken_and_the_best_has_its_overlap_as_target() -> None:
    wanted = targets((0, (16, 16, 32, 32), 1))  # four points of stride 8, one of stride 16
    boxes = around_points(8)
    scores = torch.full((1, 84, 2), 0.25)
    found = assign(boxes, scores, ANCHORS, wanted, topk=3)
    assert len(found.point) == 3
    overlap = pairwise_ciou(boxes[0, found.point], wanted.boxes[found.target])
    best = int(overlap.argmax())
    assert ANCHORS.points[found.point[best]].tolist() == [24.0, 24.0]  # stride 16's, an exact fit
    assert overlap[best] == pytest.approx(1.0)
    assert found.score[best] == pytest.approx(1.0)
    # The others by hand: t is proportional to overlap ** 6, all scores being equal.
    torch.testing.assert_close(found.score, overlap**6, rtol=1e-4, atol=1e-6)


def test_a_higher_score_for_the_boxs_own_class_is_preferred() -> None:
    wanted = targets((0, (16, 16, 32, 32), 1))
    scores = torch.full((1, 84, 2), 0.01)
    inside = [i for i, p in enumerate(ANCHORS.points[:64].tolist()) if min(p) > 16 and max(p) < 32]
    scores[0, inside[2], 1] = 0.9
    scores[0, inside[1], 0] = 0.9  # of another class
    boxes = wanted.boxes.repeat(84, 1)[None]  # all overlap alike
    found = assign(boxes, scores, ANCHORS, wanted, topk=1)
    assert found.point.tolist() == [inside[2]]


def test_a_point_that_two_boxes_want_goes_to_the_one_it_overlaps_more() -> None:
    small, large = (20.0, 20.0, 28.0, 28.0), (0.0, 0.0, 64.0, 64.0)
    wanted = targets((0, large, 0), (0, small, 0))
    found = assign(around_points(4), torch.full((1, 84, 1), 0.5), ANCHORS, wanted, topk=1000)
    assert len(set(found.point.tolist())) == len(found.point)
    owners = dict(zip(found.point.tolist(), found.target.tolist(), strict=True))
    inside_small = [
        i for i, (x, y) in enumerate(ANCHORS.points.tolist()) if 20 < x < 28 and 20 < y < 28
    ]
    assert inside_small and all(owners[i] == 1 for i in inside_small)


def test_a_box_smaller_than_a_cell_is_found_by_a_point() -> None:
    wanted = targets((0, (17.0, 17.0, 19.0, 19.0), 0))  # the nearest points: (20, 20), (12, 12)
    found = assign(around_points(4), torch.full((1, 84, 1), 0.5), ANCHORS, wanted)
    assert len(found.point) >= 1


def test_a_batch_without_boxes_has_no_positive_points() -> None:
    found = assign(around_points(8), torch.full((1, 84, 2), 0.5), ANCHORS, targets())
    assert len(found.image) == len(found.point) == len(found.target) == len(found.score) == 0


@pytest.mark.parametrize(
    "box", [(28, 28, 36, 36), (29, 29, 35, 35), (12, 40, 20, 46), (0, 0, 2, 2), (56, 60, 64, 64)]
)
def test_a_small_box_has_a_point_wherever_it_lies(box: tuple[float, float, float, float]) -> None:
    found = assign(around_points(4), torch.full((1, 84, 1), 0.5), ANCHORS, targets((0, box, 0)))
    assert len(found.point) == 1 and ANCHORS.strides[found.point[0]] == 8
