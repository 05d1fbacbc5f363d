"""A detector's file, and what a start takes from which file."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.detector import Detector, build_detector
from finetune.exchange import to_ultralytics
from finetune.weights import Taken, detector_from_file, load_init, parts_of, save_detector
from groundwork.backbones.product import save_product
from groundwork.errors import CheckpointError

SMALL = "timm/test_resnet"
BOXES, CLASSES = "head's box branch", "head's class branch"


def _filled(name: str, classes: int = 3, seed: int = 5, **options: Any) -> Detector:
    """Build a detector in which every number is another than at the start."""
    detector = build_detector(name, classes, **options)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in detector.state_dict().items():
        if tensor.is_floating_point() and key != "head.bins":
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return detector


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


def _save(path: Path, detector: Detector) -> Path:
    names = [f"class_{i}" for i in range(detector.head.num_classes)]
    save_detector(path, parts_of(detector), names=names, image_size=96, metadata={"task": "none"})
    return path


# ---- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"), [("yolo12n", {}), (SMALL, {"width": "s", "objectness": True})]
)
def test_a_detector_comes_back_as_it_was(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    detector = _filled(name, **options)
    again, about = detector_from_file(_save(tmp_path / "detector.safetensors", detector))
    assert _equal(detector, again)
    assert not again.training
    assert about.names == ("class_0", "class_1", "class_2")
    assert about.image_size == 96
    assert about.metadata["task"] == "none"
    assert (again.head.objectness is None) == ("objectness" not in options)


def test_a_backbone_alone_is_no_detector(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_product(path, {"backbone": build_detector(SMALL, 1).backbone}, {})
    with pytest.raises(CheckpointError, match=r"holds a backbone and no detector: train one with"):
        detector_from_file(path)


# ---- a start: which file gives which parts -----------------------------------------------------


@pytest.mark.parametrize("name", ["yolo12n", SMALL])
def test_a_product_of_pretraining_gives_the_backbone(tmp_path: Path, name: str) -> None:
    source, target = _filled(name), build_detector(name, 3)
    before = _tensors(target.head)
    save_product(tmp_path / "pretrained.safetensors", {"backbone": source.backbone}, {})
    report = load_init(target, tmp_path / "pretrained.safetensors")
    assert _equal(source.backbone, target.backbone)
    assert all(torch.equal(value, before[key]) for key, value in _tensors(target.head).items())
    assert report.loaded == {"backbone"}
    assert "tensors of the backbone (100 %). The neck is not in the file" in report.sentence()


def test_a_neck_that_was_trained_too_is_taken(tmp_path: Path) -> None:
    source, target = _filled("yolo12n"), build_detector("yolo12n", 3)
    parts = {"backbone": source.backbone, "neck": source.neck}
    save_product(tmp_path / "pretrained.safetensors", parts, {})
    report = load_init(target, tmp_path / "pretrained.safetensors")
    assert _equal(source.backbone, target.backbone)
    assert _equal(source.neck, target.neck)
    assert report.loaded == {"backbone", "neck"}


def test_a_detector_gives_all_of_itself(tmp_path: Path) -> None:
    source, target = _filled(SMALL, objectness=True), build_detector(SMALL, 3, objectness=True)
    report = load_init(target, _save(tmp_path / "detector.safetensors", source))
    assert _equal(source, target)
    assert report.left == ()
    assert all(part.missing == part.unexpected == [] for part in report.parts)


@pytest.mark.parametrize(
    ("part", "loaded"), [("neck", {"backbone", "neck"}), ("backbone", {"backbone"})]
)
def test_no_more_is_taken_than_is_asked_for(tmp_path: Path, part: Taken, loaded: set[str]) -> None:
    whole = _filled(SMALL)
    path = _save(tmp_path / "detector.safetensors", whole)
    torch.manual_seed(0)
    detector = build_detector(SMALL, 3)
    before = _tensors(detector.head)
    report = load_init(detector, path, part)
    assert report.loaded == loaded
    assert _equal(whole.backbone, detector.backbone)
    assert _equal(whole.neck, detector.neck) == (part == "neck")
    assert all(torch.equal(value, before[key]) for key, value in _tensors(detector.head).items())
    assert f"detector.take={part}" in report.sentence()


def test_the_class_branch_stays_as_initialised_where_the_number_of_classes_differs(
    tmp_path: Path,
) -> None:
    source, target = _filled(SMALL, 3), build_detector(SMALL, 5)
    before = _tensors(target.head.classes)
    report = load_init(target, _save(tmp_path / "detector.safetensors", source))
    assert _equal(source.neck, target.neck)
    assert _equal(source.head.boxes, target.head.boxes)
    assert all(torch.equal(v, before[k]) for k, v in _tensors(target.head.classes).items())
    assert report.loaded == {"backbone", "neck", BOXES}
    assert (
        "The head's class branch is left as initialised: the file's is for 3 classes, this one "
        "for 5."
    ) in report.sentence()


def test_the_class_branch_of_other_names_stays_as_initialised(tmp_path: Path) -> None:
    path = _save(tmp_path / "detector.safetensors", _filled(SMALL, 3))
    own = ["class_0", "class_1", "class_2"]
    target = build_detector(SMALL, 3)
    before = _tensors(target.head.classes)
    told = load_init(target, path, classes=own[::-1]).sentence()
    assert "the file's classes are class_0, class_1, class_2, and these are class_2" in told
    assert all(torch.equal(v, before[k]) for k, v in _tensors(target.head.classes).items())
    report = load_init(target, path, classes=own)
    assert "head's class branch" in report.loaded
    assert not all(torch.equal(v, before[k]) for k, v in _tensors(target.head.classes).items())


def test_objectness_on_one_side_alone_is_told(tmp_path: Path) -> None:
    with_it, without = _filled(SMALL, objectness=True), _filled(SMALL, seed=6)
    path = _save(tmp_path / "detector.safetensors", with_it)
    told = load_init(build_detector(SMALL, 3), path).sentence()
    assert "tensors of the head's objectness branch are not wanted" in told
    path = _save(tmp_path / "other.safetensors", without)
    told = load_init(build_detector(SMALL, 3, objectness=True), path).sentence()
    assert "The head's objectness branch is not in the file and left as initialised." in told


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_timm_checkpoint_gives_a_timm_backbone(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(1)
    full = timm.create_model("test_resnet", num_classes=7).state_dict()
    path = tmp_path / f"model{ending}"
    if ending == ".pth":
        torch.save({"state_dict": full}, path)
    else:
        save_file(full, path)
    target = build_detector(SMALL, 3)
    report = load_init(target, path)
    for key, value in target.backbone.state_dict().items():
        assert torch.equal(value, full[key.removeprefix("model.")])
    [backbone] = report.parts
    assert backbone.missing == []
    assert sorted(backbone.unexpected) == ["fc.bias", "fc.weight"]


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_public_names_give_a_whole_detector(tmp_path: Path, prefix: str, ending: str) -> None:
    source, target = _filled("yolo12n"), build_detector("yolo12n", 3)
    tensors = {f"{prefix}{key}": value for key, value in to_ultralytics(source).items()}
    path = tmp_path / f"tensors{ending}"
    if ending == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    report = load_init(target, path)
    assert _equal(source, target)
    assert report.loaded == {"backbone", "neck", BOXES, CLASSES}


# ---- mismatches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "teacher.", "module._orig_mod.", "encoder.module."]
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    source, target = _filled(SMALL), build_detector(SMALL, 3)
    tensors = {f"{prefix}{key}": value for key, value in _tensors(source).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    assert load_init(target, tmp_path / "weights.safetensors").left == ()
    assert _equal(source, target)


def test_student_and_teacher_in_one_file_are_never_mixed(tmp_path: Path) -> None:
    student, teacher, target = _filled(SMALL, 3, 1), _filled(SMALL, 3, 2), build_detector(SMALL, 3)
    tensors = {f"teacher.{key}": value for key, value in _tensors(teacher).items()}
    tensors |= dict(list(_tensors(student).items())[:-3])
    save_file(tensors, tmp_path / "both.safetensors")
    report = load_init(target, tmp_path / "both.safetensors")
    assert _equal(teacher, target)
    assert "head.boxes.0.0.conv.weight" in report.parts[2].unexpected


def test_another_scale_is_refused_and_the_detector_is_as_it_was(tmp_path: Path) -> None:
    target = build_detector("yolo12n", 3)
    before = _tensors(target)
    path = _save(tmp_path / "detector.safetensors", build_detector("yolo12s", 3))
    with pytest.raises(CheckpointError, match=r"holds yolo12s: set backbone\.name=yolo12s") as told:
        load_init(target, path)
    assert "fits yolo12n in 0 of 285 tensors (0 %), and 90 % are needed" in str(told.value)
    assert all(torch.equal(value, before[key]) for key, value in _tensors(target).items())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "detector.safetensors", build_detector(SMALL, 3))
    with pytest.raises(CheckpointError, match=r"set backbone\.name=timm/test_resnet"):
        load_init(build_detector("yolo12n", 3), path)


def test_a_neck_of_another_width_is_refused_though_the_backbone_fits(tmp_path: Path) -> None:
    target = build_detector(SMALL, 3)
    before = _tensors(target)
    path = _save(tmp_path / "detector.safetensors", _filled(SMALL, width="s"))
    with pytest.raises(CheckpointError, match=r"its width is s: set detector\.width=s"):
        load_init(target, path)
    assert all(torch.equal(value, before[key]) for key, value in _tensors(target).items())


def test_a_missing_stem_is_reported_and_one_for_four_channels_refused(tmp_path: Path) -> None:
    tensors = to_ultralytics(_filled("yolo12n"))
    without = {key: value for key, value in tensors.items() if not key.startswith("model.0.")}
    save_file(without, tmp_path / "without.safetensors")
    report = load_init(build_detector("yolo12n", 3), tmp_path / "without.safetensors")
    assert len(report.parts[0].missing) == 5
    assert "280 of 285 tensors of the backbone (98.2 %); 5 missing" in report.sentence()

    save_file(
        tensors | {"model.0.conv.weight": torch.zeros(16, 4, 3, 3)}, tmp_path / "four.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"made for pictures of 4 channels .* here have 3"):
        load_init(build_detector("yolo12n", 3), tmp_path / "four.safetensors")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(("yolo12n", "timm/resnet10t"), ("product", "detector", "plain")),
        ("yolo12n", "public"),
    ],
)
def test_weights_of_rgb_start_a_detector_of_four_channels(
    tmp_path: Path, name: str, form: str
) -> None:
    rgb = _filled(name)
    path = tmp_path / "rgb.safetensors"
    if form == "product":
        save_product(path, {"backbone": rgb.backbone}, {})
    elif form == "detector":
        _save(path, rgb)
    else:
        public = form == "public"
        own = to_ultralytics(rgb) if public else dict(rgb.backbone.state_dict())
        save_file({key.removeprefix("model.") if not public else key: value.clone()
                   for key, value in own.items()}, path)  # fmt: skip
    detector = build_detector(name, 3, in_channels=4)
    report = load_init(detector, path)
    assert report.parts[0].share == 1
    assert len(report.parts[0].widened) == 1
    (first, *_), (wide, *_) = (
        [p for p in one.backbone.parameters() if p.dim() == 4] for one in (rgb, detector)
    )
    assert torch.allclose(wide, first[:, [0, 1, 2, 0]] * 3 / 4)
    other = build_detector(name, 3, in_channels=2)
    four = _save(tmp_path / "four.safetensors", detector)
    with pytest.raises(CheckpointError, match="made for pictures of 4 channels"):
        load_init(other, four)


@pytest.mark.parametrize(("lost", "fits"), [(19, True), (20, False)])
def test_ninety_percent_are_asked_of_each_part(tmp_path: Path, lost: int, fits: bool) -> None:
    source, target = _filled("yolo12n"), build_detector("yolo12n", 3)
    before = _tensors(target)
    tensors = {k: v for k, v in _tensors(source).items() if "num_batches" not in k}
    necks = [key for key in tensors if key.startswith("neck.")]
    assert len(necks) == 190  # so that 90 % is 171
    for key in necks[:lost]:
        del tensors[key]
    save_file(tensors, tmp_path / "weights.safetensors")
    if fits:
        assert len(load_init(target, tmp_path / "weights.safetensors").parts[1].missing) == lost
        return
    with pytest.raises(CheckpointError, match=r"fits the neck of yolo12n .* 170 of 190"):
        load_init(target, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in _tensors(target).items())


def test_numbers_that_are_not_finite_are_refused_whole(tmp_path: Path) -> None:
    source, target = _filled(SMALL), build_detector(SMALL, 3)
    before = _tensors(target)
    tensors = _tensors(source)
    tensors["head.boxes.0.2.bias"][3] = float("inf")
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite, in head\.boxes\.0\.2\.bias"):
        load_init(target, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in _tensors(target).items())


def test_type_and_memory_format_of_the_detector_stay(tmp_path: Path) -> None:
    target = build_detector(SMALL, 3).to(memory_format=torch.channels_last)
    half = {k: v.half() if v.is_floating_point() else v for k, v in _tensors(target).items()}
    save_file({k: v.contiguous() for k, v in half.items()}, tmp_path / "half.safetensors")
    load_init(target, tmp_path / "half.safetensors")
    weight = target.state_dict()["neck.layers.15.conv.weight"]
    assert weight.dtype is torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)


# ---- files that hold code ----------------------------------------------------------------------


class Malicious:
    """A pickle of this makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    torch.save({"model": {"conv.weight": torch.zeros(1)}, "hook": Malicious(marker)}, path)
    with pytest.raises(CheckpointError, match="pickles are not read, because they can run code"):
        load_init(build_detector(SMALL, 3), path)
    assert not marker.exists()


def test_a_pickled_public_model_is_refused_with_how_to_save_its_tensors(tmp_path: Path) -> None:
    """Its pickle names a class of theirs, which is not looked for either."""
    path = tmp_path / "yolo12n.pt"
    torch.save({"model": torch.zeros(1)}, path)
    named = b"cultralytics.nn.tasks\nDetectionModel\n)R."
    _replace_pickle(path, named)
    with pytest.raises(CheckpointError) as told:
        load_init(build_detector("yolo12n", 3), path)
    assert "is a pickled model, which can run code and is not read" in str(told.value)
    line = "torch.save(YOLO('yolo12n.pt').model.state_dict(), 'yolo12n_tensors.pt')"
    assert line in str(told.value)


def _replace_pickle(path: Path, pickled: bytes) -> None:
    """Write a torch archive anew with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, b"\x80\x02" + pickled if is_pickle else content)
