"""The mean of detectors: by hand, and only of detectors that are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.average import average, main
from finetune.detector import build_detector
from finetune.weights import detector_from_file, parts_of, save_detector
from groundwork.errors import CheckpointError, UsageError


def _write(
    file: Path, seed: int, names: tuple[str, ...] = ("a", "b"), bands: object = None
) -> Path:
    torch.manual_seed(seed)
    detector = build_detector("yolo12n", len(names))
    recipe = {"data": {"bands": bands}}
    save_detector(
        file, parts_of(detector), names=names, image_size=64, metadata={"recipe": recipe, "step": 7}
    )
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [_write(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]


def test_the_mean_by_hand(files: list[Path]) -> None:
    states = [detector_from_file(file)[0].state_dict() for file in files]
    mean, about = average(files, [1, 1, 2])
    assert about.names == ("a", "b") and not mean.training
    for name, tensor in mean.state_dict().items():
        one, two, three = (state[name] for state in states)
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.25 * one + 0.25 * two + 0.5 * three)
        else:
            assert torch.equal(tensor, one)
    alone, _ = average(files, [0, 1, 0])
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, states[1][name]) or not tensor.is_floating_point()


def test_the_command_writes_a_detector(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "averaged.safetensors"
    assert main([*map(str, files[:2]), "--shares", "0.25", "0.75", "--out", str(out)]) == 0
    detector, about = detector_from_file(out)
    wanted, _ = average(files[:2], [1, 3])
    for one, other in zip(detector.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)
    assert about.metadata["averaged"][1] == {"file": str(files[1]), "share": 0.75}
    assert about.metadata["step"] == 7 and about.image_size == 64


def test_what_is_not_alike_has_no_mean(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = _write(tmp_path / "three", 0, ("a", "b", "c")).rename(tmp_path / "three.safetensors")
    with pytest.raises(UsageError, match="are not built alike"):
        average([files[0], three], [1, 1])
    other = _write(tmp_path / "other.safetensors", 0, ("b", "a"))
    with pytest.raises(UsageError, match=r"know other classes \(a, b; b, a\)"):
        average([files[0], other], [1, 1])
    bands = _write(tmp_path / "bands.safetensors", 0, bands=[3, 2, 1])
    with pytest.raises(UsageError, match="see other bands or values"):
        average([files[0], bands], [1, 1])
    with pytest.raises(CheckpointError, match="There is no file"):
        average([files[0], tmp_path / "nowhere.safetensors"], [1, 1])
    for shares in ([1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(UsageError, match="0 or more"):
            average(files[:2], shares)
    with pytest.raises(UsageError, match=r"2 file\(s\) and 1 share\(s\)"):
        average(files[:2], [1.0])
    assert main([*map(str, files), "--out", str(files[0])]) == 2
    assert "is one of the files" in capsys.readouterr().err
