"""The parts of the detection loss: hand-worked values, and an independent computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.assign import Assignment, Targets
from finetune.detector import build_detector
from finetune.head import BINS, anchors_of
from finetune.losses import (
    BOX_LOSSES,
    DetectionLoss,
    box_shares,
    class_shares,
    class_targets,
    classification_loss,
    distribution_loss,
    overlaps,
    penalty,
    sides_in_strides,
)
from finetune.recipe import ClassificationKeys, LossKeys, build


def one(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_box_losses_of_two_boxes_by_hand() -> None:
    first, second = one(0, 0, 2, 2), one(1, 1, 3, 3)
    iou = 1 / 7  # 1 shared of 4 + 4 - 1
    assert float(overlaps(first, second)) == pytest.approx(iou)
    assert float(BOX_LOSSES["iou"](first, second)) == pytest.approx(1 - iou)
    # 9 around both, of which 7 are covered.
    assert float(BOX_LOSSES["giou"](first, second)) == pytest.approx(1 - iou + 2 / 9, abs=1e-5)
    # Centres sqrt(2) apart, a diagonal of sqrt(18) around both; equal shapes.
    assert float(BOX_LOSSES["diou"](first, second)) == pytest.approx(1 - iou + 2 / 18, abs=1e-5)
    assert float(BOX_LOSSES["ciou"](first, second)) == pytest.approx(1 - iou + 2 / 18, abs=1e-5)


def test_ciou_punishes_another_shape() -> None:
    first, second = one(0, 0, 4, 2), one(1, 0, 3, 2)
    iou = 4 / 8
    shape = 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2
    expected = 1 - iou + shape**2 / (1 - iou + shape)
    assert float(BOX_LOSSES["ciou"](first, second)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", sorted(BOX_LOSSES))
def test_box_losses_and_their_gradients_are_finite_where_a_prediction_is_far_off(kind: str) -> None:
    rows = [[0.0, 0.0, 1e-3, 1e-3], [5.0] * 4, [5.0] * 4, [3.0, 3.0, 9.0, 9.0]]
    predicted = torch.tensor(rows, requires_grad=True)
    # The last two have no area, as torchvision's CIoU does not bear.
    true = torch.tensor([[100.0, 100.0, 110.0, 120.0], [4.0, 4.0, 6.0, 6.0], [5.0] * 4, [6.0] * 4])
    loss = BOX_LOSSES[kind](predicted, true)
    assert torch.isfinite(loss).all()
    torch.autograd.backward(loss.sum())
    assert predicted.grad is not None and torch.isfinite(predicted.grad).all()


def test_distribution_loss_by_hand() -> None:
    logits = torch.zeros(1, 4, BINS)
    logits[0, 0, 3] = 2.0  # the first side's distribution prefers bin 3
    sides = torch.tensor([[3.25, 0.0, 14.5, 7.0]])
    total = math.log(15 + math.e**2)
    first = -(0.75 * (2.0 - total) + 0.25 * (0.0 - total))
    expected = (first + 3 * math.log(BINS)) / 4
    assert float(distribution_loss(logits.flatten(1), sides)) == pytest.approx(expected, abs=1e-5)


def test_sides_are_in_strides_and_stay_within_the_bins() -> None:
    anchors = anchors_of(64, 64, torch.zeros(1))
    point = torch.tensor([0, 83])  # stride 8 at (4, 4), stride 32 at (48, 48)
    boxes = torch.tensor([[0.0, 2.0, 500.0, 20.0], [16.0, 32.0, 64.0, 80.0]])
    sides = sides_in_strides(boxes, point, anchors)
    torch.testing.assert_close(sides[0], torch.tensor([0.5, 0.25, BINS - 1.01, 2.0]))
    torch.testing.assert_close(sides[1], torch.tensor([1.0, 0.5, 0.5, 1.0]))


def test_focal_losses_by_hand() -> None:
    logits, wanted = torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.0])
    entropy = math.log(2)

    def values(kind: str, **keys: float) -> list[float]:
        config = ClassificationKeys(kind=kind, **keys)  # type: ignore[arg-type]
        return classification_loss(logits, wanted, config).tolist()

    assert values("bce") == pytest.approx([entropy, entropy])
    # |0.75 - 0.5|^2 and |0 - 0.5|^2 times cross-entropy.
    assert values("quality_focal") == pytest.approx([entropy / 16, entropy / 4])
    # Positives by their target, negatives by alpha * score^gamma.
    assert values("varifocal") == pytest.approx([0.75 * entropy, 0.75 * 0.25 * entropy])
    # p_t = 0.5 for both: alpha_t * 0.25 * cross-entropy; alpha_t mixes by the soft target.
    alpha = 0.25 * 0.75 + 0.75 * 0.25
    expected = [alpha * 0.25 * entropy, 0.75 * 0.25 * entropy]
    assert values("focal", alpha=0.25) == pytest.approx(expected)
    assert values("focal") == pytest.approx(expected)  # RetinaNet's alpha, and not varifocal's


def test_the_slope_of_varifocal_loss_counts_its_weight() -> None:
    """-alpha p^gamma log(1 - p) of a negative falls with p^gamma, too (equation 2)."""
    logits = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    config = ClassificationKeys(kind="varifocal")
    loss = classification_loss(logits, torch.zeros_like(logits), config).sum()
    (slope,) = torch.autograd.grad(loss, logits)
    p = logits.detach().sigmoid()
    by_hand = 0.75 * p**2 * (2 * (1 - p) * -torch.log(1 - p) + p)
    torch.testing.assert_close(slope, by_hand)


@pytest.mark.parametrize("kind", ["bce", "varifocal", "quality_focal"])
def test_smoothing_still_punishes_a_wrong_class(kind: str) -> None:
    found = Assignment(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([0.8]))
    targets = Targets(torch.tensor([0]), one(0, 0, 8, 8), torch.tensor([1]))
    gradients = []
    for smoothing in (0.0, 0.1):
        logits = torch.tensor([[[-2.0, 1.0, 3.0, -2.0]]], requires_grad=True)
        wanted = class_targets(logits.detach(), found, targets, smoothing)
        config = ClassificationKeys(kind=kind)  # type: ignore[arg-type]
        torch.autograd.backward(classification_loss(logits, wanted, config).sum())
        assert logits.grad is not None
        gradients.append(float(logits.grad[0, 0, 2]))
    assert gradients[0] > 0.3 and gradients[1] > 0.9 * gradients[0]


def test_label_smoothing_moves_a_share_of_the_score_to_all_classes() -> None:
    found = Assignment(torch.tensor([0]), torch.tensor([5]), torch.tensor([0]), torch.tensor([0.8]))
    targets = Targets(torch.tensor([0]), one(0, 0, 8, 8), torch.tensor([1]))
    wanted = class_targets(torch.zeros(1, 10, 4), found, targets, smoothing=0.1)
    assert wanted[0, 5].tolist() == pytest.approx([0.02, 0.74, 0.02, 0.02])
    assert float(wanted.sum()) == pytest.approx(0.8)


def test_penalty_by_hand_leaves_norms_and_biases_to_l1() -> None:
    convolution, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
    model = nn.Sequential(convolution, norm)
    with torch.no_grad():
        convolution.weight.fill_(3.0)
        norm.weight.copy_(torch.tensor([-2.0, 0.5]))
        assert convolution.bias is not None
        convolution.bias.fill_(100.0)
    assert float(penalty(model, l2=0.1, l1_scales=0.0).detach()) == pytest.approx(0.1 / 2 * 18)
    assert float(penalty(model, l2=0.0, l1_scales=0.01).detach()) == pytest.approx(0.01 * 2.5)
    shared = nn.SyncBatchNorm(2)  # as on several GPUs
    shared.load_state_dict(norm.state_dict())
    several = nn.Sequential(convolution, shared)
    assert float(penalty(several, l2=0.0, l1_scales=0.01).detach()) == pytest.approx(0.01 * 2.5)
    assert float(penalty(model, 0.1, 0.01, frozen=[convolution]).detach()) == pytest.approx(0.025)
    assert float(penalty(model, 0.1, 0.01, frozen=[model]).detach()) == 0


@pytest.mark.parametrize("objectness", [False, True])
def test_the_whole_is_the_weighted_sum_of_its_parts(objectness: bool) -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 3, objectness=objectness)
    image = torch.rand(2, 3, 64, 64)
    targets = Targets(
        torch.tensor([0, 0, 1]),
        torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 8.0, 60.0, 30.0], [0.0, 0.0, 63.0, 63.0]]),
        torch.tensor([0, 2, 1]),
    )
    keys = build({"loss": {"penalty": {"l2": 1e-4}}}).loss
    loss = DetectionLoss(keys)
    raw = detector(image)
    result = loss(detector, raw, (64, 64), targets)
    names = {"classification", "localisation", "distribution", "penalty"}
    assert set(result.parts) == names | ({"objectness"} if objectness else set())
    assert float(result.total.detach()) == pytest.approx(
        float(sum(result.parts.values())), rel=1e-5
    )
    doubled = keys.model_copy(
        update={"localisation": keys.localisation.model_copy(update={"weight": 15.0})}
    )
    twice = DetectionLoss(doubled)(detector, raw, (64, 64), targets)
    ratio = float(twice.parts["localisation"]) / float(result.parts["localisation"])
    assert ratio == pytest.approx(2.0, rel=1e-5)
    torch.autograd.backward(result.total)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_a_batch_without_boxes_teaches_background_alone() -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 2)
    raw = detector(torch.rand(2, 3, 64, 64))
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0).long())
    result = DetectionLoss(LossKeys())(detector, raw, (64, 64), nothing)
    expected = 0.5 * functional.binary_cross_entropy_with_logits(
        raw.classes, torch.zeros_like(raw.classes), reduction="sum"
    )
    assert float(result.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(result.parts["localisation"]) == float(result.parts["distribution"]) == 0.0
    torch.autograd.backward(result.total)


@pytest.mark.parametrize("objectness", [False, True])
def test_points_in_an_ignored_box_are_asked_about_other_classes_and_where_they_are_positive(
    objectness: bool,
) -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 2, objectness=objectness)
    raw = detector(torch.rand(2, 3, 64, 64))
    one = Targets(torch.tensor([0]), torch.tensor([[17.0, 17.0, 23.0, 23.0]]), torch.tensor([1]))
    crowd = Targets(torch.tensor([0]), torch.tensor([[16.0, 16.0, 32.0, 32.0]]), torch.tensor([1]))
    loss = DetectionLoss(LossKeys())
    whole = loss(detector, raw, (64, 64), one)
    without = loss(detector, raw, (64, 64), one, ignored=crowd)
    # Points (20, 20), (28, 20), (20, 28), (28, 28) of stride 8, of which the first is the box's,
    # and (24, 24) of stride 16.
    places = [2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3, 64 + 1 * 4 + 1]
    denied = functional.softplus(raw.classes[0, places, 1]).sum()
    found = whole.parts["classification"] - without.parts["classification"]
    assert float(found) == pytest.approx(0.5 * float(denied.detach()), rel=1e-3)
    for part in ("localisation", "distribution"):
        assert torch.equal(whole.parts[part], without.parts[part])
    if objectness:
        assert raw.objectness is not None
        denied = functional.softplus(raw.objectness[0, places]).sum()
        found = whole.parts["objectness"] - without.parts["objectness"]
        assert float(found) == pytest.approx(float(denied.detach()), rel=1e-3)


def test_one_positive_point_against_an_independent_computation() -> None:
    """A single box with one candidate: every number can be computed in another way."""
    torch.manual_seed(1)
    detector = build_detector("yolo12n", 2)
    raw = detector(torch.rand(1, 3, 64, 64))
    box, label = (17.0, 17.0, 23.0, 23.0), 1  # holds the point (20, 20) of stride 8 alone
    targets = Targets(torch.tensor([0]), torch.tensor([box]), torch.tensor([label]))
    result = DetectionLoss(LossKeys())(detector, raw, (64, 64), targets)

    point = 2 * 8 + 2
    shares = raw.boxes[0, point].reshape(4, BINS).softmax(1)
    left, top, right, bottom = ((shares * torch.arange(16.0)).sum(1) * 8).tolist()
    x0, y0, x1, y1 = 20 - left, 20 - top, 20 + right, 20 + bottom
    shared = max(0.0, min(x1, 23) - max(x0, 17)) * max(0.0, min(y1, 23) - max(y0, 17))
    iou = shared / ((x1 - x0) * (y1 - y0) + 36 - shared)
    diagonal = (max(x1, 23) - min(x0, 17)) ** 2 + (max(y1, 23) - min(y0, 17)) ** 2
    apart = ((x0 + x1) / 2 - 20) ** 2 + ((y0 + y1) / 2 - 20) ** 2
    shape = 4 / math.pi**2 * (math.atan((x1 - x0) / (y1 - y0)) - math.atan(1)) ** 2
    ciou = iou - apart / diagonal - shape**2 / (1 - iou + shape)
    score = max(ciou, 0.0)  # the best point's target is the box's best overlap
    scale = 1 / max(score, 1.0)

    assert float(result.parts["localisation"]) == pytest.approx(
        7.5 * scale * score * (1 - ciou), rel=1e-3
    )
    logs = raw.boxes[0, point].reshape(4, BINS).log_softmax(1)
    side = 3 / 8  # every side lies 3 px from the point
    distribution = -(logs[:, 0] * (1 - side) + logs[:, 1] * side).mean()
    assert float(result.parts["distribution"]) == pytest.approx(
        1.5 * scale * score * float(distribution.detach()), rel=1e-3
    )
    wanted = torch.zeros_like(raw.classes)
    wanted[0, point, label] = score
    entropy = functional.binary_cross_entropy_with_logits(raw.classes, wanted, reduction="sum")
    assert float(result.parts["classification"]) == pytest.approx(
        0.5 * scale * float(entropy.detach()), rel=1e-3
    )


def test_every_box_has_the_same_share_and_its_points_share_by_score() -> None:
    found = Assignment(
        torch.zeros(4, dtype=torch.int64),
        torch.arange(4),
        torch.tensor([0, 0, 0, 2]),  # box 1 has no point, nor has box 3
        torch.tensor([0.6, 0.3, 0.1, 0.01]),
    )
    torch.testing.assert_close(box_shares(found, 4), torch.tensor([0.3, 0.15, 0.05, 0.5]))


def test_a_class_has_the_share_of_its_boxes_and_within_it_scores_decide() -> None:
    found = Assignment(
        torch.zeros(4, dtype=torch.int64),
        torch.arange(4),
        torch.tensor([0, 0, 1, 3]),
        torch.tensor([0.9, 0.6, 0.5, 0.01]),
    )
    # Three boxes of class 0 (one without a point), one of class 2; class 1's has no point at all.
    classes = torch.tensor([0, 0, 0, 2, 1])
    shares = class_shares(found, classes, 4)
    expected = torch.tensor([0.9 / 2 * 3 / 4, 0.6 / 2 * 3 / 4, 0.5 / 2 * 3 / 4, 1 / 4])
    torch.testing.assert_close(shares, expected)
    one = torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(class_shares(found, one, 1), found.score / found.score.sum())
    few = found._replace(score=found.score / 10)  # below 1 in all: as by score
    torch.testing.assert_close(class_shares(few, one, 1), few.score)
    none = Assignment(*(part[:0] for part in found))
    assert class_shares(none, classes, 4).shape == (0,)


def test_boxes_equal_changes_the_box_losses_alone() -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 2)
    raw = detector(torch.rand(1, 3, 64, 64))
    boxes = torch.tensor([[4.0, 4.0, 60.0, 60.0], [8.0, 8.0, 16.0, 16.0]])
    targets = Targets(torch.tensor([0, 0]), boxes, torch.tensor([0, 1]))
    losses = [
        DetectionLoss(LossKeys.model_validate({"boxes": kind}))(detector, raw, (64, 64), targets)
        for kind in ("score", "equal")
    ]
    one, other = (loss.parts for loss in losses)
    assert one["classification"] == other["classification"]
    assert other["localisation"] > one["localisation"] + 0.01  # the small box fits worse
