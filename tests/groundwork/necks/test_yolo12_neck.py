"""The YOLOv12 neck: parameters of each layer, shapes, and other backbones' levels."""

from __future__ import annotations

import pytest
import torch

from groundwork.backbones.contract import Level, Pyramid
from groundwork.backbones.yolo12 import SCALES, YOLO12
from groundwork.necks.yolo12 import YOLO12Neck

# Parameters of layers 11, 14, 15, 17, 18 and 20 in the public models.
LAYERS = ("11", "14", "15", "17", "18", "20")
PARAMETERS = {
    "n": (86912, 24000, 36992, 74624, 147712, 378880),
    "s": (345856, 95104, 147712, 296704, 590336, 1511424),
    "m": (1248768, 378624, 590336, 1183232, 2360320, 1642496),
    "l": (2102784, 592640, 590336, 2037248, 2360320, 2496512),
    "x": (4727040, 1331328, 1327872, 4579584, 5309952, 5612544),
}


@pytest.mark.parametrize("letter", SCALES)
def test_every_layer_has_the_public_number_of_parameters(letter: str) -> None:
    with torch.device("meta"):
        neck = YOLO12Neck(YOLO12(letter).levels, letter)
    found = tuple(sum(p.numel() for p in neck.layers[i].parameters()) for i in LAYERS)
    assert found == PARAMETERS[letter]
    assert tuple(neck.layers) == LAYERS


def test_features_have_the_strides_and_channels_that_the_neck_says() -> None:
    neck = YOLO12Neck((Level(8, 12), Level(16, 20), Level(32, 36)), "n")
    pyramid = Pyramid(*(torch.rand(2, c, 8 // f, 12 // f) for c, f in ((12, 1), (20, 2), (36, 4))))
    features = neck(pyramid)
    assert neck.channels == (64, 128, 256)
    assert [tuple(level.shape) for level in features] == [
        (2, 64, 8, 12),
        (2, 128, 4, 6),
        (2, 256, 2, 3),
    ]


def test_every_parameter_has_a_gradient() -> None:
    neck = YOLO12Neck((Level(8, 8), Level(16, 8), Level(32, 8)), "n")
    pyramid = Pyramid(*(torch.rand(2, 8, side, side) for side in (8, 4, 2)))
    losses = [level.square().mean() for level in neck(pyramid)]
    torch.autograd.backward(losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
