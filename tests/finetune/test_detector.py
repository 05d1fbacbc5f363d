"""Detectors on YOLOv12 and timm backbones; suppression worked by hand."""

from __future__ import annotations

import pytest
import torch

from finetune.detector import Limits, build_detector, suppress
from finetune.head import Raw
from groundwork.errors import UsageError

# Parameters of the public models at 80 classes.
PARAMETERS = {
    "yolo12n": 2602288,
    "yolo12s": 9284096,
    "yolo12m": 20199168,
    "yolo12l": 26450784,
    "yolo12x": 59210784,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_detector_has_the_public_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        detector = build_detector(name)
    assert sum(p.numel() for p in detector.parameters()) == PARAMETERS[name]


def test_in_eval_mode_a_tensor_gives_raw_logits() -> None:
    detector = build_detector("yolo12n", 3).eval()
    with torch.no_grad():
        raw = detector(torch.rand(1, 3, 64, 96))
    assert isinstance(raw, Raw)
    assert raw.boxes.shape == (1, 126, 64)
    assert raw.classes.shape == (1, 126, 3)


@pytest.mark.parametrize(
    "name",
    [
        "timm/test_resnet",
        *(
            pytest.param(f"timm/{name}", marks=pytest.mark.slow)
            for name in (
                "test_convnext",
                "resnet18",
                "convnext_atto",
                "efficientnet_b0",
                "mobilenetv4_conv_small",
                "regnety_002",
                "darknet17",
            )
        ),
    ],
)
def test_a_timm_detector_runs_and_every_parameter_learns(name: str) -> None:
    detector = build_detector(name, 2, objectness=True)
    raw = detector(torch.rand(2, 3, 64, 64))
    assert raw.objectness is not None
    loss = raw.boxes.square().mean() + raw.classes.square().mean() + raw.objectness.square().mean()
    loss.backward()
    without = [
        key
        for key, parameter in detector.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []


def test_width_chooses_neck_and_head() -> None:
    detector = build_detector("timm/test_resnet", 2, width="s")
    assert detector.neck.letter == "s"
    assert detector.neck.channels == (128, 256, 512)
    assert build_detector("timm/test_resnet", 2).neck.letter == "n"
    assert build_detector("yolo12n", 2, width="s").neck.channels == (128, 256, 512)


def test_unknown_widths_and_names_are_refused() -> None:
    with pytest.raises(UsageError, match="width=q is not one of n, s, m, l, x"):
        build_detector("yolo12n", 2, width="q")
    with pytest.raises(UsageError, match="Did you mean yolo12"):
        build_detector("yolo12z", 2)


def test_objectness_multiplies_the_scores() -> None:
    detector = build_detector("timm/test_resnet", 2)
    raw = Raw(torch.zeros(1, 21, 64), torch.zeros(1, 21, 2), torch.full((1, 21), 3.0))
    _, scores = detector.head.read(raw, 32, 32)
    torch.testing.assert_close(scores, torch.full((1, 21, 2), 0.5).mul(torch.tensor(3.0).sigmoid()))
    _, plain = detector.head.read(raw._replace(objectness=None), 32, 32)
    assert (plain == 0.5).all()


# Two boxes that share 80 of 120 (IoU 2/3), one apart from both.
_BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 2, 10, 12], [20, 0, 30, 10]])


def test_of_two_boxes_of_a_class_the_better_stays() -> None:
    scores = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.3, 0.0]])
    found = suppress(_BOXES, scores, Limits(iou=0.6))
    assert found.scores.tolist() == pytest.approx([0.9, 0.3])
    assert found.boxes.tolist() == [_BOXES[1].tolist(), _BOXES[2].tolist()]
    assert found.classes.tolist() == [0, 0]
    assert len(suppress(_BOXES, scores, Limits(iou=0.7)).boxes) == 3  # 2/3 is not more than 0.7


def test_boxes_of_other_classes_do_not_suppress_and_a_cell_may_give_two() -> None:
    scores = torch.tensor([[0.5, 0.6], [0.9, 0.0], [0.3, 0.0]])
    found = suppress(_BOXES, scores, Limits(iou=0.5))
    assert list(zip(found.scores.tolist(), found.classes.tolist(), strict=True)) == [
        (pytest.approx(0.9), 0),
        (pytest.approx(0.6), 1),
        (pytest.approx(0.3), 0),
    ]


def test_least_score_and_most_boxes() -> None:
    scores = torch.tensor([[0.5], [0.9], [0.3]])
    assert suppress(_BOXES, scores, Limits(score=0.3)).scores.tolist() == pytest.approx([0.9, 0.5])
    assert suppress(_BOXES, scores, Limits(most=1)).scores.tolist() == pytest.approx([0.9])
    nothing = suppress(_BOXES, scores, Limits(score=0.95))
    assert nothing.boxes.shape == (0, 4)
    assert nothing.classes.dtype is torch.int64
