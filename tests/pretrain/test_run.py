"""The command as people type it: what it makes, how it stops, how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from groundwork.backbones.product import backbone_from_file, read_product
from pretext_tasks import TASKS
from tests.commands import (
    LAUNCHER,
    PRETRAIN,
    ROOT,
    TINY,
    environment,
    finished,
    in_folders_of_ranks,
    launch,
    losses,
    metrics,
    run,
    same_tensors,
    seen,
    started,
    status,
    wait_for_state,
    wait_for_step,
)
from tests.full_disk import on_a_full_disk
from tests.record_golden import keys_of


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_literal_command_trains_and_keeps_the_backbone(
    task: str, pictures: Path, tmp_path: Path
) -> None:
    arguments = ["--task", task, "--out", "out", f"data.train={pictures}", "budget.steps=3"]
    arguments += [*TINY, *keys_of(task, tmp_path)]
    if task == "byol":
        done = finished([*LAUNCHER, PRETRAIN, *arguments], tmp_path)
    else:  # launched or not is the same to all of them
        done = run(1, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert status(out) == {
        "state": "done",
        "exit_code": 0,
        "message": "The backbone is in out/pretrained.safetensors.",
    }
    assert sorted(losses(out)) == [1, 2, 3]
    steps = {line["step"]: line for line in metrics(out) if "probe/rankme" in line}
    assert sorted(steps) == [0, 3]
    assert (out / "recipe.yaml").exists()
    assert list((out / "pictures").glob("step-0-*.png"))
    backbone = backbone_from_file(out / "pretrained.safetensors")
    assert backbone.name == "yolo12n"
    _, metadata = read_product(out / "pretrained.safetensors")
    assert metadata["task"] == task
    assert metadata["images_seen"] == 24
    assert metadata["recipe"]["task"]["name"] == task


@pytest.mark.slow
def test_a_network_without_buffers_trains(pictures: Path, tmp_path: Path) -> None:
    """ConvNeXt has no BatchNorm, and inpainting adds none."""
    done = run(
        1, tmp_path, "--task", "inpainting", "--out", "out", f"data.train={pictures}",
        "budget.steps=2", *TINY, "backbone.name=timm/test_convnext",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "out")) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "more"),
    [(task, []) for task in sorted(TASKS)]
    + [("self_training", ["task.find=picture", "task.looks=2"])],
)
def test_a_run_stopped_twice_in_an_epoch_and_in_the_next_is_bit_exact(
    task: str, more: list[str], pictures: Path, tmp_path: Path
) -> None:
    # 22 pictures, batches of 8: steps 1, 2 and part of 3 are epoch one; 4 lies in epoch two.
    keys = [f"data.train={pictures}", "budget.steps=8", "checkpoint.every_steps=1", *TINY]
    keys += ["checkpoint.keep=20", "ema.enabled=true", "log.samples=true"]
    keys += keys_of(task, tmp_path) + more
    whole = tmp_path / "whole"
    done = run(1, tmp_path, "--task", task, "--out", str(whole), *keys)
    assert done.returncode == 0, done.stderr
    before = whole
    for stop in (1, 2, 5):
        out = tmp_path / f"from-{stop}"
        resumed = run(
            1, tmp_path, "--resume", str(before / "checkpoints" / f"step-{stop}"), "--out", str(out)
        )
        assert resumed.returncode == 0, resumed.stderr
        expected = {step: loss for step, loss in losses(whole).items() if step > stop}
        found = losses(out)
        assert {step: loss.hex() for step, loss in found.items()} == {
            step: loss.hex() for step, loss in expected.items()
        }
        assert seen(out) == {step: keys for step, keys in seen(whole).items() if step > stop}
        for name in ("task", "optimizer", "ema"):
            file = Path("checkpoints/step-8") / f"{name}.safetensors"
            same_tensors(whole / file, out / file)
        same_tensors(whole / "pretrained.safetensors", out / "pretrained.safetensors")
        before = out


@pytest.mark.slow
def test_sigterm_to_the_customers_command_saves_and_the_run_goes_on(
    pictures: Path, tmp_path: Path
) -> None:
    # Far from its end, whenever the signal comes; how long it is to be is said on resume. What a
    # step does must not depend on that.
    keys = [f"data.train={pictures}", *TINY, "data.workers=1"]
    keys += ["schedule.name=constant", "schedule.warmup=0"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [*LAUNCHER, PRETRAIN, "--task", "inpainting", "--out", str(out), *keys]
    with started([*command, "budget.steps=4000"], tmp_path) as process:
        wait_for_step(out, 3, process)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        wait_for_state(out, "stopped")
    assert status(out)["exit_code"] == 75
    assert "--resume" in status(out)["message"]
    last = max(losses(out)) + 3
    # Pictures that have come to the data are told, with the weights to go on from.
    product = out / "last.safetensors"
    assert read_product(product)[1]["step"] == last - 3
    more = Path(shutil.copy(pictures / "00.jpg", pictures / "more.jpg"))
    done = run(1, tmp_path, "--resume", str(out))
    assert done.returncode == 2 and f"new run with --init {product}" in done.stderr
    more.unlink()
    done = run(1, tmp_path, "--resume", str(out), f"budget.steps={last}")
    assert done.returncode == 0, done.stderr
    assert not product.exists()
    done = run(1, tmp_path, *command[3:5], "--out", str(whole), *keys, f"budget.steps={last}")
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(whole)
    same_tensors(whole / "pretrained.safetensors", out / "pretrained.safetensors")


@pytest.mark.dist
def test_two_ranks_see_the_batches_of_one(pictures: Path, tmp_path: Path) -> None:
    keys = ["--task", "inpainting", f"data.train={pictures}", "budget.steps=6", *TINY]
    keys += ["log.samples=true", "log.trackers=[tensorboard]"]  # which leaves the process group
    for ranks in (1, 2):
        done = run(ranks, tmp_path, "--out", str(tmp_path / f"out-{ranks}"), *keys)
        assert done.returncode == 0, done.stderr
    one, two = seen(tmp_path / "out-1"), seen(tmp_path / "out-2")
    assert one == two
    stream = [key for step in sorted(two) for key in two[step]]
    assert len(set(stream[:22])) == 22
    assert len(set(stream[22:44])) == 22


@pytest.mark.dist
def test_a_run_on_two_ranks_and_two_workers_goes_on_on_one_without(
    pictures: Path, tmp_path: Path
) -> None:
    keys = ["--task", "inpainting", f"data.train={pictures}", *TINY, "log.samples=true"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = launch(2, "--out", str(out), *keys, "data.workers=2", "budget.steps=4000")
    with started(command, tmp_path) as process:
        wait_for_step(out, 2, process)
        process.send_signal(signal.SIGTERM)  # torchrun passes it to the ranks
        process.wait(timeout=120)
    assert status(out)["exit_code"] == 75
    running = [one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])]
    assert not any(str(out) in command for command in running)  # neither a rank nor a data worker
    last = max(losses(out)) + 8
    done = run(1, tmp_path, "--resume", str(out), "data.workers=0", f"budget.steps={last}")
    assert done.returncode == 0, done.stderr
    done = run(1, tmp_path, "--out", str(whole), *keys, f"budget.steps={last}")
    assert done.returncode == 0, done.stderr
    assert seen(out) == seen(whole)
    assert sorted(seen(out)) == list(range(1, last + 1))


@pytest.mark.slow
def test_features_that_collapse_end_a_run_that_is_told_so(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "collapsed.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pretrain import probe\n"
        "probe.NO_SPREAD = 9.0\n"  # more than any features have
        "from pretrain.run import main\n"
        "sys.exit(main())\n"
    )
    keys = [f"data.train={pictures}", "budget.steps=8", *TINY, "probe.times=4"]
    for stops, code, last in ((False, 0, 8), (True, 5, 2)):
        command = ["--task", "inpainting", "--out", f"out-{stops}", *keys]
        done = run(1, tmp_path, *command, f"probe.stop_on_collapse={stops}", script=str(script))
        out = tmp_path / f"out-{stops}"
        assert done.returncode == status(out)["exit_code"] == code, done.stderr
        assert "The features have collapsed" in (done.stderr if stops else done.stdout)
        assert max(losses(out)) == last
        assert (out / "checkpoints" / f"step-{last}" / "manifest.json").exists()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_skipped_rolled_back_and_given_up(
    pictures: Path, tmp_path: Path
) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pretext_tasks import byol\n"
        "from pretext_tasks.contract import StepOutput\n"
        "calls, healthy = 0, byol.BYOL.forward\n"
        "def forward(self, batch):\n"
        "    global calls\n"
        "    output = healthy(self, batch)\n"
        "    if self.training:\n"
        "        calls += 1\n"
        "        if calls in POISONED:\n"
        "            for buffer in self.buffers():\n"
        "                if buffer.is_floating_point(): buffer.data.mul_(float('nan'))\n"
        "            return StepOutput(output.loss * float('nan'), output.metrics)\n"
        "    return output\n"
        "byol.BYOL.forward = forward\n"
        "POISONED = eval(sys.argv.pop(1))\n"
        "from pretrain.run import main\n"
        "sys.exit(main())\n"
    )

    def poisoned(out: str, calls: str) -> subprocess.CompletedProcess[str]:
        return run(
            1, tmp_path, calls, "--task", "byol", "--out", out, f"data.train={pictures}",
            "budget.steps=12", "guard.skips=2", "guard.rollbacks=1", "checkpoint.every_steps=2",
            *TINY, script=str(script),
        )  # fmt: skip

    done = poisoned("skip", "{3}")
    assert done.returncode == 0, done.stderr
    assert "Step 3 is skipped" in done.stdout
    product = load_file(tmp_path / "skip" / "pretrained.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in product.values())
    done = poisoned("back", "{5, 6}")
    assert done.returncode == 0, done.stderr
    assert "Rolled back to the weights of step 4" in done.stdout
    rates = {
        line["step"]: line["optim/lr"] for line in metrics(tmp_path / "back") if "optim/lr" in line
    }
    healthy = {
        line["step"]: line["optim/lr"] for line in metrics(tmp_path / "skip") if "optim/lr" in line
    }
    assert rates[7] == healthy[7] / 2
    done = poisoned("lost", "range(3, 99)")
    assert done.returncode == 5
    assert "Lower optim.lr" in done.stderr
    assert status(tmp_path / "lost")["exit_code"] == 5


@pytest.mark.slow
def test_what_was_learned_is_kept_where_the_last_checkpoint_cannot_be(
    pictures: Path, tmp_path: Path
) -> None:
    script = tmp_path / "full.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from groundwork import checkpoint\n"
        "from groundwork.errors import CheckpointError\n"
        "save = checkpoint.save\n"
        "def full(folder, step, *arguments):\n"
        "    if step > 2: raise CheckpointError('the disk is full.')\n"
        "    return save(folder, step, *arguments)\n"
        "checkpoint.save = full\n"
        "from pretrain.run import main\n"
        "sys.exit(main())\n"
    )
    out = tmp_path / "out"
    keys = ["--task", "inpainting", f"data.train={pictures}", *TINY, "checkpoint.every_steps=2"]
    done = run(1, tmp_path, "--out", "out", *keys, "budget.steps=5", script=str(script))
    assert done.returncode == status(out)["exit_code"] == 4
    assert "the disk is full. Training goes on." in done.stdout
    assert f"What was learned is in {Path('out') / 'pretrained.safetensors'}" in done.stderr
    assert read_product(out / "pretrained.safetensors")[1]["step"] == 5
    assert not (out / "last.safetensors").exists()
    done = run(1, tmp_path, "--resume", "out")
    assert done.returncode == 0 and sorted(losses(out))[-1] == 5
    assert "Going on from out/checkpoints/step-2" in done.stdout


@pytest.mark.slow
def test_bad_pictures_are_replaced_counted_and_bounded(pictures: Path, tmp_path: Path) -> None:
    (pictures / "03.jpg").write_bytes(b"<html>not found</html>")
    keys = ["--task", "byol", f"data.train={pictures}", "budget.epochs=2", *TINY]
    done = run(1, tmp_path, "--out", "few", *keys, "data.max_bad_fraction=0.05")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "few" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["03"]
    assert metrics(tmp_path / "few")[-2]["data/replaced"] >= 2
    for i in range(4, 9):
        (pictures / f"{i:02d}.jpg").write_bytes(b"")
    done = run(1, tmp_path, "--out", "many", *keys, "data.max_bad_fraction=0.05")
    assert done.returncode == 3
    assert "max_bad_fraction" in done.stderr
    assert status(tmp_path / "many")["exit_code"] == 3


@pytest.mark.slow
def test_the_options_of_the_loop_work_together(pictures: Path, tmp_path: Path) -> None:
    keys = [f"data.train={pictures}", "budget.steps=2", *TINY, "backbone.name=timm/resnet10t"]
    done = run(
        1, tmp_path, "--task", "simclr", "--out", "first", *keys, "precision=bf16", "accumulate=2",
        "optim.name=lars", "optim.clip=1", "schedule.name=one_cycle", "log.trackers=[tensorboard]",
        f"data.cache={tmp_path / 'cache'}", "data.workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "first").rglob("events.out.tfevents.*"))
    product = tmp_path / "first" / "pretrained.safetensors"
    assert backbone_from_file(product).name == "timm/resnet10t"
    done = run(
        1, tmp_path, "--task", "jigsaw", "--out", "second", "--init", str(product), *keys,
        "optim.name=lamb", "schedule.name=cyclical", "ema.enabled=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "100" in next(line for line in done.stdout.splitlines() if "Weights of" in line)
    done = run(
        1, tmp_path, "--task", "byol", "--out", "third", "--init", str(product), *keys,
        "backbone.name=yolo12n",
    )  # fmt: skip
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_tasks_a_neck_and_a_detection_probe_that_chooses(
    labeled: Path, tmp_path: Path
) -> None:
    pictures = labeled / "images" / "train"
    keys = [
        f"data.train={pictures}", "budget.steps=4", *TINY, "report=true", "task.inpainting.neck=n",
        "task.byol.hidden_width=16", f"probe.detection.data={labeled}", "probe.times=2",
        "probe.detection.image_size=64", "probe.detection.steps=2",
        f"data.cache={tmp_path / 'cache'}", "task.image_sizes.inpainting=64",
    ]  # fmt: skip
    done = run(1, tmp_path, "--task", "byol+inpainting", "--out", "one", *keys)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "one")
    probed = {line["step"]: line["probe/ap"] for line in lines if "probe/ap" in line}
    assert sorted(probed) == [0, 2, 4]
    assert {"train/byol_loss", "train/inpainting_loss"} <= {name for line in lines for name in line}
    tensors, about = read_product(tmp_path / "one" / "pretrained.safetensors")
    assert any(name.startswith("neck.") for name in tensors)
    # The first of the best; of weights that find nothing the last.
    first = -1 if max(probed.values()) else 1
    assert about["step"] == max(probed, key=lambda step: (probed[step], first * step))
    assert "with the best probe/ap" in done.stdout
    assert "byol-view_1" in (tmp_path / "one" / "report.html").read_text()
    # No measurement is better: patience ends the run.
    state = tmp_path / "one" / "checkpoints" / "step-4"
    assert state.is_dir()
    done = run(
        1, tmp_path, "--resume", str(state), "--out", "two", "budget.steps=12", "probe.patience=1"
    )
    assert done.returncode == 0, done.stderr
    # A head of two steps finds nothing, whatever it stands on.
    assert max(line["step"] for line in metrics(tmp_path / "two")) < 12
    assert "No better probe/ap" in done.stdout
    # Gone on with it has ended, unless more patience is wanted.
    last = max(line["step"] for line in metrics(tmp_path / "two"))
    done = run(1, tmp_path, "--resume", "two")
    assert done.returncode == 0, done.stderr
    assert max(line["step"] for line in metrics(tmp_path / "two")) == last
    done = run(1, tmp_path, "--resume", "two", f"budget.steps={last + 1}", "probe.patience=9")
    assert done.returncode == 0, done.stderr
    assert max(line["step"] for line in metrics(tmp_path / "two")) == last + 1


@pytest.mark.slow
def test_best_weights_that_have_no_room_are_told_and_other_labels_begin_anew(
    labeled: Path, tmp_path: Path
) -> None:
    keys = [
        f"data.train={labeled / 'images' / 'train'}", "budget.steps=2", *TINY, "probe.times=2",
        "task.hidden_width=16", f"probe.detection.data={labeled}", "probe.detection.image_size=64",
        "probe.detection.steps=2", f"data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    command = on_a_full_disk(launch(1, "--task", "byol", "--out", "full", *keys), 1000)
    done = finished(command, tmp_path)
    assert done.returncode == 4, done.stderr  # there is no last checkpoint
    assert sorted(losses(tmp_path / "full")) == [1, 2]
    assert "best.safetensors could not be written" in done.stdout
    done = run(1, tmp_path, "--task", "byol", "--out", "one", *keys)
    assert done.returncode == 0, done.stderr
    again = ["--resume", "one/checkpoints/step-2", "budget.steps=3"]
    done = run(1, tmp_path, *again, "--out", "same")
    assert done.returncode == 0 and "looked for anew" not in done.stdout, done.stderr
    done = run(1, tmp_path, *again, "--out", "other", "probe.detection.pictures=3")
    assert done.returncode == 0 and "looked for anew" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("probe.select=ap", "set detection.data"),
        ("probe.select=knn", "set labeled"),
        ("probe.patience=2", "needs select"),
    ],
)
def test_a_choice_without_labels_is_refused(tmp_path: Path, key: str, message: str) -> None:
    done = run(1, tmp_path, "--task", "byol", "probe.labeled=null", key)
    assert done.returncode == 2 and message in done.stderr


def test_wrong_use_is_told_in_a_sentence(pictures: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[str], int, str]] = [
        (["--task", "byol", "--init", "missing.safetensors"], 2, "--init missing.safetensors"),
        (["--resume", "nowhere"], 2, "there is no run here"),
        (["--resume"], 2, "there is no run in"),
        (["--task", "byol", "data.train=nowhere", "--out", "x"], 3, "nowhere"),
        (["--task", "byol", "backbone.name=yolo13n", "--out", "y"], 2, "yolo12n"),
        (["--task", "byol", f"data.train={pictures}", "log.trackers=[nothing]"], 2, "nothing"),
    ]
    for arguments, code, sentence in cases:
        done = run(1, tmp_path, *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_the_recipe_is_printed_and_nothing_runs(tmp_path: Path) -> None:
    done = run(1, tmp_path, "--task", "byol", "--print-recipe", "seed=3")
    assert done.returncode == 0
    assert "seed: 3" in done.stdout
    assert "momentum:" in done.stdout
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_data_that_changed_is_refused_on_resume(pictures: Path, tmp_path: Path) -> None:
    keys = [f"data.train={pictures}", "budget.steps=2", *TINY]
    assert run(1, tmp_path, "--task", "byol", "--out", "out", *keys).returncode == 0
    (pictures / "99.jpg").write_bytes((pictures / "00.jpg").read_bytes())
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    done = run(1, tmp_path, "--resume", "out", "budget.steps=4")
    assert done.returncode == 2
    assert "22 pictures" in done.stderr
    # A start that cannot go on leaves the folder as it was.
    values: dict[str, Any] = status(tmp_path / "out")
    assert values["state"] == "done"
    assert (tmp_path / "out" / "recipe.yaml").read_text() == recipe


@pytest.mark.slow
def test_a_resume_takes_what_can_be_meant_and_leaves_other_runs_alone(
    pictures: Path, tmp_path: Path
) -> None:
    keys = [f"data.train={pictures}", *TINY, "checkpoint.every_steps=2", "checkpoint.keep=9"]
    whole = [*keys, "budget.samples=48", "--task", "byol"]  # six steps
    for name in ("one", "two"):
        done = run(1, tmp_path, "--out", name, *whole)
        assert done.returncode == 0, done.stderr
    # Another batch would make another part of the samples of the same steps.
    done = run(1, tmp_path, "--resume", "one", "batch_size=16")
    assert done.returncode == 2 and "give budget.steps=N" in done.stderr
    done = run(1, tmp_path, "--resume", "one", "data.bands=[1]", "probe.labeled=null")
    assert done.returncode == 2 and "data.bands" in done.stderr
    done = run(1, tmp_path, "--resume", "one", "--out", "two")
    assert done.returncode == 2 and "holds another run" in done.stderr
    # From an older checkpoint: what lies behind it is of another course.
    done = run(1, tmp_path, "--resume", "one/checkpoints/step-2", "budget.steps=5")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir())
    assert names == ["abandoned-step-4", "abandoned-step-6", "step-2", "step-4", "step-5"]
    done = run(1, tmp_path, "--resume", "one", "budget.steps=7", "batch_size=16")
    assert done.returncode == 0, done.stderr
    assert "step-5: step 5." in done.stdout
    assert sorted(losses(tmp_path / "one")) == list(range(1, 8))


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder_and_a_restart_goes_on(
    pictures: Path, tmp_path: Path
) -> None:
    keys = ["--task", "byol", "--out", "out", f"data.train={pictures}", *TINY]
    long = [*keys, "budget.steps=4000", "checkpoint.every_steps=1"]
    with started(launch(1, *long), tmp_path) as first:
        wait_for_step(tmp_path / "out", 3, first)
        done = run(1, tmp_path, "--resume", "out")
        assert done.returncode == 2 and "Another process trains in out" in done.stderr
        assert status(tmp_path / "out")["state"] == "running"
    last = max(losses(tmp_path / "out"))
    # As torchrun --max-restarts starts it: the first command again.
    restarted = environment() | {"TORCHELASTIC_RESTART_COUNT": "1"}
    with started(launch(1, *long), tmp_path, restarted) as second:
        wait_for_step(tmp_path / "out", last + 1, second)
    assert sorted(losses(tmp_path / "out")) == list(range(1, max(losses(tmp_path / "out")) + 1))


@pytest.mark.dist
def test_what_one_rank_meets_is_told_and_counted_for_all(pictures: Path, tmp_path: Path) -> None:
    keys = ["--task", "byol", f"data.train={pictures}", "budget.steps=8", *TINY, "log.samples=true"]
    done = run(2, tmp_path, "--out", "healthy", *keys)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "healthy" / "samples-1.jsonl").read_text().splitlines()
    key = json.loads(lines[0])["keys"][0]  # of the second rank
    (pictures / f"{key}.jpg").write_bytes(b"<html>")
    done = run(2, tmp_path, "--out", "raised", *keys, "data.on_error=raise")
    assert done.returncode != 0
    told = status(tmp_path / "raised")
    assert told["exit_code"] == 3 and key in told["message"]
    assert f"Process 1: {told['message']}" in done.stderr
    done = run(2, tmp_path, "--out", "replaced", *keys, "data.max_bad_fraction=0.5")
    assert done.returncode == 0, done.stderr
    counted = {line["data/replaced"] for line in metrics(tmp_path / "replaced")[-2:-1]}
    listed = (tmp_path / "replaced" / "quarantine.jsonl").read_text().splitlines()
    assert len(listed) >= 1 and {json.loads(line)["key"] for line in listed} == {key}
    assert counted and min(counted) >= 3  # 64 samples of 22 pictures
    others = [path for path in sorted(pictures.glob("*.jpg")) if path.stem != key][:5]
    for path in others:
        path.write_bytes(b"")
    # Four are allowed, and neither rank meets five in the first epoch.
    done = run(2, tmp_path, "--out", "many", *keys, "data.max_bad_fraction=0.2")
    assert done.returncode != 0
    assert status(tmp_path / "many")["exit_code"] == 3
    assert "of 22 pictures are unreadable" in status(tmp_path / "many")["message"]


@pytest.mark.dist
def test_ranks_that_see_other_pictures_end_before_the_first_step(
    pictures: Path, tmp_path: Path
) -> None:
    """As where the copy of one machine is not whole, or a folder is still being filled."""
    for rank in ("0", "1"):
        shutil.copytree(pictures, tmp_path / rank / "set")
    next((tmp_path / "1" / "set").rglob("*.jpg")).unlink()
    script = in_folders_of_ranks(tmp_path, PRETRAIN)
    keys = ["--task", "byol", "data.train=set", "budget.steps=2", *TINY]
    done = run(2, tmp_path, "--out", str(tmp_path / "out"), *keys, script=script)
    assert done.returncode == 3
    assert "Process 1 sees 21 pictures of set, process 0 22" in status(tmp_path / "out")["message"]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
