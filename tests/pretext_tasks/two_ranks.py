"""A task on two ranks against the same task in one process, on the same global batch.

Run as a script, this file is one rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from groundwork.backbones.contract import IMAGENET_MEAN, IMAGENET_STD, Backbone, Level, Pyramid
from groundwork.config import Section
from pretext_tasks import load_task
from pretext_tasks.contract import PretextTask
from tests.commands import run


class PlainBackbone(Backbone):
    """Without BatchNorm: what one picture gives does not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "plain"
        self.levels = (Level(8, 8), Level(16, 12), Level(32, 16))
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.stage_3 = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.SiLU())
        self.stage_4 = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.SiLU())
        self.stage_5 = nn.Sequential(nn.Conv2d(12, 16, 2, 2), nn.SiLU())

    def forward(self, image: Tensor) -> Pyramid:
        c3 = self.stage_3(image)
        c4 = self.stage_4(c3)
        return Pyramid(c3, c4, self.stage_5(c4))


def _task(name: str, config: str) -> PretextTask:
    torch.manual_seed(0)
    kind = load_task(name)
    return kind(PlainBackbone(), kind.Config.model_validate_json(config))


def _loss_and_gradient(task: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = task(batch).loss
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None
        result[name.removeprefix("module.")] = parameter.grad
    return result


def agree(folder: Path, name: str, config: Section, batch: dict[str, Tensor]) -> None:
    """Hold two ranks' loss and gradient, each of half the batch, against one process's of all."""
    given = config.model_dump_json()
    torch.save(batch, folder / "batch.pt")
    done = run(2, folder, str(folder), name, given, script=__file__)
    assert done.returncode == 0, done.stderr
    results = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    expected = _loss_and_gradient(_task(name, given), batch)

    # A rank's loss is of its own pictures: the mean over ranks is the global loss.
    mean_loss = (results[0].pop("loss") + results[1].pop("loss")) / 2
    assert mean_loss.item() == pytest.approx(expected.pop("loss").item(), abs=1e-5)
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    assert norm > 0.01
    for parameter, gradient in expected.items():
        assert torch.equal(results[0][parameter], results[1][parameter]), parameter
        assert (results[0][parameter] - gradient).abs().max() <= 1e-5 * norm, parameter


def _run_rank(folder: Path, name: str, config: str) -> None:
    """Work through this rank's half of the global batch under DDP and write down what came out."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    batch = torch.load(folder / "batch.pt", weights_only=True)
    half = {entry: value.chunk(2)[rank] for entry, value in batch.items()}
    result = _loss_and_gradient(DistributedDataParallel(_task(name, config)), half)
    torch.save(result, folder / f"rank-{rank}.pt")
    distributed.barrier()  # a rank that goes while the other still talks may abort
    distributed.destroy_process_group()


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
