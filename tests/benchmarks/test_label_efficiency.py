"""The study: what it runs, what it writes, and what it does not run again."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.label_efficiency import Study, main, parser
from benchmarks.label_efficiency_plan import Init, inits_of
from benchmarks.label_efficiency_results import draw, read, settings_of, table, update
from benchmarks.runs import go_on
from finetune.detector import build_detector
from finetune.weights import parts_of, save_detector
from groundwork.errors import UsageError

KEYS = ["threads=1", "data.workers=0"]


def _one(init: str, seed: int, ap: float, **more: Any) -> dict[str, Any]:
    curve = [[10.0, 1.0, ap / 2], [20.0, 2.0, ap]]
    return {
        "dataset": "cells", "init": init, "fraction": 5.0, "seed": seed, "steps": 20, "ap": ap,
        "ap50": ap, "pretrain_minutes": 10.0 * (init != "scratch"), "val_curve": curve, **more,
    }  # fmt: skip


def test_the_table_has_mean_spread_and_what_is_over_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [_one("scratch", 0, 0.2), _one("byol", 1, 0.4), _one("byol", 0, 0.3)]
    lines = table(results).splitlines()
    assert lines[2] == (
        "| cells | 5 % | byol | 10 | 20 | 2 | 0.350 (0.300 to 0.400) | 0.350 (0.300 to 0.400) "
        "| +10.0 | 20 of 20 | never |"  # on seed 0, which both have
    )
    assert lines[3] == "| cells | 5 % | scratch | 0 | 20 | 1 | 0.200 | 0.200 | +0.0 | 20 | |"
    # BYOL with twice its APs is where scratch ends after one minute instead of two.
    twice = [_one("scratch", 0, 0.2), _one("byol", 0, 0.4)]
    assert table(twice).splitlines()[2].endswith("| +20.0 | 10 of 20 | 10.0 fine-tunings |")
    assert table(twice[1:]).splitlines()[2].endswith("|  |  | |")
    results[1]["val_curve"].pop()  # it stopped early
    drawn: list[Any] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **keys: Any) -> None:
        lines = [[line.get_xydata() for line in axes.lines] for axes in figure.axes]
        drawn.extend([[np.asarray(line).T.tolist() for line in axes] for axes in lines])
        save(figure, *arguments, **keys)

    monkeypatch.setattr(Figure, "savefig", saved)
    [file] = draw(results, tmp_path)
    # Minutes count the pretraining; a line has the points that all of its seeds have.
    assert drawn == [
        [[[10], [pytest.approx(0.175)]], [[10, 20], [0.1, 0.2]]],
        [[[11], [pytest.approx(0.175)]], [[1, 2], [0.1, 0.2]]],
    ]
    assert file.name == "label_efficiency-cells-5pct.png" and file.stat().st_size > 5000


def _options(data: Path, work: Path, *more: str) -> list[str]:
    return [
        "--data", str(data), "--work", str(work), "--results", str(work / "results.json"), *more,
    ]  # fmt: skip


def test_a_plan_says_what_an_init_is(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "finetune: [optim.lr=0.001]\n"
        "inits:\n"
        "  mine: {recipe: {one: medical, two: aerial}, pretrain: [task.neck=n]}\n"
        "  other: {weights: file.safetensors, minutes: 7}\n"
        "  scratch: {finetune: [optim.lr=0.002]}\n"
        "  wrong: {recipee: byol}\n"
    )
    arguments = ["--inits", "scratch", "mine", "other", "byol", "--plan", str(plan)]
    options = parser().parse_args(_options(tmp_path / "two", tmp_path, *arguments))
    scratch, mine, other, byol = inits_of(options, tmp_path / "two")
    assert scratch.recipe is None and scratch.finetune == ("optim.lr=0.001", "optim.lr=0.002")
    assert (mine.recipe, mine.pretrain, mine.minutes) == ("aerial", ("task.neck=n",), 10.0)
    assert other.weights == Path("file.safetensors") and other.minutes == 7
    assert byol.recipe == "byol"
    options.inits = ["wrong"]
    with pytest.raises(UsageError, match=r"wrong has unknown key.* recipee"):
        inits_of(options, tmp_path / "two")
    options.inits = ["mine"]
    with pytest.raises(UsageError, match=r"mine.recipe is given for one, two, not for three"):
        inits_of(options, tmp_path / "three")


def test_studies_of_other_inits_may_write_the_same_results(tmp_path: Path) -> None:
    file = tmp_path / "results" / "found.json"
    assert read(file) == []
    update(file, [_one("scratch", 0, 0.2), _one("scratch", 1, 0.3)])
    update(file, [_one("byol", 0, 0.4)])
    update(file, [_one("scratch", 2, 0.5)])
    assert [(one["init"], one["ap"]) for one in read(file)] == [
        ("byol", 0.4), ("scratch", 0.5),
    ]  # fmt: skip


def test_what_makes_figures_comparable() -> None:
    first = (
        "python -m finetune.run --out a-5pct-seed0-500 data.train=x budget.steps=500 seed=0 lr=1"
    )
    other = first.replace("500", "2000").replace("seed0", "seed1").replace("seed=0", "seed=1")
    settings = settings_of({"command": first})
    assert settings == settings_of({"command": other}) == ("python -m finetune.run lr=1", [0.0])
    assert settings != settings_of({"command": first.replace("lr=1", "lr=2")})
    assert settings != settings_of({"command": first, "average": 0.5})
    among = {"averages": [0.0, 0.5]}
    chosen = [settings_of({"command": first, "average": n, **among}) for n in (0.0, 0.5)]
    assert chosen[0] == chosen[1] != settings


def test_a_folder_that_another_process_trains_in_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"Another process trains in .*run"):
            go_on("finetune.run", run, [], [])
    assert run.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_stops_the_study_stops_its_run_which_saves(
    labeled: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = _options(
        labeled, tmp_path, "--inits", "scratch", "--fractions", "50", "--steps", "100000",
        "--image-size", "64", "--batch-size", "2", "--finetune", *KEYS,
    )  # fmt: skip
    study = subprocess.Popen([sys.executable, "-m", "benchmarks.label_efficiency", *arguments])
    run = tmp_path / "labeled" / "scratch-50pct-seed0-100000"
    try:
        for _ in range(600):
            if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.1)
        study.send_signal(number)
        assert study.wait(60) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
        for _ in range(600):  # killed, it does not wait for its run
            if json.loads((run / "status.json").read_text())["state"] != "running":
                break
            time.sleep(0.1)
    finally:
        study.kill()
        study.wait()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert any(run.glob("checkpoints/step-*/manifest.json"))


def test_a_fraction_is_drawn_by_the_seed_and_a_given_list_is_taken(
    labeled: Path, tmp_path: Path
) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "labeled-05pct-seed0.txt").write_text("00.png\n")
    arguments = ["--inits", "scratch", "--lists", str(lists)]
    study = Study(parser().parse_args(_options(labeled, tmp_path, *arguments)), labeled)
    assert study.names(5, 0) == lists / "labeled-05pct-seed0.txt"
    drawn = [study.names(50, seed) for seed in (0, 1)]
    names = [file.read_text().split() for file in drawn if file is not None]
    assert [len(one) for one in names] == [5, 5] and names[0] != names[1]
    assert study.names(100, 0) is None


def test_a_length_that_is_no_better_changes_no_row(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran before is chosen from, too, and test is scored for nothing that loses."""
    reached = {500: 0.3, 1000: 0.45, 2000: 0.44, 4000: 0.46}

    def train(study: Study, init: Init, fraction: float, seed: int, steps: int) -> Path:
        run = study.work / f"{init.name}-{fraction:g}pct-seed{seed}-{steps}"
        detector = build_detector("timm/test_resnet", 2)
        run.mkdir(parents=True, exist_ok=True)
        save_detector(
            run / "detector.safetensors", parts_of(detector), names=["red", "blue"],
            image_size=64, metadata={},
        )  # fmt: skip
        (run / "results.json").write_text(json.dumps({"ap": reached[steps]}))
        (run / "metrics.jsonl").write_text("")
        (run / "recipe.yaml").write_text("batch_size: 2")
        note = run.parent / f"{run.name}.command.txt"
        note.write_text(f"python --out {run} seed={seed} budget.steps={steps} {keys}")
        return run

    monkeypatch.setattr(Study, "train", train)
    study = Study(parser().parse_args(_options(labeled, tmp_path, "--inits", "scratch")), labeled)
    [init] = inits_of(study.options, labeled)
    keys = "lr=1"
    assert study.cell(init, 5, 0, [500, 1000])["steps"] == 1000
    study.cell(init, 5, 1, [1000])
    before = json.dumps([{**one, "val_ap_by_steps": {}} for one in study.results])
    kept = study.cell(init, 5, 0, [2000])
    assert json.dumps([{**one, "val_ap_by_steps": {}} for one in study.results]) == before
    assert kept["val_ap_by_steps"] == {"500": 0.3, "1000": 0.45, "2000": 0.44}
    better = study.cell(init, 5, 0, [4000])
    assert study.results == [better] and better["steps"] == 4000
    assert better["val_ap_by_steps"]["1000"] == 0.45
    study.cell(init, 5, 1, [4000])
    keys = "lr=2"  # another plan's lengths are no choice, and its rows are no other seeds
    row = study.cell(init, 5, 0, [4000])
    assert row["val_ap_by_steps"] == {"4000": 0.46} and study.results == [row]


def test_a_teacher_is_trained_on_the_same_labels_and_its_minutes_count(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "inits:\n"
        "  base: {recipe: regions, minutes: 5}\n"
        "  taught: {recipe: self_training, teacher: base, minutes: 3, steps: [1]}\n"
        "  second: {recipe: regions, start: first, minutes: 7}\n"
        "  first: {recipe: byol, minutes: 5}\n"
        "  later: {recipe: regions, start: taught, minutes: 1}\n"
        "  ring: {recipe: self_training, teacher: ring}\n"
        "  both: {recipe: self_training, teacher: base, start: first}\n"
        "  nowhere: {recipe: regions, start: scratch}\n"
        "  scratch-mean: {average: [0, 0.5]}\n  none: {average: []}\n"
    )
    ran: list[list[str]] = []

    def go_on(module: str, run: Path, flags: list[str], keys: list[str]) -> None:
        ran.append([module, run.name, *flags, *keys])
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("batch_size: 2")
        lines = [{"step": 60, "speed/images_per_second": 1.0}, {"step": 60, "eval/ap": 0.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("pretrained.safetensors", "detector.safetensors", "results.json"):
            (run / name).write_text('{"ap": 0.5}')

    monkeypatch.setattr("benchmarks.label_efficiency.go_on", go_on)
    arguments = ["--inits", "taught", "--plan", str(plan), "--steps", "1", "2"]
    options = parser().parse_args(_options(labeled, tmp_path, *arguments))
    study = Study(options, labeled)
    [taught] = inits_of(options, labeled)
    study.train(taught, 50, 1, 1)
    assert [(module, name) for module, name, *_ in ran] == [
        ("pretrain.run", "pretrain-base"),
        ("finetune.run", "base-50pct-seed1-2"),
        ("pretrain.run", "pretrain-taught-50pct-seed1"),
        ("finetune.run", "taught-50pct-seed1-1"),
    ]
    folder = study.work
    teacher = str(folder / "base-50pct-seed1-2" / "detector.safetensors")
    assert f"task.weights={teacher}" in ran[2]
    assert ran[2][ran[2].index("--init") + 1] == teacher
    assert "seed=1" in ran[1] and "seed=1" in ran[3]
    study.train(taught, 50, 1, 2)
    assert len(ran) == 5  # nothing twice
    # 60 steps of two pictures a second are two minutes.
    assert study.minutes(taught, 50, 1) == pytest.approx(5 + 2 + 3)
    assert taught.steps == (1,) and taught.teacher is not None and taught.teacher.steps == (1, 2)
    # Two stages without labels: the second begins with the first's file, once for all seeds.
    options.inits = ["second", "later"]
    second, later = inits_of(options, labeled)
    for seed in (0, 1):
        study.weights(second, 50, seed)
    assert [(module, name) for module, name, *_ in ran[5:]] == [
        ("pretrain.run", "pretrain-first"), ("pretrain.run", "pretrain-second"),
    ]  # fmt: skip
    first = str(folder / "pretrain-first" / "pretrained.safetensors")
    assert "--init" not in ran[5] and ran[6][ran[6].index("--init") + 1] == first
    assert study.minutes(second, 50, 1) == 12
    # What begins with a file that knows labels knows them too.
    assert study.pretraining(later, 50, 1).name == "pretrain-later-50pct-seed1"
    assert study.minutes(later, 50, 1) == pytest.approx(11)
    for wrong, why in (
        ("ring", "ring is taught by itself"),
        ("both", "its teacher is its start: give one"),
        ("nowhere", "scratch has no file to start from"),
    ):
        options.inits = [wrong]
        with pytest.raises(UsageError, match=why):
            inits_of(options, labeled)
    options.inits = ["scratch-mean"]
    with pytest.raises(UsageError, match="scratch-mean: average is about a start"):
        inits_of(options, labeled)
    options.inits = ["none"]
    assert inits_of(options, labeled)[0].averages == (0.0,)


def test_an_average_with_the_start_is_what_is_scored(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, start, made = tmp_path / "run", tmp_path / "start.safetensors", []
    run.mkdir()
    (run / "results.json").write_text('{"ap": 0.5}')
    options = parser().parse_args(_options(labeled, tmp_path, "--inits", "x"))
    study = Study(options, labeled)

    def write(out: Path, files: list[Path], shares: list[float]) -> None:
        made.append((out.name, files, shares))
        out.write_bytes(b"mean")

    def score(file: Path, split: str) -> object:
        assert split == "val"
        return SimpleNamespace(ap={start: start_ap}.get(file, 0.6))

    start_ap = 0.4

    monkeypatch.setattr("benchmarks.label_efficiency.write_average", write)
    monkeypatch.setattr(study, "score", score)
    monkeypatch.setattr(study, "train", lambda *_: run)
    plain = Init("x", weights=start)
    assert study.outcome(plain, 5, 0, 9) == (run / "detector.safetensors", 0.5, 0)
    mean = Init("x", weights=start, averages=(0.25,))
    for _ in range(2):  # and once is enough
        assert study.outcome(mean, 5, 0, 9) == (run / "average-0.25.safetensors", 0.6, 0.25)
    files = [run / "detector.safetensors", start]
    assert made == [("average-0.25.safetensors", files, [0.75, 0.25])]
    # Of several it is the best on val, and the start may be.
    several = Init("x", weights=start, averages=(0.0, 0.25, 1.0))
    assert study.outcome(several, 5, 0, 9) == (run / "average-0.25.safetensors", 0.6, 0.25)
    (run / "average-1.json").unlink()
    start_ap = 0.7
    assert study.outcome(several, 5, 0, 9) == (start, 0.7, 1)
    # And it is what teaches another.
    teacher = Init("x", weights=start, averages=(0.25,), steps=(9,))
    pupil = Init("pupil", recipe="self_training", minutes=1, teacher=teacher)
    ran: list[Any] = []
    monkeypatch.setattr("benchmarks.label_efficiency.go_on", lambda *command: ran.append(command))
    study.weights(pupil, 5, 0)
    [(_, _, flags, keys)] = ran
    assert f"task.weights={run / 'average-0.25.safetensors'}" in keys
    assert flags[-2:] == ["--init", str(run / "average-0.25.safetensors")]


def test_a_teacher_of_whole_pictures_is_asked_on_val_how_sure_it_must_be(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(parser().parse_args(_options(labeled, tmp_path, "--inits", "x")), labeled)
    asked: list[Any] = []

    def score(file: Path, split: str, **otherwise: Any) -> object:
        asked.append((file.name, split, otherwise))
        told = {"per_class": {"red": {"f1_score": 0.35}, "blue": {"f1_score": 0.03}}}
        return SimpleNamespace(to_json=lambda: told)

    monkeypatch.setattr(study, "score", score)
    init, teacher = Init("x", recipe="self_training"), tmp_path / "mean.safetensors"
    looks = ["task.find=picture", "task.looks=2", "task.teacher_size=96", "task.unsure=0.05"]
    for _ in range(2):  # and once is enough
        told = study.scores(teacher, init, looks)
        assert told == ['task.score={"red": 0.35, "blue": 0.03}', "task.unsure=0.0150"]
    otherwise = {"image_size": 96, "looks": 2, "iou": 0.5}
    assert asked == [("mean.safetensors", "val", otherwise)]
    assert study.scores(teacher, init, [*looks, "task.score=0.4"]) == []
    assert study.scores(teacher, init, []) == []  # which looks at views
    assert len(asked) == 1


@pytest.mark.slow
def test_the_study_runs_chooses_on_val_and_goes_on(
    labeled: Path, tmp_path: Path, forked_stages: None
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    arguments = _options(
        labeled, work, "--inits", "inpainting", "--fractions", "50", "--seeds", "2",
        "--steps", "1", "2", "--image-size", "64", "--batch-size", "2", "--pretrain-minutes",
        "0.02", "--pretrain", "image_size=64", "batch_size=2", "probe.times=0", "report=false",
        *KEYS, "--finetune", "eval.times=2", *KEYS,
    )  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((work / "results.json").read_text())
    assert [(one["init"], one["seed"]) for one in results] == [
        ("inpainting", 0), ("inpainting", 1),
    ]  # fmt: skip
    runs = {path.name for path in (work / "labeled").iterdir() if path.is_dir()}
    first, second = results
    best = max((1, 2), key=lambda n: (first["val_ap_by_steps"][str(n)], -n))
    assert first["steps"] == second["steps"] == best
    assert list(second["val_ap_by_steps"]) == [str(best)]
    assert {"inpainting-50pct-seed0-1", "inpainting-50pct-seed0-2"} <= runs
    assert "finetune.run" in first["command"] and len(first["weights_sha256"]) == 64
    assert [point[0] for point in first["val_curve"]] == ([1.0] if best == 1 else [1.0, 2.0])
    assert (work / "results.md").read_text().count("\n") == 3
    # Again: nothing is trained. A cell that was lost is trained no more than it has to be.
    stamps = {path: path.stat().st_mtime_ns for path in work.rglob("metrics.jsonl")}
    (work / "results.json").write_text(json.dumps(results[:-1]))
    (work / "labeled" / "inpainting-50pct-seed0-1" / "results.json").unlink()
    assert main(arguments) == 0
    assert json.loads((work / "results.json").read_text()) == results
    moved = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert {path.parent.name for path in moved} <= {"inpainting-50pct-seed0-1"}
    # With other settings nothing that is there may be taken for the same.
    with pytest.raises(UsageError, match="made by another command"):
        main([*arguments, "optim.lr=0.1"])
