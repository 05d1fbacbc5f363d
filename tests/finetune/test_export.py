"""The export command, and YOLOv12's public names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.detector import Detector, build_detector
from finetune.export import from_ultralytics, main, to_ultralytics
from finetune.weights import parts_of, save_detector
from groundwork.backbones.product import save_product
from groundwork.errors import UsageError

# Tensors of the public models.
TENSORS = {"n": 691, "m": 751, "l": 1245}


@pytest.fixture(scope="module")
def yolo() -> Detector:
    torch.manual_seed(0)
    return build_detector("yolo12n", 80)


@pytest.fixture
def weights(yolo: Detector, tmp_path: Path) -> Path:
    path = tmp_path / "detector.safetensors"
    names = [f"class_{i}" for i in range(80)]
    save_detector(path, parts_of(yolo), names=names, image_size=96, metadata={})
    return path


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(v, second[k]) for k, v in first.items())


# ---- public names ------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", TENSORS)
def test_every_tensor_has_a_public_name_and_comes_back(letter: str) -> None:
    detector = build_detector(f"yolo12{letter}", 80)
    tensors = to_ultralytics(detector)
    assert len(tensors) == TENSORS[letter]
    layers = {int(key.split(".")[1]) for key in tensors}
    assert layers == {*range(9), 11, 14, 15, 17, 18, 20, 21}
    assert _equal(from_ultralytics(tensors), dict(detector.state_dict()))


def test_names_are_those_of_the_exchange(yolo: Detector) -> None:
    tensors = to_ultralytics(yolo)
    assert tensors["model.21.dfl.conv.weight"].flatten().tolist() == list(range(16))
    assert tensors["model.21.dfl.conv.weight"].shape == (1, 16, 1, 1)
    for key, shape in {
        "model.0.conv.weight": (16, 3, 3, 3),
        "model.0.bn.num_batches_tracked": (),
        "model.2.m.0.cv1.conv.weight": (8, 16, 3, 3),
        "model.6.m.1.1.attn.qkv.conv.weight": (192, 64, 1, 1),
        "model.8.m.0.0.mlp.0.conv.weight": (256, 128, 1, 1),
        "model.11.m.0.m.1.cv2.bn.running_var": (32,),
        "model.20.m.0.cv3.conv.weight": (128, 128, 1, 1),
        "model.21.cv2.1.2.weight": (64, 64, 1, 1),
        "model.21.cv3.0.0.0.conv.weight": (64, 1, 3, 3),
        "model.21.cv3.2.2.bias": (80,),
    }.items():
        assert tuple(tensors[key].shape) == shape, key


def test_copies_are_contiguous_and_of_their_own() -> None:
    detector = build_detector("yolo12n", 3).to(memory_format=torch.channels_last)
    tensors = to_ultralytics(detector)
    assert all(value.is_contiguous() for value in tensors.values())
    tensors["model.0.conv.weight"].zero_()
    assert detector.backbone.state_dict()["layers.0.conv.weight"].abs().sum() > 0


def test_names_that_are_not_public_stay(yolo: Detector) -> None:
    one = torch.zeros(1)
    names = ["model.layer1.0.conv1.weight", "model.9.conv.weight", "head.fc.weight", "model.21.x"]
    assert list(from_ultralytics(dict.fromkeys(names, one))) == names
    wrapped = from_ultralytics({"module.model.model.0.conv.weight": one})
    assert list(wrapped) == ["module.model.backbone.layers.0.conv.weight"]


def test_detectors_without_a_public_counterpart_are_refused() -> None:
    with pytest.raises(UsageError, match="only yolo12n to yolo12x"):
        to_ultralytics(build_detector("timm/test_resnet", 2))
    with pytest.raises(UsageError, match="a neck of width s has no public counterpart"):
        to_ultralytics(build_detector("yolo12n", 2, width="s"))
    with pytest.raises(UsageError, match=r"detector\.objectness=false"):
        to_ultralytics(build_detector("yolo12n", 2, objectness=True))


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_ultralytics_tensors_of_a_detector(
    yolo: Detector, weights: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"tensors{ending}"
    assert main([str(weights), "--format", "ultralytics", "--out", str(out)]) == 0
    found = load_file(out) if ending == ".safetensors" else torch.load(out, weights_only=True)
    assert _equal(found, to_ultralytics(yolo))
    told = capsys.readouterr().out
    assert "model = YOLO('yolo12n.yaml').model" in told
    assert "model.load_state_dict(tensors, strict=True)" in told


def test_another_number_of_classes_is_loaded_into_a_model_of_that_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "detector.safetensors"
    parts = parts_of(build_detector("yolo12n", 3))
    save_detector(path, parts, names=["a", "b", "c"], image_size=96, metadata={})
    assert main([str(path), "--format", "ultralytics"]) == 0
    assert "DetectionModel('yolo12n.yaml', nc=3)" in capsys.readouterr().out
    assert (tmp_path / "detector-ultralytics.safetensors").is_file()


def test_ultralytics_tensors_of_a_backbone_alone(
    yolo: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": yolo.backbone}, {})
    assert main([str(path), "--format", "ultralytics"]) == 0
    found = load_file(tmp_path / "pretrained-ultralytics.safetensors")
    assert {int(key.split(".")[1]) for key in found} == set(range(9))
    told = capsys.readouterr().out
    assert "model.9 to model.21, neck and head, are missing" in told
    assert "strict=False" in told


@pytest.mark.parametrize("width", ["n", "s"])
def test_ultralytics_tensors_of_a_pretrained_neck(
    tmp_path: Path, width: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pretrained.safetensors"
    source = build_detector("yolo12n", 24, width=width)
    save_product(path, parts_of(source), {})
    assert main([str(path), "--format", "ultralytics"]) == 0
    found = load_file(tmp_path / "pretrained-ultralytics.safetensors")
    told = capsys.readouterr().out
    layers = {int(key.split(".")[1]) for key in found}
    if width == "s":  # which no public model has with this backbone
        assert layers == set(range(9))
        assert "model.9 to model.21, neck and head, are missing" in told
        return
    assert layers == {*range(9), 11, 14, 15, 17, 18, 20}
    whole = to_ultralytics(source)
    assert all(torch.equal(value, whole[key]) for key, value in found.items())
    assert "model.21, the head, is missing" in told


@pytest.mark.parametrize("detector", [True, False])
def test_timm_takes_the_backbone_of_either_file(
    tmp_path: Path, detector: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = build_detector("timm/test_resnet", 1)
    path = tmp_path / "weights.safetensors"
    if detector:
        save_detector(path, parts_of(source), names=["a"], image_size=96, metadata={})
    else:
        save_product(path, {"backbone": source.backbone}, {})
    assert main([str(path), "--format", "timm"]) == 0
    told = capsys.readouterr().out
    line = re.search(r"timm\.create_model\('test_resnet', num_classes=0, .*\)", told)
    assert line
    out = tmp_path / "weights-timm.safetensors"
    state = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(out)).state_dict()
    ours = source.backbone.state_dict()
    assert all(torch.equal(value, ours[f"model.{key}"]) for key, value in state.items())


def test_a_detector_file_is_asked_for_where_the_whole_is_exported(
    yolo: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": yolo.backbone}, {})
    for kind in ("onnx", "torch_export"):
        assert main([str(path), "--format", kind]) == 4
        assert "holds a backbone and no detector" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["pretrained.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--format", "timm"], 2, "yolo12n is no model of timm"),
        (["--format", "torchvision"], 2, "yolo12n is no model of timm"),
        (["--format", "ultralytics", "--nms"], 2, "--nms goes with --format onnx"),
        (
            ["--format", "onnx", "--score", "0.2", "--most", "9"],
            2,
            "--score, --most: without --nms",
        ),
        (["--format", "ultralytics", "--image-size", "320"], 2, "--image-size is noted in onnx"),
        (["--format", "onnx", "--opset", "11"], 2, "--opset 11 is too old"),
        (["--format", "onnx", "--nms", "--iou", "1.5"], 2, "between 0 and 1"),
        (["--format", "onnx", "--image-size", "100"], 2, "must be a multiple of 32"),
        (["--format", "onnx", "--out", "a.bin"], 2, "must end in .onnx"),
        (["--format", "ultralytics", "--out", "nowhere/a.pt"], 2, "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    weights: Path,
    arguments: list[str],
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(weights), *arguments]) == code
    assert told in capsys.readouterr().err


def test_weights_are_not_overwritten(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights.read_bytes()
    assert main([str(weights), "--format", "ultralytics", "--out", str(weights)]) == 2
    assert "is WEIGHTS itself" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_a_file_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.safetensors", "--format", "ultralytics"]) == 4
    assert "There is no file nowhere.safetensors." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("nms", [True, False])
def test_onnx_by_the_command(tmp_path: Path, nms: bool, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "detector.safetensors"
    parts = parts_of(build_detector("timm/test_resnet", 2))
    save_detector(path, parts, names=["a", "b"], image_size=96, metadata={})
    flags = ["--nms", "--score", "0.25"] if nms else []
    assert main([str(path), "--format", "onnx", *flags]) == 0
    assert "onnxruntime is off by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "detector-onnx.onnx")
    noted = session.get_modelmeta().custom_metadata_map
    assert (noted["names"], noted["image_size"]) == ('["a", "b"]', "96")
    assert [one.name for one in session.get_outputs()] == (
        ["detections"] if nms else ["boxes", "scores"]
    )
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "detector-onnx.onnx",
        "detector.safetensors",
    ]
