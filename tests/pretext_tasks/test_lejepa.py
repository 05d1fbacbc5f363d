"""LeJEPA: both terms by an independent computation, its views, and two ranks equal to one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groundwork.backbones.contract import Backbone
from groundwork.config import validate
from groundwork.data.decode import Picture, open_picture
from groundwork.errors import UsageError
from pretext_tasks.lejepa import GivenDirections, LeJEPA, LeJEPAConfig
from tests.pretext_tasks import two_ranks

MakeBatch = Callable[..., dict[str, Tensor]]
SMALL = LeJEPAConfig(hidden_width=32, projection_width=8, small_views=3, small_size=32)


def _epps_pulley(x: np.ndarray, knots: int = 2001) -> float:
    """N times the integral over -3..3 of |E exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2), by sums."""
    t = np.linspace(-3, 3, knots)
    found = np.exp(1j * np.outer(t, x)).mean(1)
    window = np.exp(-(t**2) / 2)
    return float(len(x) * np.trapezoid(np.abs(found - window) ** 2 * window, t))


def test_sigreg_along_given_directions_is_epps_and_pulleys() -> None:
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(2, 12, 5, generator=generator) * 2 + 1
    directions = torch.randn(4, 3, 5, generator=generator)  # three drawn with each of four pictures
    unit = directions.flatten(0, 1) / directions.flatten(0, 1).norm(dim=1, keepdim=True)
    expected = np.mean([_epps_pulley((view @ d).numpy()) for view in projection for d in unit])
    found = GivenDirections().along(projection, directions)
    assert found.item() == pytest.approx(expected, rel=2e-3)  # 17 knots, not 2001


def test_a_normal_distribution_scores_less_than_others() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 512, 4, generator=generator)
    directions = torch.randn(8, 8, 4, generator=generator)
    along = GivenDirections().along
    assert along(normal, directions) < 3
    assert along(normal * 0.1, directions) > 50  # collapsed
    assert along(normal * 3, directions) > 50
    assert along(normal.sign() * 2, directions) > 20


class _Pooled(nn.Module):
    """A projector that gives each view's first channels as they are."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled[:, :8]


def test_invariance_is_to_the_mean_of_the_large_views(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    task = LeJEPA(tiny_backbone(), SMALL)
    task.projector = _Pooled()
    batch = make_batch(LeJEPA, SMALL)
    output = task(batch)
    large, small = task._projected(batch, "large"), task._projected(batch, "small")
    assert (large.shape, small.shape) == ((2, 4, 8), (3, 4, 8))
    middle = (large[0] + large[1]) / 2
    expected = torch.stack([(view - middle) ** 2 for view in (*large, *small)]).mean()
    assert output.metrics["invariance"].item() == pytest.approx(expected.item(), rel=1e-5)
    loss = 0.05 * output.metrics["gaussian"] + 0.95 * output.metrics["invariance"]
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_view_keeps_its_picture_and_its_colour(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    """Views are flattened and unflattened: each row must be the one that a lone view gives."""
    task = LeJEPA(tiny_backbone().eval(), SMALL)
    task.eval()
    batch = make_batch(LeJEPA, SMALL)
    whole = task._projected(batch, "small")
    for view in range(3):
        lone = {
            "small": batch["small"][:, view : view + 1],
            "small_colour": batch["small_colour"][:, view : view + 1],
        }
        assert torch.allclose(task._projected(lone, "small")[0], whole[view], atol=1e-5)


def test_small_views_can_be_left_out(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    config = SMALL.model_copy(update={"small_views": 0})
    batch = make_batch(LeJEPA, config)
    assert "small" not in batch
    task = LeJEPA(tiny_backbone(), config)
    assert task(batch).loss.isfinite()
    assert set(task.pictures(batch)) == {"large_1", "large_2"}


def test_small_views_see_small_parts(make_jpeg: Callable[..., bytes]) -> None:
    seen: dict[int, list[float]] = {64: [], 32: []}

    class Watched(Picture):
        def cut(self, boxes, size):  # type: ignore[no-untyped-def]
            seen[size] += [(b[2] - b[0]) * (b[3] - b[1]) / (200 * 150) for b in boxes]
            return super().cut(boxes, size)

    picture = open_picture(make_jpeg(1, 200, 150))
    picture.__class__ = Watched
    views = LeJEPA.views(SMALL, 64)
    for seed in range(40):
        views(picture, np.random.default_rng(seed))
    assert len(seen[64]) == 80 and len(seen[32]) == 120
    assert min(seen[64]) > 0.28 and max(seen[64]) > 0.8
    assert min(seen[32]) > 0.04 and max(seen[32]) < 0.32


def test_what_cannot_be_is_refused(
    tiny_backbone: Callable[[], Backbone], make_batch: MakeBatch
) -> None:
    with pytest.raises(UsageError, match=r"small_size|small views need a side"):
        LeJEPA.views(SMALL.model_copy(update={"small_size": 50}), 64)
    with pytest.raises(UsageError, match="large_views"):
        validate(LeJEPAConfig, {"large_views": 0})
    with pytest.raises(UsageError, match="at least two"):
        LeJEPA(tiny_backbone(), SMALL)(make_batch(LeJEPA, SMALL, count=1))


@pytest.mark.dist
def test_two_ranks_equal_one_process_with_the_same_global_batch(
    tmp_path: Path, make_batch: MakeBatch
) -> None:
    """BatchNorm in the projector has statistics of a process, so it is left out."""
    config = SMALL.model_copy(update={"projector_batch_norm": False})
    two_ranks.agree(tmp_path, "lejepa", config, make_batch(LeJEPA, config, count=8))
