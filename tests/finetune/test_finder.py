"""What lies between a picture and its boxes: the frame, the fused copy, suppression of the best."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetune.detector import Detector, Limits, build_detector, suppress
from finetune.finder import STRIDE, DetectorFinder, frame_of, show
from finetune.fuse import fused
from groundwork.data.decode import open_picture

SIZES = [(640, 360), (1000, 333), (333, 1000), (575, 480), (31, 47), (4000, 3), (640, 640)]


def lively_detector() -> Detector:
    """A detector whose BatchNorm has seen something, so that its logits depend on the picture."""
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 3)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None  # the average of all that it sees
    with torch.no_grad():
        for _ in range(3):
            detector(torch.rand(4, 3, 64, 64))
        for branch in detector.head.classes.children():
            branch[-1].bias += 3.0  # type: ignore[index]
        detector.head.bins.mul_(0.2)  # small boxes: a large one would be clipped to its picture
    return detector


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("image_size", [320, 640])
def test_boxes_come_back_from_the_frame(width: int, height: int, image_size: int) -> None:
    frame = frame_of(width, height, image_size)
    assert frame.frame_height % STRIDE == frame.frame_width % STRIDE == 0
    assert max(frame.frame_height, frame.frame_width) == image_size
    assert 0 <= frame.frame_height - frame.shown_height < STRIDE
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 1, (50, 2, 2)) * np.array([width, height])
    boxes = np.concatenate((corners.min(1), corners.max(1)), 1)
    factors = np.array([frame.shown_width / width, frame.shown_height / height] * 2)
    framed = boxes * factors + np.array([frame.left, frame.top] * 2)
    np.testing.assert_allclose(frame.undo(framed.astype(np.float32)), boxes, atol=1e-3)


def test_the_frames_factors_are_those_that_the_pixels_were_scaled_by() -> None:
    # 333 becomes 106.56 and so 107 pixels: one factor for both sides would be 1.4 pixels off below.
    pixels = np.zeros((333, 1000, 3), np.uint8)
    pixels[:300, :900] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    picture = open_picture(file.getvalue())
    frame = frame_of(1000, 333, 320)
    shown = show(picture, picture.whole, frame)[..., 0].astype(np.float64) / 255
    inner = shown[frame.top :, frame.left :][: frame.shown_height, : frame.shown_width]
    # How far the white reaches, to a fraction of a pixel.
    bottom, right = frame.top + inner[:, 10].sum(), frame.left + inner[10].sum()
    box = np.array([[frame.left, frame.top, right, bottom]], np.float32)
    np.testing.assert_allclose(frame.undo(box), [[0, 0, 900, 300]], atol=0.2)


def test_boxes_are_clipped_to_the_picture() -> None:
    frame = frame_of(100, 50, 100)  # as large as it is
    assert (frame.frame_width, frame.frame_height) == (128, 64)
    assert frame.undo(np.array([[0, 0, 128, 64]], np.float32)).tolist() == [[0, 0, 100, 50]]
    assert frame.undo(np.array([[24, 17, 44, 37]], np.float32)).tolist() == [[10, 10, 30, 30]]


def test_the_fused_copy_computes_the_same_and_leaves_the_detector_alone() -> None:
    detector = lively_detector()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    twin = fused(detector)
    assert detector.training and not twin.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    picture = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        raw, quick = detector.eval()(picture), twin(picture)
    assert raw.classes.std() > 0.1  # it says something
    torch.testing.assert_close(quick.boxes, raw.boxes, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(quick.classes, raw.classes, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("most", [5, 300, 100_000])
@pytest.mark.parametrize("levels", [20, None])  # few levels: many boxes of equal score
def test_suppressing_the_best_alone_gives_the_same(most: int, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3000, 2, generator=generator) * 400
    boxes = torch.cat((corner, corner + 40), 1)
    scores = torch.randperm(6000, generator=generator).view(3000, 2) / 6000
    if levels is not None:
        scores = (scores * levels).round() / levels
    limits = Limits(0.01, 0.5, most)
    finder = DetectorFinder(build_detector("yolo12n", 2), limits)
    quick = finder.suppressed(boxes, scores)
    slow = suppress(boxes, scores, limits)
    assert torch.equal(quick.scores, slow.scores)
    if levels is None:  # of equal scores any may be the first
        assert torch.equal(quick.boxes, slow.boxes) and torch.equal(quick.classes, slow.classes)
