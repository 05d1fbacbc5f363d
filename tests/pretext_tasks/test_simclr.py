"""SimCLR: NT-Xent by hand, and two ranks equal to one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.config import validate
from groundwork.errors import UsageError
from pretext_tasks.simclr import SimCLR, SimCLRConfig
from tests.pretext_tasks import two_ranks

MakeBatch = Callable[..., dict[str, Tensor]]

SMALL = SimCLRConfig(hidden_width=32, projection_width=8, temperature=0.5)


class Given(nn.Module):
    """A projector that answers with what it was given."""

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, _: Tensor) -> Tensor:
        return self.projection


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
    config = SMALL.model_copy(update={"projector_batch_norm": False})
    two_ranks.agree(tmp_path, "simclr", config, _global_batch())
