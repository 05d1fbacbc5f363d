"""The second stage's command as people type it: what it makes, how it stops, how it goes on."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.weights import detector_from_file
from groundwork.backbones import build_backbone
from groundwork.backbones.product import read_product, save_product
from tests import commands
from tests.commands import (
    FINETUNE,
    LAUNCHER,
    ROOT,
    finished,
    in_folders_of_ranks,
    losses,
    metrics,
    same_tensors,
    started,
    status,
    wait_for_state,
    wait_for_step,
)
from tests.full_disk import on_a_full_disk

TINY = [
    "image_size=64", "batch_size=4", "log.every_steps=1", "data.workers=0", "threads=1",
    "eval.times=1", "eval.batch_size=4", "report=false",
]  # fmt: skip


launch = partial(commands.launch, script=FINETUNE)
run = partial(commands.run, script=FINETUNE)


@pytest.mark.slow
def test_the_literal_command_trains_scores_and_keeps_a_detector(
    labeled: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    init = tmp_path / "pretrained.safetensors"
    save_product(init, {"backbone": build_backbone("yolo12n")}, {"task": "none"})
    done = finished(
        [*LAUNCHER, FINETUNE, "--init", str(init), "--out", "out", f"data.train={labeled}",
         "budget.steps=3", *TINY, "report=true"],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert status(out)["state"] == "done"
    assert sorted(losses(out)) == [1, 2, 3]
    parts = {"train/classification", "train/localisation", "train/distribution"}
    assert parts <= metrics(out)[0].keys()
    results = json.loads((out / "results.json").read_text())
    assert results["split"] == "test" and {"ap", "ap50", "ap75", "per_class", "val"} <= set(results)
    assert set(results["per_class"]) == {"red", "blue"}
    assert (out / "pictures" / "step-0.png").is_file()
    assert "What is found" in (out / "report.html").read_text()
    detector, about = detector_from_file(out / "detector.safetensors")
    assert about.names == ("red", "blue") and about.image_size == 64
    assert detector.head.num_classes == 2


@pytest.mark.slow
def test_a_run_stopped_twice_in_an_epoch_and_in_the_next_is_bit_exact(
    labeled: Path, tmp_path: Path
) -> None:
    # 10 pictures, batches of 4: step 4 lies in epoch two; closing and a phase change on the way.
    keys = [
        f"data.train={labeled}", "budget.steps=10", "checkpoint.every_steps=1",
        "checkpoint.keep=20", "log.samples=true", "augment.close=0.2", "augment.mixup.prob=0.5",
        "image_sizes=[64,96]", "phases=[{until: 0.35, batch_size: 2}]",
        "regularize.dropblock=0.1", *TINY,
    ]  # fmt: skip
    whole = tmp_path / "whole"
    done = run(1, tmp_path, "--out", str(whole), *keys)
    assert done.returncode == 0, done.stderr
    before = whole
    for stop in (1, 2, 6, 9):
        out = tmp_path / f"from-{stop}"
        resumed = run(
            1, tmp_path, "--resume", str(before / "checkpoints" / f"step-{stop}"), "--out", str(out)
        )
        assert resumed.returncode == 0, resumed.stderr
        expected = {step: loss.hex() for step, loss in losses(whole).items() if step > stop}
        assert {step: loss.hex() for step, loss in losses(out).items()} == expected
        for name in ("detector", "optimizer", "ema"):
            file = Path("checkpoints/step-10") / f"{name}.safetensors"
            same_tensors(whole / file, out / file)
        before = out


@pytest.mark.slow
def test_where_validation_has_no_box_the_last_weights_are_kept(
    labeled: Path, tmp_path: Path
) -> None:
    file = labeled / "annotations" / "val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    done = run(
        1, tmp_path, "--out", "out", f"data.train={labeled}", "budget.steps=4", *TINY,
        "eval.times=4", "eval.patience=1", "eval.patience_from=0", "backbone.name=timm/test_resnet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["step"] == 4


@pytest.mark.slow
def test_several_sizes_go_on_with_other_batches(labeled: Path, tmp_path: Path) -> None:
    """After five batches of two, batches of four do not begin where one of them would."""
    keys = [f"data.train={labeled}", "image_sizes=[64,96,128]", "augment.close=0", *TINY]
    done = run(1, tmp_path, "--out", "out", *keys, "batch_size=2", "budget.steps=5")
    assert done.returncode == 0, done.stderr
    done = run(1, tmp_path, "--resume", "out", "batch_size=4", "budget.steps=15")
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "out")) == list(range(1, 16))


@pytest.mark.dist
def test_two_ranks_see_the_batches_of_one_and_score_alike(labeled: Path, tmp_path: Path) -> None:
    keys = [f"data.train={labeled}", "budget.steps=3", "log.samples=true", *TINY]
    seen: list[dict[int, list[str]]] = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        more = ["data.workers=1"] if ranks == 2 else []
        done = run(ranks, tmp_path, "--out", str(out), *keys, *more)
        assert done.returncode == 0, done.stderr
        batches: dict[int, list[str]] = {}
        for path in sorted(out.glob("samples-*.jsonl")):
            for line in path.read_text().splitlines():
                one = json.loads(line)
                batches.setdefault(one["step"], []).extend(one["keys"])
        seen.append(batches)
        assert json.loads((out / "results.json").read_text())["ap"] is not None
    assert seen[0] == seen[1]


@pytest.mark.dist
def test_a_phase_that_ranks_cannot_share_is_told_at_the_start(
    labeled: Path, tmp_path: Path
) -> None:
    phases = "phases=[{until: 0.5}, {until: 1, batch_size: 3}]"
    done = run(
        2, tmp_path, "--out", "out", f"data.train={labeled}", "budget.steps=8", *TINY, phases
    )
    assert done.returncode != 0
    assert status(tmp_path / "out")["exit_code"] == 2
    assert "batch_size=3 of a phase" in status(tmp_path / "out")["message"]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_run_without_hope_ends_and_stays_ended(labeled: Path, tmp_path: Path) -> None:
    keys = [
        f"data.train={labeled}", "budget.steps=10", *TINY, "eval.times=10", "eval.patience=2",
        "eval.patience_from=0", "optim.lr=1e-12", "log.every_steps=7",
    ]  # fmt: skip
    done = run(1, tmp_path, "--out", "out", *keys)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 3  # one that is the best, and two that are not better
    assert results["step"] == 3  # none finds anything: the last are kept
    assert metrics(out)[-1]["step"] == results["steps"]
    assert max(losses(out)) == results["steps"]  # the last step is always told
    before = (out / "metrics.jsonl").read_text()
    kept = (out / "detector.safetensors").read_bytes()
    done = run(1, tmp_path, "--resume", "out")
    assert done.returncode == 0, done.stderr
    assert (out / "metrics.jsonl").read_text() == before
    assert (out / "detector.safetensors").read_bytes() == kept


@pytest.mark.slow
def test_patience_counts_from_where_it_is_wanted_and_weights_know_where_they_began(
    labeled: Path, tmp_path: Path
) -> None:
    init = tmp_path / "pretrained.safetensors"
    save_product(init, {"backbone": build_backbone("timm/test_resnet")}, {"task": "none"})
    keys = [
        f"data.train={labeled}", "budget.steps=4", *TINY, "eval.times=4", "eval.patience_from=0",
        "optim.lr=1e-12", "backbone.name=timm/test_resnet", "checkpoint.every_steps=3",
    ]  # fmt: skip
    done = run(1, tmp_path, "--out", "out", "--init", str(init), *keys)
    assert done.returncode == 0, done.stderr
    # Three scorings in a row were no better, and nobody asked.
    again = ["--resume", "out/checkpoints/step-4", "--out", "two", "eval.patience=2"]
    done = run(1, tmp_path, *again, "budget.steps=8", "eval.times=8")
    assert done.returncode == 0, done.stderr
    assert max(losses(tmp_path / "two")) == 6
    for name in ("out", "two"):
        _, about = read_product(tmp_path / name / "detector.safetensors")
        assert about["init"] == str(init)
    # What was best by another measure is not what is kept, whatever lies there.
    (tmp_path / "out" / "best.safetensors").write_bytes(b"of other labels")
    done = run(1, tmp_path, "--resume", "out", "eval.iou=0.6")
    assert done.returncode == 0 and "looked for anew" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_full_disk_does_not_end_training_before_its_end(labeled: Path, tmp_path: Path) -> None:
    keys = [
        f"data.train={labeled}", "budget.steps=4", *TINY, "eval.times=4",
        "checkpoint.every_steps=2", "log.samples=true",
    ]  # fmt: skip
    command = on_a_full_disk(launch(1, "--out", "out", *keys), 1000)
    done = finished(command, tmp_path)
    assert done.returncode == 4, done.stderr
    out = tmp_path / "out"
    assert sorted(losses(out)) == [1, 2, 3, 4]  # and then there is no product
    assert "detector.safetensors could not be written" in status(out)["message"]
    for name in ("best.safetensors", "step-2"):
        assert any(name in line and "Training goes on." in line for line in done.stdout.split("\n"))
    assert not list(out.rglob("*.writing"))


@pytest.mark.slow
def test_frozen_parts_stand_still_whatever_the_penalty_and_the_average_waits(
    labeled: Path, tmp_path: Path
) -> None:
    keys = [
        f"data.train={labeled}", "budget.steps=6", *TINY, "freeze.backbone=0.5", "freeze.neck=0.2",
        "loss.penalty.l2=0.001", "loss.penalty.l1_scales=0.001", "checkpoint.every_steps=1",
        "checkpoint.keep=20", "ema_from=0.6", "ema.decay=0.5", "ema.warmup=false",
    ]  # fmt: skip
    done = run(1, tmp_path, "--out", "out", *keys)
    assert done.returncode == 0, done.stderr
    saved = {
        step: load_file(tmp_path / "out" / "checkpoints" / f"step-{step}" / "detector.safetensors")
        for step in range(1, 7)
    }

    def moved(part: str, first: int, second: int) -> bool:
        one, other = saved[first], saved[second]
        names = [name for name in one if name.startswith(part) and "num_batches" not in name]
        return any(not torch.equal(one[name], other[name]) for name in names)

    assert moved("head.", 1, 2) and moved("neck.", 2, 3)
    assert not moved("backbone.", 1, 3)  # statistics of BatchNorm among it
    assert moved("backbone.", 3, 4) and moved("backbone.", 5, 6)
    name = "head.boxes.0.0.conv.weight"
    for step, follows in ((2, True), (3, True), (6, False)):
        folder = tmp_path / "out" / "checkpoints" / f"step-{step}"
        average = load_file(folder / "ema.safetensors")
        assert name in average, sorted(average)[:3]
        assert torch.equal(average[name], saved[step][name]) == follows, step


@pytest.mark.dist
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(
    labeled: Path, tmp_path: Path
) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from finetune.training import Training\n"
        "calls, healthy = 0, Training.forward\n"
        "def forward(self, batch):\n"
        "    global calls\n"
        "    loss = healthy(self, batch)\n"
        "    calls += self.training\n"
        "    if calls != 3 or os.environ['RANK'] == '0':\n"
        "        return loss\n"
        "    for buffer in self.buffers():\n"
        "        if buffer.is_floating_point(): buffer.data.mul_(float('nan'))\n"
        "    return loss._replace(total=loss.total * float('nan'))\n"
        "Training.forward = forward\n"
        "from finetune.run import main\n"
        "sys.exit(main())\n"
    )
    keys = [f"data.train={labeled}", "budget.steps=5", *TINY]
    done = commands.run(2, tmp_path, "--out", "out", *keys, script=str(script))
    assert done.returncode == 0, done.stderr
    assert "Step 3 is skipped" in done.stdout
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4, 5]
    assert max(line.get("train/skipped", 0) for line in metrics(tmp_path / "out")) == 1
    kept = load_file(tmp_path / "out" / "detector.safetensors")  # of the moving average
    trained = load_file(tmp_path / "out" / "checkpoints" / "step-5" / "detector.safetensors")
    assert all(bool(one.isfinite().all()) for one in (*kept.values(), *trained.values()))


@pytest.mark.slow
def test_a_start_that_failed_does_not_occupy_its_folder_and_labels_are_told(
    labeled: Path, tmp_path: Path
) -> None:
    for name in ("val", "test"):
        (labeled / "annotations" / f"{name}.json").unlink()
    path = labeled / "annotations" / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"] = [10, 10, -4, 5]
    document["annotations"][3]["bbox"][2] = 500
    path.write_text(json.dumps(document))
    keys = ["budget.steps=1", *TINY]
    done = run(1, tmp_path, "--out", "out", "data.train=nowhere", *keys)
    assert done.returncode == 3 and status(tmp_path / "out")["state"] == "failed"
    done = run(1, tmp_path, "--out", "out", f"data.train={labeled}", "eval.patience=2", *keys)
    assert done.returncode == 2 and "eval.patience needs validation pictures" in done.stderr
    done = run(1, tmp_path, "--out", "out", f"data.train={labeled}", *keys)
    assert done.returncode == 0, done.stderr
    assert "Nothing is held out" in done.stdout and "finetune.evaluate" not in done.stdout
    assert "Labels for training: 1 x box inverted, dropped." in done.stdout
    assert "Labels for training: 1 x box partly outside its picture, clipped." in done.stdout
    listed = (tmp_path / "out" / "label-defects.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in listed] == ["annotation 1", "annotation 4"]
    done = run(1, tmp_path, "--out", "out", f"data.train={labeled}", *keys)
    assert done.returncode == 2 and "holds a run already" in done.stderr


def test_keys_about_weights_that_are_not_given_are_refused(tmp_path: Path) -> None:
    done = run(1, tmp_path, "detector.take=backbone", "batchnorm=freeze")
    assert done.returncode == 2
    assert "detector.take=backbone and batchnorm=freeze: this is about --init" in done.stderr
    (tmp_path / "file").touch()
    done = run(1, tmp_path, "--out", "file")
    assert done.returncode == 2 and "--out file is a file" in done.stderr


@pytest.mark.slow
def test_sigterm_to_the_customers_command_saves_and_the_run_goes_on(
    labeled: Path, tmp_path: Path
) -> None:
    # Far from its end, whenever the signal comes; how long it is to be is said on resume.
    keys = [f"data.train={labeled}", "budget.steps=4000", *TINY, "data.workers=1"]
    out = tmp_path / "out"
    with started([*LAUNCHER, FINETUNE, "--out", str(out), *keys], tmp_path) as process:
        wait_for_step(out, 3, process)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        wait_for_state(out, "stopped")
    assert status(out)["exit_code"] == 75
    last = max(losses(out)) + 3
    done = run(1, tmp_path, "--resume", str(out), f"budget.steps={last}")
    assert done.returncode == 0, done.stderr
    assert sorted(losses(out)) == list(range(1, last + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ["batchnorm=freeze", "freeze.backbone=0.5"],
        ["optim.backbone_lr=0.1", "optim.layer_decay=0.8", "batchnorm=file"],
        ["detector.objectness=true", "loss.classification.kind=varifocal", "ema.enabled=false"],
    ],
)
def test_choices_of_the_recipe_train(keys: list[str], labeled: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    init = tmp_path / "pretrained.safetensors"
    backbone = build_backbone("yolo12n")
    save_product(init, {"backbone": backbone}, {"task": "none"})
    out = tmp_path / "out"
    more = [f"data.train={labeled}", "budget.steps=4", *TINY, *keys]
    done = run(1, tmp_path, "--init", str(init), "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    after = load_file(out / "checkpoints" / "step-4" / "detector.safetensors")
    before = backbone.state_dict()
    moved = [k for k, v in before.items() if not torch.equal(v, after[f"backbone.{k}"])]
    norms = [k for k in moved if "running_" in k]
    assert any(k.endswith("conv.weight") for k in moved)
    assert bool(norms) == ("batchnorm=freeze" not in keys)


def test_a_detector_is_not_mistaken_for_a_pretraining_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("task:\n  name: byol\n")
    done = run(1, tmp_path, "--resume", str(folder))
    assert done.returncode == 2 and "pretrain/run.py" in done.stderr


@pytest.mark.slow
def test_a_run_that_had_saved_nothing_begins_again_with_its_weights(
    labeled: Path, tmp_path: Path
) -> None:
    keys = [f"data.train={labeled}", "budget.steps=1", *TINY]
    done = run(1, tmp_path, "--out", "one", *keys)
    assert done.returncode == 0, done.stderr
    init = tmp_path / "one" / "detector.safetensors"
    done = run(1, tmp_path, "--out", "two", "--init", str(init), *keys)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "two" / "checkpoints")  # as if it had been killed at once
    done = run(1, tmp_path, "--resume", "two", "--out", "three")
    assert done.returncode == 0, done.stderr
    assert f"Loaded from {init}" in done.stdout
    same_tensors(tmp_path / "two/detector.safetensors", tmp_path / "three/detector.safetensors")
    init.unlink()
    done = run(1, tmp_path, "--resume", "two", "--out", "four", "budget.steps=2")
    assert done.returncode == 2 and "is not there any more" in done.stderr


@pytest.mark.slow
def test_eight_pictures_are_learnt_by_heart(labeled: Path, tmp_path: Path) -> None:
    names = tmp_path / "eight.txt"
    names.write_text("".join(f"{i:02d}.png\n" for i in range(8)))
    val = labeled / "annotations" / "train.json"
    document = json.loads(val.read_text())
    document["images"] = document["images"][:8]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] < 8]
    own = labeled / "annotations" / "val.json"
    own.write_text(json.dumps(document))
    for number in range(8):
        target = labeled / "images" / "val" / f"{number:02d}.png"
        target.write_bytes((labeled / "images" / "train" / target.name).read_bytes())
    out = tmp_path / "out"
    keys = [
        f"data.train={labeled}", f"data.train_list={names}", "budget.steps=250", "batch_size=8",
        "augment.mosaic.prob=0", "augment.close=1", "optim.lr=0.002", "eval.times=1",
        "ema.decay=0.99", "image_size=96",
    ]  # fmt: skip
    done = run(1, tmp_path, "--out", str(out), *TINY, *keys)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "results.json").read_text())["val"]["ap50"] > 0.95


@pytest.mark.slow
def test_a_test_picture_that_is_damaged_costs_neither_the_detector_nor_vals_figures(
    labeled: Path, tmp_path: Path
) -> None:
    damaged = labeled / "images" / "test" / "01.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])  # its header can be read
    done = run(1, tmp_path, "--out", "out", f"data.train={labeled}", "budget.steps=2", *TINY)
    out = tmp_path / "out"
    assert done.returncode == 3
    assert "The detector is whole" in status(out)["message"] and "01" in status(out)["message"]
    detector_from_file(out / "detector.safetensors")
    results = json.loads((out / "results.json").read_text())
    assert results["split"] == "val" and "test" not in results
    damaged.write_bytes(whole)
    assert run(1, tmp_path, "--resume", "out").returncode == 0
    again = json.loads((out / "results.json").read_text())
    assert again["split"] == "test" and again["val"]["ap"] == results["ap"]


@pytest.mark.slow
def test_a_damaged_picture_for_validation_ends_a_run_that_has_saved(
    labeled: Path, tmp_path: Path
) -> None:
    damaged = labeled / "images" / "val" / "01.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    keys = [f"data.train={labeled}", "budget.steps=4", *TINY, "eval.times=2"]
    done = run(1, tmp_path, "--out", "out", *keys)
    assert done.returncode == 3 and "01" in status(tmp_path / "out")["message"]
    assert "Saved at step 2: then --resume" in status(tmp_path / "out")["message"]
    damaged.write_bytes(whole)
    done = run(1, tmp_path, "--resume", "out")
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]


@pytest.mark.dist
def test_ranks_that_see_other_sets_end_before_the_first_step(labeled: Path, tmp_path: Path) -> None:
    """As where the copy of one machine is not whole: here its test set is not there."""
    for rank in ("0", "1"):
        shutil.copytree(labeled, tmp_path / rank / "set")
    shutil.rmtree(tmp_path / "1" / "set" / "images" / "test")
    (tmp_path / "1" / "set" / "annotations" / "test.json").unlink()
    script = in_folders_of_ranks(tmp_path, FINETUNE)
    done = run(2, tmp_path, "--out", str(tmp_path / "out"), "data.train=set", "budget.steps=2",
               *TINY, script=script)  # fmt: skip
    assert done.returncode == 3
    told = status(tmp_path / "out")["message"]
    assert "Process 1 sees no pictures, process 0 3 pictures" in told and "data.test must" in told
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
