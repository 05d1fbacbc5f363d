"""SimCLR: NT-Xent by hand, and two ranks equal to one process.

Run as a script, this file is one rank of the test that starts it twice.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from groundwork import colour
from groundwork.backbones.contract import IMAGENET_MEAN, IMAGENET_STD, Backbone, Level, Pyramid
from groundwork.config import validate
from groundwork.errors import UsageError
from pretext_tasks.simclr import SimCLR, SimCLRConfig

MakeBatch = Callable[..., dict[str, Tensor]]

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = SimCLRConfig(hidden_width=32, projection_width=8, temperature=0.5)


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


class Given(nn.Module):
    """A projector that answers with what it was given."""

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, _: Tensor) -> Tensor:
        return self.projection


def _plain_task() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(PlainBackbone(), SMALL.model_copy(update={"projector_batch_norm": False}))


def _global_batch(count: int = 8, side: int = 64) -> dict[str, Tensor]:
    """Noise of two scales, coloured as the paper says."""
    generator = np.random.default_rng(0)
    batch: dict[str, Tensor] = {}
    for number in (1, 2):
        coarse = generator.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
        pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)
        batch[f"view_{number}"] = torch.from_numpy(pixels)
        drawn = [colour.draw(SMALL.colour, generator) for _ in range(count)]
        batch[f"colour_{number}"] = torch.from_numpy(np.stack(drawn))
    return batch


def _loss_and_gradient(task: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = task(batch).loss
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None
        result[name.removeprefix("module.")] = parameter.grad
    return result


def _run_rank(rank: int, folder: Path) -> None:
    """Work through this rank's half of the global batch under DDP and write down what came out."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    batch = {name: value.chunk(2)[rank] for name, value in _global_batch().items()}
    result = _loss_and_gradient(DistributedDataParallel(_plain_task()), batch)
    torch.save(result, folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


def test_nt_xent_of_two_pictures_by_hand(tiny_backbone: Callable[[], Backbone]) -> None:
    """a1 = (1, 0), b1 = (0, 1), a2 = (0.6, 0.8), b2 = (0, 1), temperature 0.5; lengths differ."""
    task = SimCLR(tiny_backbone(), SMALL)
    task.projector = Given(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.8, 2.4], [0.0, 0.5]]))

    def row(partner: float, *others: float) -> float:
        exponentials = [math.exp(cosine / 0.5) for cosine in (partner, *others)]
        return -math.log(exponentials[0] / sum(exponentials))

    expected = (
        row(0.6, 0.0, 0.0)  # a1 against a2; b1, b2
        + row(1.0, 0.0, 0.8)  # b1 against b2; a1, a2
        + row(0.6, 0.8, 0.8)  # a2 against a1; b1, b2
        + row(1.0, 0.0, 0.8)  # b2 against b1; a1, a2
    ) / 4
    output = task(_global_batch(count=2))
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
    assert output.metrics["cosine"].item() == pytest.approx(0.8, abs=1e-6)
    assert output.metrics["partner_found"].item() == 1.0


def test_the_first_loss_is_near_chance(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    """At a high temperature every other view is as likely: log(2N - 1)."""
    config = SMALL.model_copy(update={"temperature": 1000.0})
    loss = SimCLR(tiny_backbone(), config)(make_batch(SimCLR, config)).loss
    assert loss.item() == pytest.approx(math.log(7), abs=0.01)


def test_both_views_share_one_forward_and_its_statistics(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    task = SimCLR(tiny_backbone(), SMALL)
    sizes: list[int] = []
    task.backbone.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    task(make_batch(SimCLR, SMALL))
    assert sizes == [8]


def test_similarities_are_not_rounded_by_autocast(tiny_backbone: Callable[[], Backbone]) -> None:
    task = SimCLR(tiny_backbone(), SMALL.model_copy(update={"temperature": 0.01}))
    torch.manual_seed(0)
    task.projector = Given(torch.randn(8, 8))
    batch = _global_batch(count=4)
    exact = task(batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(task(batch).loss, exact)


def test_the_paper_colours_both_views_alike() -> None:
    views = SimCLR.views(SimCLRConfig(), 64)
    config = SimCLRConfig().colour
    assert (config.brightness, config.saturation, config.hue) == (0.8, 0.8, 0.2)
    assert (config.probability, config.grayscale, config.blur) == (0.8, 0.2, 0.5)
    assert getattr(views, "colours") == (config, config)  # noqa: B009 (not part of the protocol)


def test_a_recipe_that_sets_one_key_of_the_colour_keeps_the_others() -> None:
    config = validate(SimCLRConfig, {"colour": {"hue": 0.05}})
    assert config.colour == SimCLRConfig().colour.model_copy(update={"hue": 0.05})
    with pytest.raises(UsageError, match="temperature"):
        validate(SimCLRConfig, {"temperature": 0.0})


@pytest.mark.dist
def test_two_ranks_equal_one_process_with_the_same_global_batch(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], errors
    results = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    expected = _loss_and_gradient(_plain_task(), _global_batch())

    # A rank's loss is of its own pictures against all: the mean over ranks is the global loss.
    mean_loss = (results[0].pop("loss") + results[1].pop("loss")) / 2
    assert mean_loss.item() == pytest.approx(expected.pop("loss").item(), abs=1e-5)
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    assert norm > 0.01
    for name, gradient in expected.items():
        assert torch.equal(results[0][name], results[1][name]), name
        assert (results[0][name] - gradient).abs().max() <= 1e-5 * norm, name


if __name__ == "__main__":
    _run_rank(int(sys.argv[1]), Path(sys.argv[2]))
