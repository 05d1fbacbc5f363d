"""The detection loss: l1 classification + l2 localisation + l3 objectness + penalty.

What is compared with what comes from the task-aligned assignment (finetune/assign.py). Sums over
points are divided by the sum of the targets' scores over the batch, so that pictures with many
boxes do not outweigh the others; of several processes, and of several micro-batches of a step
(`accumulate`), each divides by its own sum.

- classification, every point and class against its target score: `bce` (binary cross-entropy),
  `focal` (arXiv 1708.02002, equation 5, torchvision's), `varifocal` (arXiv 2008.13367, equation 2)
  or `quality_focal` (arXiv 2006.04388).
- localisation, positive points weighted by their target score (`boxes=score`), so that every box
  weighs the same (`boxes=equal`), or by score within their class, and each class by how many of the
  boxes are of it (`boxes=class`, the default): small and rare ones are not left behind. `iou`,
  `giou` (arXiv 1902.09630), `diou` or `ciou` (arXiv 1911.08287), torchvision's.
- distribution, part of localisation with a weight of its own: distribution focal loss (arXiv
  2006.04388) of the two bins beside a side's distance.
- objectness, where the detector has that branch: binary cross-entropy with the overlap of the
  positive points' boxes, 0 elsewhere.
- ignored boxes (of a crowd, or found without being sure) are neither there nor not: a point inside
  one has no classification loss for that box's class, and no objectness loss, unless it is positive
  (for that class).
- penalty: L2 over all decaying weights, L1 over the scales of BatchNorm (network slimming, arXiv
  1708.06519).

Differs from the papers:
- Targets are scores, for which focal loss was not made: its least is not at the target but nearer
  to 0 or 1 (of gamma 2, at 0.12 for 0.3, at 0.95 for 0.8). Quality focal loss is its form for them.
- Focal, varifocal and quality focal loss are summed and divided as above; papers divide by the
  number of positives.
- Label smoothing (arXiv 1512.00567, section 7) is over the classes of positive points: the box's
  class gets 1 - epsilon of the target score, and every class epsilon / C of it. Background keeps
  its targets of 0, of which there are thousands a picture. Varifocal loss weighs a point's other
  classes as negatives all the same, or a wrong class would cost nearly nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import (
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from finetune.assign import Assignment, Targets, assign, inside, pairwise_ciou
from finetune.head import BINS, Anchors, DetectionHead, Raw, anchors_of
from finetune.recipe import ClassificationKeys, LossKeys
from groundwork.optim import undecayed

BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": lambda first, second: 1 - overlaps(first, second),
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": lambda first, second: 1 - pairwise_ciou(first, second),
}


class Loss(NamedTuple):
    """The whole, with a gradient, and its parts after weighting, without."""

    total: Tensor
    parts: dict[str, Tensor]


class DetectionLoss:
    """Computes the loss of a batch by a recipe's `loss` section; has no parameters."""

    def __init__(self, config: LossKeys) -> None:
        self.config = config

    def __call__(
        self,
        network: nn.Module,
        raw: Raw,
        size: tuple[int, int],
        targets: Targets,
        frozen: Sequence[nn.Module] = (),
        ignored: Targets | None = None,
    ) -> Loss:
        """Compare logits of pictures of `size` (height, width) with the targets.

        `network` is what made them: a detector, or what else has a DetectionHead as its `head`. The
        penalty leaves out what is `frozen`. `ignored` are boxes that are not asked about.
        """
        head = network.head
        assert isinstance(head, DetectionHead)
        config = self.config
        raw = Raw(
            raw.boxes.float(),
            raw.classes.float(),
            None if raw.objectness is None else raw.objectness.float(),
        )
        anchors = anchors_of(*size, raw.boxes)
        boxes = head.decode(raw.boxes, anchors)
        found = assign(
            boxes.detach(),
            raw.classes.detach().sigmoid(),
            anchors,
            targets,
            topk=config.assign.topk,
            alpha=config.assign.alpha,
            beta=config.assign.beta,
        )
        scale = 1 / found.score.sum().clamp(min=1)
        parts: dict[str, Tensor] = {}
        wanted = class_targets(raw.classes, found, targets, config.classification.smoothing)
        by_point = classification_loss(raw.classes, wanted, config.classification)
        unasked = None
        if ignored is not None and len(ignored.boxes):
            unasked = inside(ignored, anchors, raw.classes.shape)
            unasked[found.image, found.point, targets.classes[found.target]] = False
            by_point = by_point.masked_fill(unasked, 0)
        parts["classification"] = scale * config.classification.weight * by_point.sum()
        predicted, true = boxes[found.image, found.point], targets.boxes[found.target]
        share = found.score * scale
        if config.boxes == "equal":
            share = box_shares(found, len(targets.boxes))
        elif config.boxes == "class":
            share = class_shares(found, targets.classes, raw.classes.shape[2])
        box_loss = BOX_LOSSES[config.localisation.kind](predicted, true)
        parts["localisation"] = config.localisation.weight * (box_loss * share).sum()
        bins = raw.boxes[found.image, found.point]
        sides = sides_in_strides(true, found.point, anchors)
        parts["distribution"] = (
            config.distribution.weight * (distribution_loss(bins, sides) * share).sum()
        )
        if raw.objectness is not None:
            there = torch.zeros_like(raw.objectness)
            there[found.image, found.point] = overlaps(predicted.detach(), true)
            entropy = functional.binary_cross_entropy_with_logits(
                raw.objectness, there, reduction="none"
            )
            if unasked is not None:
                denied = unasked.any(2)
                denied[found.image, found.point] = False
                entropy = entropy.masked_fill(denied, 0)
            parts["objectness"] = scale * config.objectness.weight * entropy.sum()
        if config.penalty.l2 or config.penalty.l1_scales:
            parts["penalty"] = penalty(network, config.penalty.l2, config.penalty.l1_scales, frozen)
        total = torch.stack(list(parts.values())).sum()
        return Loss(total, {name: value.detach() for name, value in parts.items()})


def box_shares(found: Assignment, boxes: int) -> Tensor:
    """Return each positive point's share of the box losses, P: the same for every box, 1 in all.

    Within a box, points share by their scores.
    """
    of_box = found.score.new_zeros(boxes).index_add_(0, found.target, found.score)
    seen = (of_box > 0).sum().clamp(min=1)
    return found.score / of_box[found.target].clamp(min=1e-9) / seen


def class_shares(found: Assignment, classes: Tensor, count: int) -> Tensor:
    """Return each positive point's share of the box losses, P: by score within its class.

    A class gets the share of the boxes that are of it, whatever their scores: the scores of a class
    that is common and soon found would leave nothing to a rare and small one. All shares are 1, or
    the sum of the scores where that is less, so that with one class they are those by score.
    """
    own = classes[found.target]
    scores = found.score.new_zeros(count).index_add_(0, own, found.score)
    boxes = found.score.new_zeros(count).index_add_(0, classes, torch.ones_like(classes).float())
    boxes = torch.where(scores > 0, boxes, 0)  # a class without a point has nothing to learn from
    part = boxes / boxes.sum().clamp(min=1) * scores.sum().clamp(max=1)
    return found.score / scores[own].clamp(min=1e-9) * part[own]


def class_targets(
    logits: Tensor, found: Assignment, targets: Targets, smoothing: float = 0.0
) -> Tensor:
    """Return what the scores should be, N A C: 0 but for positive points."""
    wanted = torch.zeros_like(logits)
    if smoothing:
        wanted[found.image, found.point] = found.score[:, None] * smoothing / logits.shape[2]
    own = targets.classes[found.target]
    wanted[found.image, found.point, own] += found.score * (1 - smoothing)
    return wanted


def classification_loss(logits: Tensor, wanted: Tensor, config: ClassificationKeys) -> Tensor:
    """Return the loss of every point and class, of the shape of `logits`."""
    if config.kind == "focal":
        alpha = 0.25 if config.alpha is None else config.alpha  # RetinaNet, section 4.1
        focal: Tensor = sigmoid_focal_loss(logits, wanted, alpha, config.gamma)
        return focal
    entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if config.kind == "bce":
        return entropy
    score = logits.sigmoid()
    if config.kind == "quality_focal":
        return (wanted - score).abs() ** config.gamma * entropy
    alpha = 0.75 if config.alpha is None else config.alpha  # VarifocalNet, section 4.2
    negative = alpha * score**config.gamma
    own = (wanted > 0) & (wanted == wanted.amax(-1, keepdim=True))  # others are smoothed to above 0
    return torch.where(own, wanted, negative) * entropy  # varifocal


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU of two rows of boxes (P 4), pair by pair."""
    low = torch.maximum(first[:, :2], second[:, :2])
    high = torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1)
    return shared / (areas - shared).clamp(min=1e-7)


def sides_in_strides(boxes: Tensor, point: Tensor, anchors: Anchors) -> Tensor:
    """Distances P 4 of boxes' sides from their points, in strides, within what the bins can say."""
    place, stride = anchors.points[point], anchors.strides[point, None]
    sides = torch.cat((place - boxes[:, :2], boxes[:, 2:] - place), 1) / stride
    return sides.clamp(0, BINS - 1 - 0.01)


def distribution_loss(logits: Tensor, sides: Tensor) -> Tensor:
    """Distribution focal loss of box logits P 64 for sides P 4; the mean over the sides, P."""
    below = sides.floor().long()
    upper = sides - below
    logs = logits.reshape(-1, 4, BINS).log_softmax(-1)
    low = logs.gather(2, below[..., None]).squeeze(2)
    high = logs.gather(2, below[..., None] + 1).squeeze(2)
    return -(low * (1 - upper) + high * upper).mean(1)


def penalty(
    model: nn.Module, l2: float, l1_scales: float, frozen: Sequence[nn.Module] = ()
) -> Tensor:
    """Return l2 / 2 times the squares of the weights that decay, plus l1 times |BatchNorm scales|.

    Parameters without a gradient, and those of `frozen` modules, are left out.
    """
    excluded = undecayed(model)
    still = {id(parameter) for module in frozen for parameter in module.parameters()}
    total = torch.zeros((), device=next(model.parameters()).device)

    def counts(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad and id(parameter) not in still

    if l2:
        for name, parameter in model.named_parameters():
            if counts(parameter) and name not in excluded:
                total = total + l2 / 2 * parameter.square().sum()
    if l1_scales:
        for module in model.modules():
            # SyncBatchNorm is one of these too, and no BatchNorm2d.
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and counts(module.weight):
                total = total + l1_scales * module.weight.abs().sum()
    return total
