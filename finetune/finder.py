"""A picture's way through a detector: framed as in training, and its boxes brought back.

A picture is scaled so that its longer side is `image_size`, and centred in the smallest frame of
whole strides that holds it, grey around: a 640 x 360 picture becomes 640 x 384 and not 640 x 640,
which spares two fifths of the work. Its frame is a function of its size alone, so what is found in
a picture does not depend on which others are in its batch.

Its sides are rounded to whole pixels, each by itself, so boxes go back by the two factors that the
pixels really were scaled by: exactly, where one factor would be up to half a pixel off.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.augment.letterbox import letterbox_geometry
from finetune.augment.warp import GREY
from finetune.detector import DEFAULT_LIMITS, Detections, Detector, Limits, suppress
from finetune.fuse import fused
from finetune.metrics import Found
from groundwork import colour
from groundwork.data.decode import Picture
from groundwork.data.resize import Box

STRIDE = 32  # of a detector's coarsest level, in pixels: sides are multiples of it
# Candidates that suppression looks at first; more only where these do not give enough boxes.
_FIRST = 2048


class Frame(NamedTuple):
    """Where a picture of width x height (or a part of one) lies in what the detector sees.

    The frame is `frame_height` x `frame_width`; the picture is `shown_height` x `shown_width` in
    it, and begins at `left`, `top`. All in pixels.
    """

    width: float
    height: float
    frame_height: int
    frame_width: int
    shown_height: int
    shown_width: int
    left: int
    top: int

    def undo(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Bring boxes (K 4) of the frame to the picture's own pixels, clipped to the picture."""
        corner = np.array([self.left, self.top] * 2, np.float64)
        factors = np.array([self.width / self.shown_width, self.height / self.shown_height] * 2)
        limits = np.array([self.width, self.height] * 2)
        upright: npt.NDArray[np.float64] = (boxes.astype(np.float64) - corner) * factors
        return upright.clip(0.0, limits).astype(np.float32)


def frame_of(width: float, height: float, image_size: int) -> Frame:
    """Return the frame of a width x height picture whose longer side becomes `image_size`."""
    geometry = letterbox_geometry(int(width), int(height), (image_size, image_size))
    shown_height, shown_width = geometry.shown(int(width), int(height))
    frame_height, frame_width = (
        -(-side // STRIDE) * STRIDE for side in (shown_height, shown_width)
    )
    left, top = (frame_width - shown_width) // 2, (frame_height - shown_height) // 2
    return Frame(width, height, frame_height, frame_width, shown_height, shown_width, left, top)


def show(picture: Picture, region: Box, frame: Frame) -> npt.NDArray[np.uint8]:
    """Cut a region (left, top, right, bottom) of a picture into its frame: uint8 H W C.

    Raises DataError for pixels that cannot be decoded.
    """
    [inner] = picture.cut([region], (frame.shown_height, frame.shown_width))
    return placed(inner, frame)


def placed(inner: npt.NDArray[np.uint8], frame: Frame) -> npt.NDArray[np.uint8]:
    """Lay pixels that have the size they are shown at into their frame: uint8 H W C."""
    if inner.shape[:2] == (frame.frame_height, frame.frame_width):
        return inner
    pixels = np.full((frame.frame_height, frame.frame_width, inner.shape[2]), GREY, np.uint8)
    bottom, right = frame.top + frame.shown_height, frame.left + frame.shown_width
    pixels[frame.top : bottom, frame.left : right] = inner
    return pixels


class Finder(Protocol):
    """Frames of one size (uint8 N H W C) -> what is in each, in pixels of the frame."""

    def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
        """Find boxes, best first."""


class DetectorFinder:
    """A detector as a Finder. It works on a fused copy, so the detector stays as it is."""

    def __init__(self, detector: Detector, limits: Limits = DEFAULT_LIMITS) -> None:
        self.detector = fused(detector)
        self.device = next(detector.parameters()).device
        self.limits = limits

    @torch.inference_mode()
    def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
        """Find boxes, best first."""
        backbone = self.detector.backbone
        images = torch.from_numpy(frames).to(self.device)
        images = colour.normalise(images, backbone.mean, backbone.std)
        boxes, scores = self.detector.predict(images.contiguous(memory_format=torch.channels_last))
        return [_plain(self.suppressed(*one)) for one in zip(boxes, scores, strict=True)]

    def suppressed(self, boxes: Tensor, scores: Tensor) -> Detections:
        """As finetune.detector.suppress, in less time where there are many candidates.

        Suppression goes from the best box down, so the best `limits.most` of all candidates are
        those of the best few, if these are enough.
        """
        limits = self.limits
        found = scores[scores > limits.score]
        if len(found) > _FIRST:
            # Those of equal score come along, so that none is left out by chance.
            least = found.topk(_FIRST).values[-1].nextafter(found.new_zeros(()))
            few = suppress(boxes, scores, limits._replace(score=float(least)))
            if len(few.boxes) == limits.most:
                return few
        return suppress(boxes, scores, limits)


def _plain(found: Detections) -> Found:
    return Found(*(part.cpu().numpy() for part in found))
