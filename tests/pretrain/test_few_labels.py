"""From many pictures and few labels to a detector: all stages in order, once each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import recipe as finetune_recipes
from finetune.weights import detector_from_file
from groundwork.config import parse_overrides, to_yaml, validate
from groundwork.errors import DataError, StoppedError, UsageError
from pretext_tasks.self_training import SelfTrainingConfig
from pretrain import few_labels
from pretrain import recipe as pretrain_recipes
from pretrain.few_labels import main
from pretrain.stage_keys import evaluation_keys, probe_keys

TINY = [
    "--keys", "threads=1", "data.workers=0", "batch_size=2", "image_size=64", "budget.steps=2",
    "report=false", "backbone.name=timm/test_resnet", "precision=fp32",
]  # fmt: skip
PROBE = ["probe.times=1", "probe.labeled=null", "probe.detection.steps=2"]
NO_PROBE = ["probe.times=0", "probe.labeled=null"]


class Stages:
    """Stands for the stages: every fine-tuning reaches the next of `reached`."""

    def __init__(self, reached: Sequence[float | None]) -> None:
        self.reached = list(reached)
        self.ran: list[tuple[str, list[str]]] = []
        self.stop_at: str | None = None
        self.product = ""  # what is written

    def go_on(
        self, module: str, run: Path, flags: list[str], keys: list[str], launch: str | None
    ) -> None:
        assert launch == "accelerate launch"
        if run.name == self.stop_at:
            raise StoppedError("stopped")
        self.ran.append((run.name, [*flags, *keys]))
        run.mkdir(parents=True, exist_ok=True)
        (run / "status.json").write_text(json.dumps({"state": "done"}))
        for product in ("pretrained", "detector"):
            (run / f"{product}.safetensors").write_text(self.product or run.name)
        if module == "finetune.run":
            recipe = finetune_recipes.resolve("aerial", keys)
            (run / "recipe.yaml").write_text(to_yaml(recipe))
        if module == "finetune.run" and (ap := self.reached.pop(0)) is not None:
            results = {"split": "test", "ap": 0.99, "val": {"ap": ap}}  # a key asked for test
            if len(self.reached) % 2:
                results = {"split": "val", "ap": ap}
            (run / "results.json").write_text(json.dumps(results))

    def average(self, out: Path, files: Sequence[Path], shares: Sequence[float]) -> None:
        assert list(shares) == [1.0, 1.0]
        out.write_text("+".join(file.read_text() for file in files))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stand_in = Stages([0.3, 0.4, 0.35])
    scored = iter([0.42, 0.45, 0.43, 0.44])  # of each round the student and the mean
    monkeypatch.setattr(few_labels, "go_on", stand_in.go_on)
    monkeypatch.setattr(few_labels, "write_average", stand_in.average)
    monkeypatch.setattr(few_labels, "check", lambda *_: None)
    monkeypatch.setattr(few_labels, "hash_of_pictures", lambda *_: "many")
    monkeypatch.setattr(few_labels, "_scored", lambda *_: next(scored))
    monkeypatch.setattr(few_labels, "_evaluated", lambda *_: {"per_class": {}})
    return stand_in


def test_stages_follow_each_other_and_the_best_on_val_is_kept(
    stages: Stages, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, general = tmp_path / "out", tmp_path / "general.safetensors"
    general.write_text("learned from other pictures")
    command = [
        "pictures", str(labeled), "--recipe", "aerial", "--out", str(out), "--rounds", "2",
        "--launch", "accelerate launch", "--keys", "seed=3", "--pretrain", "budget.epochs=7",
        "--teach", "task.score=0.5", "--finetune", "image_size=128", "--init", str(general),
    ]  # fmt: skip
    stages.stop_at = "4-finetune"
    assert main(command) == 75
    assert [name for name, _ in stages.ran] == ["1-pretrain", "2-finetune", "3-teach"]
    stages.stop_at = None
    assert main(command) == 0
    ran = dict(stages.ran)
    assert list(ran) == [
        "1-pretrain", "2-finetune", "3-teach", "4-finetune", "5-teach", "6-finetune",
    ]  # fmt: skip
    assert len(stages.ran) == len(ran)  # each of them once
    first, mean = out / "2-finetune/detector.safetensors", out / "4-finetune/mean.safetensors"
    assert ran["1-pretrain"] == [
        "--recipe", "aerial", "--init", str(general), "probe.select=last",
        f"probe.detection.data={labeled}", "probe.detection.image_size=128",
        "data.train=pictures", "seed=3", "budget.epochs=7",
    ]  # fmt: skip
    start = ["--recipe", "aerial", "--init", str(out / "1-pretrain" / "pretrained.safetensors")]
    labels = [f"data.train={labeled}", "eval.test=false", "seed=3", "image_size=128"]
    assert ran["2-finetune"] == [*start, *labels]
    assert ran["3-teach"] == [
        "--recipe", "aerial_taught", "--init", str(first), "data.train=pictures",
        f"task.weights={first}", "seed=3", "task.score=0.5",
    ]  # fmt: skip
    start = ["--recipe", "aerial_taught", "--init", str(out / "3-teach/pretrained.safetensors")]
    assert ran["4-finetune"] == [*start, *labels]
    assert f"task.weights={mean}" in ran["5-teach"]  # the best so far
    told = json.loads((out / "few_labels.json").read_text())
    assert [one["ap"] for one in told["detectors"]] == [0.3, 0.4, 0.42, 0.45, 0.35, 0.43, 0.44]
    assert told["kept"] == str(mean)
    assert (out / "detector.safetensors").read_text() == "4-finetune+3-teach"
    # With other keys what is there is not taken for the same, and not what followed from it.
    other = [*command, "--teach", "task.unsure=0.2"]  # beside the one that was given
    assert main(other) == 2
    general.write_text("other weights")
    assert main(command) == 2
    assert "1-pretrain was made by another" in capsys.readouterr().err
    general.write_text("learned from other pictures")
    shutil.rmtree(out / "3-teach")
    stages.product = "another"
    assert main(other) == 2
    assert stages.ran[-1][0] == "3-teach"
    assert {"task.score=0.5", "task.unsure=0.2"} <= set(stages.ran[-1][1])
    assert "4-finetune was made by another command, or from another" in capsys.readouterr().err


def test_classes_are_taught_from_the_score_that_is_best_on_val(
    stages: Stages, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["image_size=64", "score=0.001", "iou=0.7", "data.val=ROOT"]
    classes: dict[str, float | None] = {"red": 0.31, "blue": 0.05, "never seen": None}
    asked: list[tuple[Path, Path, list[str]]] = []

    def evaluated(file: Path, out: Path, keys: list[str]) -> dict[str, Any]:
        asked.append((file, out, keys))
        return {"per_class": {name: {"f1_score": score} for name, score in classes.items()}}

    monkeypatch.setattr(few_labels, "evaluation_keys", lambda recipe: own)
    monkeypatch.setattr(few_labels, "_evaluated", evaluated)
    out, first = tmp_path / "out", tmp_path / "out" / "2-finetune" / "detector.safetensors"
    command = ["pictures", str(labeled), "--recipe", "medical", "--launch", "accelerate launch"]
    looks = ["task.find=picture", "task.looks=4", "task.teacher_size=448", "task.iou=0.6"]
    assert main([*command, "--out", str(out), "--teach", *looks]) == 0
    [(file, folder, keys)] = asked
    assert file == first and folder == first.parent / "scores-detector"
    assert set(keys) == {
        "image_size=448", "looks=4", "iou=0.6", "score=0.001", "data.val=ROOT",
    }  # fmt: skip
    [told] = [key for key in dict(stages.ran)["3-teach"] if key.startswith("task.score")]
    # What val does not show as sure as the surest; and nothing that is found is denied.
    score = validate(SelfTrainingConfig, parse_overrides([told, "task.unsure=0.01"])["task"]).score
    assert score == {"red": 0.31, "blue": 0.05, "never seen": 0.31}
    assert "task.unsure=0.0250" in dict(stages.ran)["3-teach"]
    # Not where it is given, the teacher looks at views, or it finds nothing that is right.
    cases: list[tuple[list[str], dict[str, float | None]]] = [
        ([*looks, "task.score=0.4"], classes),
        (["task.find=view"], classes),
        (looks, {"red": None, "blue": None}),
    ]
    for number, (more, found) in enumerate(cases):
        stages.reached += [0.3, 0.4]
        monkeypatch.setattr(few_labels, "_scored", lambda *_: 0.5)
        classes = found
        assert main([*command, "--out", str(tmp_path / str(number)), "--teach", *more]) == 0
        given = [key for key in stages.ran[-2][1] if key.startswith("task.score")]
        assert given == [key for key in more if key.startswith("task.score")]
    assert len(asked) == 2


def test_a_mean_that_cannot_be_is_left_out(
    stages: Stages, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def average(*_: object) -> None:
        raise UsageError("they see other bands or values")

    monkeypatch.setattr(few_labels, "write_average", average)
    out = tmp_path / "out"
    command = ["pictures", str(labeled), "--recipe", "aerial", "--out", str(out)]
    assert main([*command, "--launch", "accelerate launch"]) == 0
    assert len(json.loads((out / "few_labels.json").read_text())["detectors"]) == 2


def test_a_mean_is_scored_as_its_rivals_are(labeled: Path) -> None:
    def recipe(*keys: str) -> dict[str, Any]:
        resolved = finetune_recipes.resolve(
            "aerial", [f"data.train={labeled}", "eval.score=0.01", "eval.iou=0.6", *keys]
        )
        document = yaml.safe_load(to_yaml(resolved))
        assert isinstance(document, dict)
        return document

    shared = [
        "batch_size=16", "score=0.01", "iou=0.6", "most=300", "image_size=256",
        "data.max_pixels=9",
    ]  # fmt: skip
    val = f"data.val={labeled}"
    assert evaluation_keys(recipe("data.max_pixels=9")) == [*shared, val]
    for name in ("val", "test"):
        (labeled / "annotations" / f"{name}.json").unlink()
    assert evaluation_keys(recipe("data.max_pixels=9")) is None
    other = evaluation_keys(recipe("data.max_pixels=9", "data.val=else", "data.cache=there"))
    assert other == [*shared, "data.cache=there", "data.val=else"]
    held = recipe("data.max_pixels=9", "data.holdout=0.2", "data.train_list=names.txt")
    more = ["data.holdout=0.2", "data.split=train", "data.train_list=names.txt"]
    assert evaluation_keys(held) == [*shared, val, *more]


def test_pretraining_is_probed_on_the_pictures_that_fine_tuning_uses(labeled: Path) -> None:
    def keys(*given: str, finetune: Sequence[str] = ()) -> list[str]:
        own = pretrain_recipes.resolve(None, "aerial", ["data.train=pictures"])
        labels = finetune_recipes.resolve("aerial", [f"data.train={labeled}", *finetune])
        return probe_keys(own, labels, given)

    first = ["probe.select=last", f"probe.detection.data={labeled}"]
    size = "probe.detection.image_size=256"
    assert keys() == [*first, size]
    assert keys("probe.times=9", finetune=["data.val=else", "data.train_list=few.txt"]) == [
        *first, "probe.detection.train_list=few.txt", "probe.detection.val=else", size,
    ]  # fmt: skip
    assert keys("seed=3", "probe.detection.data=null") == []
    assert keys("probe.detection.data=other", "probe.select=ap") == []
    assert keys("probe.patience=3", "probe.detection.steps=9") == [first[1], size]
    assert keys(finetune=["data.bands=[1,2,3,4]"]) == []  # other colours than the network sees
    (labeled / "annotations" / "val.json").unlink()
    assert keys() == []
    assert keys(finetune=["data.holdout=0.2"]) == [
        *first, "probe.detection.holdout=0.2", size,
    ]  # fmt: skip


def test_other_pictures_or_labels_are_not_taken_for_those_of_stages_that_are_done(
    stages: Stages,
    labeled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures, labels = "many", "few"
    monkeypatch.setattr(few_labels, "hash_of_pictures", lambda _: pictures)
    monkeypatch.setattr(few_labels, "hash_of_labels", lambda _: labels)
    monkeypatch.setattr(few_labels, "_scored", lambda *_: 0.5)
    out = tmp_path / "out"
    command = ["pictures", str(labeled), "--recipe", "aerial", "--out", str(out)]
    command += ["--launch", "accelerate launch"]
    # A stage that came to nothing is begun anew, with whatever was mended.
    (out / "1-pretrain").mkdir(parents=True)
    (out / "1-pretrain" / "status.json").write_text('{"state": "failed"}')
    (out / "data.json").write_text('{"pictures": "with a bad one", "labels": "few"}')
    (out / "2nd-try").mkdir()
    assert main([*command, "--keys", "data.workers=2"]) == 0
    ran = len(stages.ran)
    pictures = "gone, and nobody looks any more"
    assert main([*command, "--keys", "data.workers=4", "threads=1"]) == 0
    assert len(stages.ran) == ran
    labels = "more"
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "The labels are not those that 2-finetune, 3-teach, 4-finetune of" in told
    for name in ("2-finetune", "3-teach", "4-finetune"):
        shutil.rmtree(out / name)
    assert main(command) == 2  # 3-teach is to see them
    assert "The pictures are not those that 1-pretrain of" in capsys.readouterr().err
    pictures, stages.reached = "many", [0.5, 0.6]
    assert main(command) == 0
    assert [name for name, _ in stages.ran[ran:]] == ["2-finetune", "3-teach", "4-finetune"]


def test_other_pictures_of_teaching_are_not_taken_for_those_that_were_taught(
    stages: Stages,
    labeled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hashes = {"pictures": "many", "more": "still more"}
    monkeypatch.setattr(few_labels, "hash_of_pictures", lambda recipe: hashes[recipe.data.train])
    monkeypatch.setattr(few_labels, "hash_of_labels", lambda _: "few")
    monkeypatch.setattr(few_labels, "_scored", lambda *_: 0.5)
    out = tmp_path / "out"
    command = ["pictures", str(labeled), "--recipe", "aerial", "--out", str(out)]
    command += ["--launch", "accelerate launch", "--teach", "data.train=more"]
    assert main(command) == 0
    shutil.rmtree(out / "4-finetune")
    stages.reached = [0.6]
    hashes["more"] = "others"
    assert main(command) == 0  # gone, as far as anybody knows: all stages that see them are done
    (out / "3-teach" / "status.json").write_text('{"state": "stopped"}')
    checkpoint = out / "3-teach" / "checkpoints" / "step-500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "The pictures of --teach are not those that 3-teach, 4-finetune of" in told
    # The first stage is done, so that nothing needs its pictures any more.
    del hashes["pictures"]
    hashes["more"] = "still more"
    shutil.rmtree(out / "4-finetune")
    stages.reached = [0.6]
    assert main(command) == 0


def test_hashes_are_of_pictures_and_of_labels_and_what_is_not_held_out_is_told(
    labeled: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def of_pictures() -> str:
        keys = [f"data.train={labeled / 'images' / 'train'}"]
        return few_labels.hash_of_pictures(pretrain_recipes.resolve(None, "aerial", keys))

    def of_labels() -> str:
        keys = [f"data.train={labeled}", "eval.test=false"]
        return few_labels.hash_of_labels(finetune_recipes.resolve("aerial", keys))

    pictures, labels = of_pictures(), of_labels()
    assert of_labels() == labels
    for split in ("train", "val"):
        path = labeled / "annotations" / f"{split}.json"
        before = path.read_text()
        path.write_text(before.replace('"category_id": 1', '"category_id": 2', 1))
        assert of_labels() != labels
        path.write_text(before)
    assert of_pictures() == pictures
    shutil.copy(labeled / "images/val/00.png", labeled / "images/train/other.png")
    assert of_pictures() != pictures
    (labeled / "annotations" / "val.json").unlink()
    assert not caplog.records
    of_labels()
    assert "No labeled pictures are held out" in caplog.text
    path = labeled / "annotations" / "train.json"
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    with pytest.raises(DataError, match="20 of 20 boxes are crowds"):
        of_labels()


def test_a_detector_of_other_values_does_not_teach(
    stages: Stages,
    labeled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["pictures", str(labeled), "--recipe", "aerial", "--out", str(tmp_path / "out")]
    command += ["--launch", "accelerate launch", "--finetune", "data.value_range=[0,4095]"]
    same = "data.value_range=[0,4095]"
    for more in ([], ["--pretrain", same]):
        assert main([*command, *more]) == 2
        assert "cannot teach on the others" in capsys.readouterr().err
    assert main([*command, "--rounds", "0"]) == 0
    assert "no detection probe" in capsys.readouterr().out
    stages.reached = [0.3, 0.4]
    out = str(tmp_path / "both")
    assert main([*command, "--out", out, "--pretrain", same, "--teach", same]) == 0
    assert "no detection probe" not in capsys.readouterr().out


def test_a_teacher_that_finds_nothing_is_told(
    stages: Stages, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.reached = [0.0, 0.0]
    command = ["pictures", str(labeled), "--recipe", "aerial", "--out", str(tmp_path / "out")]
    assert main([*command, "--launch", "accelerate launch"]) == 0
    assert "finds nothing on val" in capsys.readouterr().out


def test_processes_are_started_by_the_command_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["scenes", "scenes", "--recipe", "aerial", "--out", str(tmp_path / "out")]) == 2
    assert "with --launch" in capsys.readouterr().err


def test_where_nothing_is_held_out_the_last_mean_is_kept(
    stages: Stages, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.reached = [None, None]
    monkeypatch.setattr(few_labels, "_scored", lambda *_: None)
    out = tmp_path / "out"
    command = ["pictures", str(labeled), "--recipe", "aerial", "--out", str(out)]
    assert main([*command, "--launch", "accelerate launch"]) == 0
    assert (out / "detector.safetensors").read_text() == "4-finetune+3-teach"


def test_what_a_later_stage_would_not_take_is_told_before_the_first(
    labeled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    command = ["scenes", str(labeled), "--out", str(out), "--recipe"]
    assert main([*command, "aerial", "--teach", "task.scoer=0.5"]) == 2
    assert "task.scoer" in capsys.readouterr().err
    assert main([*command, "byol"]) == 2
    assert "byol" in capsys.readouterr().err
    assert main([*command, "aerial", "--rounds", "-1"]) == 2
    assert main([*command, "aerial", "--init", "nowhere.safetensors"]) == 2
    assert "--init nowhere.safetensors" in capsys.readouterr().err
    (labeled / "annotations" / "train.json").write_text("{}")
    monkeypatch.setattr(few_labels, "check", lambda *_: None)  # which is four programs
    assert main([*command, "aerial"]) == DataError.exit_code
    assert not out.exists()


@pytest.mark.slow
def test_the_stages_run(labeled: Path, tmp_path: Path, forked_stages: None) -> None:
    for name in ("val", "test"):
        (labeled / "annotations" / f"{name}.json").unlink()
    out = tmp_path / "out"
    command = [
        str(labeled / "images" / "train"), str(labeled), "--recipe", "medical", "--out", str(out),
        *TINY, "--pretrain", *PROBE, "--teach", *NO_PROBE, "task.teacher_size=96",
        "task.find=picture", "task.looks=2", "--finetune", "eval.times=1", "data.holdout=0.2",
    ]  # fmt: skip
    assert main(command) == 0
    told = json.loads((out / "few_labels.json").read_text())
    assert [Path(one["detector"]).name for one in told["detectors"]] == [
        "detector.safetensors", "detector.safetensors", "pretrained.safetensors",
        "mean.safetensors",
    ]  # fmt: skip
    probed = (out / "1-pretrain" / "metrics.jsonl").read_text()
    assert probed.count('"probe/ap"') == 2  # before and after
    for scored in (
        "4-finetune/evaluation-mean",
        "4-finetune/evaluation-start",
        "4-finetune",
    ):  # by the two that were held out
        assert json.loads((out / scored / "results.json").read_text())["pictures"] == 2
    _, about = detector_from_file(out / "detector.safetensors")
    assert about.names == ("red", "blue") and about.image_size == 64
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert main(command) == 0  # nothing is run twice
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
