"""Whole runs on a device that is not there: no tensor is left behind on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
from torch import nn

from finetune.run import main as finetune
from groundwork.backbones.product import backbone_from_file
from pretext_tasks import TASKS
from pretrain.run import main as pretrain
from tests.commands import TINY, environment, losses, metrics
from tests.other_device import CUDA, OnDevice, SimulatedDevice
from tests.record_golden import keys_of

Go = Callable[..., Counter[str]]

SMALL = "backbone.name=timm/test_resnet"


@pytest.fixture
def pictures(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(32):
        (folder / f"{i:02d}.jpg").write_bytes(make_jpeg(i, 96, 80))
    return folder


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Iterator[Go]:
    """Run a stage's command in this process, on the simulated device; return what it waited for."""
    for name in os.environ.keys() - environment().keys():  # of a launcher
        monkeypatch.delenv(name)
    start, generator = accelerate.state.PartialState.__init__, torch.Generator

    def on_cuda(state: Any, *arguments: Any, **keywords: Any) -> None:
        start(state, *arguments, **keywords)
        state.device = CUDA

    monkeypatch.setattr(accelerate.state.PartialState, "__init__", on_cuda)
    # Random numbers come from the CPU's generator.
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)

    def run(stage: Callable[[list[str]], int], *arguments: str) -> Counter[str]:
        accelerate.state.AcceleratorState._reset_state(True)
        try:
            with SimulatedDevice() as device:
                assert stage(list(arguments)) == 0
        finally:
            accelerate.state.AcceleratorState._reset_state(True)
        return device.waits

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_the_device_refuses_what_cuda_refuses() -> None:
    here = torch.arange(6.0).view(2, 3)
    with SimulatedDevice() as device:
        there = here.to(CUDA)
        assert isinstance(there, OnDevice) and there.device == CUDA and there.is_cuda
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.where(there > 1, there, here),
            lambda: nn.functional.linear(there, here),
            lambda: here[there[0].long()],
            lambda: there.clone().index_put_((torch.tensor([0]),), here[0]),
            lambda: there.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert not device.waits
        # What CUDA takes: numbers, indices, copies; and new tensors are where the old one is.
        doubled = there * 2 + torch.tensor(1.0)
        assert (doubled[torch.tensor([1])].cpu() == here[1:] * 2 + 1).all()
        assert torch.empty(2, 3).copy_(there).equal(here)
        made = (there.new_zeros(2), torch.ones_like(there), torch.zeros(2, device=there.device))
        assert all(isinstance(one, OnDevice) for one in (*made, there.new_tensor([1.0])))
        device.waits.clear()
        assert there.sum().item() == 15.0 and there[there > 2].shape == (3,)
        assert device.waits == {"aten._local_scalar_dense": 1, "aten.index": 1}


def test_the_device_learns_as_the_cpu_does() -> None:
    def after_a_step(there: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
        image = torch.rand(2, 3, 8, 8)
        net, image = (net.to(CUDA), image.to(CUDA)) if there else (net, image)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, foreach=False)
        net(image).square().mean().backward()
        optimizer.step()
        return tuple(one.detach().cpu() for one in net.state_dict().values())

    with SimulatedDevice():
        learned = after_a_step(there=True)
    for left, right in zip(learned, after_a_step(there=False), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize(
    ("task", "keys"),
    [
        *((task, [SMALL]) for task in sorted(TASKS)),
        ("regions", []),
        ("inpainting", ["task.encoder=sparse", "task.decoder=hierarchical"]),
        ("inpainting", [SMALL, "task.target=features", "task.neck=n", "task.scales=[8,16]"]),
        ("dense", [SMALL, "task.neck=n", "ema.enabled=true"]),
        ("simclr", [SMALL, "optim.name=lars", "accumulate=2"]),
        ("byol+inpainting", [SMALL]),
    ],
)
def test_pretraining_runs_there(
    task: str, keys: list[str], go: Go, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    own = [key for part in task.split("+") for key in keys_of(part, tmp_path)]
    go(
        pretrain, "--task", task, "--out", str(out), f"data.train={pictures}", "budget.steps=2",
        *TINY, *own, *keys,
    )  # fmt: skip
    assert sorted(losses(out)) == [1, 2]
    assert [line["step"] for line in metrics(out) if "probe/rankme" in line] == [0, 2]
    assert list((out / "pictures").glob("step-2-*.png"))
    backbone = backbone_from_file(out / "pretrained.safetensors")
    assert not any(isinstance(one, OnDevice) for one in backbone.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_labels_are_probed_there(go: Go, pictures: Path, labeled: Path, tmp_path: Path) -> None:
    boxes = [f"probe.detection.{key}" for key in ("steps=2", "image_size=64", f"data={labeled}")]
    go(
        pretrain, "--task", "dense", "--out", str(tmp_path / "out"), f"data.train={pictures}",
        "budget.steps=1", *TINY, SMALL, "task.neck=n", *boxes, "probe.labeled=scenes",
        "probe.pictures=64",
    )  # fmt: skip
    first, last = (line for line in metrics(tmp_path / "out") if "probe/ap" in line)
    assert {"probe/ap", "probe/knn", "probe/linear"} <= first.keys() & last.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_a_step_waits_for_the_device_once(go: Go, pictures: Path, tmp_path: Path) -> None:
    """To see whether the gradient is finite."""

    def waits(steps: int) -> Counter[str]:
        return go(
            pretrain, "--task", "byol", "--out", str(tmp_path / str(steps)),
            f"data.train={pictures}", f"budget.steps={steps}", *TINY, "log.every_steps=50", SMALL,
        )  # fmt: skip

    assert waits(6) - waits(2) == {"aten._local_scalar_dense": 4}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize(
    "keys", [[], [SMALL, "image_sizes=[64,96]", "accumulate=2", "detector.objectness=true"]]
)
def test_fine_tuning_runs_there(keys: list[str], go: Go, labeled: Path, tmp_path: Path) -> None:
    small = [
        f"data.train={labeled}", "image_size=64", "batch_size=4", "data.workers=0", "threads=1",
        "report=false", "eval.times=1", "budget.steps=1",
    ]  # fmt: skip
    first, again = tmp_path / "first", tmp_path / "again"
    go(finetune, "--recipe", "full_stack", "--out", str(first), *small, *keys)
    assert (first / "results.json").is_file()
    if keys:  # from what that gave, with its statistics measured anew
        init = ["--init", str(first / "detector.safetensors"), "batchnorm=measure"]
        go(finetune, "--recipe", "default", "--out", str(again), *init, *small, *keys)
        assert (again / "results.json").is_file()
