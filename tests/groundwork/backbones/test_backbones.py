"""Backbones by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from groundwork.backbones import YOLO12_NAMES, build_backbone, check_backbone_name
from groundwork.errors import UsageError


@pytest.mark.parametrize("name", ["yolo12n", "timm/test_resnet"])
def test_a_backbone_knows_the_name_it_was_built_by(name: str) -> None:
    backbone = build_backbone(name)
    assert backbone.name == name
    assert build_backbone(backbone.name).levels == backbone.levels


@pytest.mark.parametrize("name", ["yolo12n", "timm/test_resnet"])
def test_equal_seeds_give_equal_weights(name: str) -> None:
    torch.manual_seed(3)
    first = build_backbone(name).state_dict()
    torch.manual_seed(3)
    second = build_backbone(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("yolo12q", "Did you mean yolo12"),
        ("yolov12n", "Did you mean yolo12n?"),
        ("resnet18", "known are yolo12n, yolo12s, yolo12m, yolo12l, yolo12x and timm/<model>"),
        ("timm/", "Unknown backbone 'timm/'"),
        ("", "Unknown backbone ''"),
    ],
)
def test_an_unknown_name_is_told_with_the_known_ones(name: str, sentence: str) -> None:
    for check in (check_backbone_name, build_backbone):
        with pytest.raises(UsageError) as caught:
            check(name)
        assert sentence in str(caught.value)


def test_names_are_checked_without_torch_or_timm() -> None:
    script = (
        "import sys\n"
        "from groundwork.backbones import check_backbone_name\n"
        f"for name in {YOLO12_NAMES!r}: check_backbone_name(name)\n"
        "check_backbone_name('timm/resnet18')\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_yolo12_does_without_timm() -> None:
    script = (
        "import sys\n"
        "from groundwork.backbones import build_backbone\n"
        "build_backbone('yolo12n')\n"
        "assert 'timm' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_depths_of_yolo12_are_its_layers() -> None:
    backbone = build_backbone("yolo12n")
    depths = backbone.depths()
    assert depths.keys() == {name for name, _ in backbone.named_parameters()}
    assert set(depths.values()) == set(range(9))
    assert depths["layers.0.conv.weight"] == 0 and depths["layers.8.cv2.conv.weight"] == 8
