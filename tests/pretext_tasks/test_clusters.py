"""Clusters: what looks alike becomes one kind, from a copy that does not learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Backbone, Level
from groundwork.necks.yolo12 import Features
from pretext_tasks import clusters
from pretext_tasks.clusters import Clusters, spherical_kmeans
from pretext_tasks.regions import Regions, RegionsConfig
from pretext_tasks.stable_regions import KINDS

LEVELS = (Level(8, 3), Level(16, 3), Level(32, 3))


class _Colours(nn.Module):
    """Gives the picture itself as features, smaller at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Features:
        return Features(
            *(self.scale * functional.avg_pool2d(image, stride) for stride, _ in LEVELS)
        )


def _pictures(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four pictures with a square of 24 px each, of one of three colours; and which one it is."""
    own = torch.randint(3, (4,), generator=generator)
    image = 0.05 * torch.randn(4, 3, 64, 64, generator=generator)
    for row, colour in enumerate(own):
        image[row, colour, 16:40, 16:40] += 1
    return image, own


BOXES = torch.tensor([[16.0, 16.0, 40.0, 40.0]]).repeat(4, 1)


def test_things_that_look_alike_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_SEEN", 60)
    generator = torch.Generator().manual_seed(0)
    found = Clusters(_Colours(), LEVELS, 3)
    assert found.count == 9
    rows = torch.arange(4)
    while not found.by_level[0].ready:
        image, own = _pictures(generator)
        assert not found.kinds(image, rows, BOXES)[1].any()
        found.update()
    assert found.by_level[0].filled == 60
    seen: dict[int, set[int]] = {}
    for _ in range(10):
        image, own = _pictures(generator)
        kinds, known = found.kinds(image, rows, BOXES)
        assert known.all() and kinds.max() < 3
        for colour, kind in zip(own.tolist(), kinds.tolist(), strict=True):
            seen.setdefault(colour, set()).add(kind)
    assert sorted(kind for kinds in seen.values() for kind in kinds) == [0, 1, 2]


def test_a_level_without_clusters_waits_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_SEEN", 8)
    found = Clusters(_Colours(), LEVELS, 2)
    image, rows = torch.randn(4, 3, 128, 128), torch.arange(4)
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [0, 0, 40, 40], [8, 8, 30, 30], [0, 0, 99, 99]])
    for _ in range(4):
        found.kinds(image, rows, boxes)
        found.update()
    assert [bool(level.ready) for level in found.by_level] == [True, False, False]
    kinds, known = found.kinds(image, rows, boxes)
    assert known.tolist() == [True, False, True, False]
    assert set(kinds.tolist()) <= {0, 1}
    for _ in range(8):
        found.kinds(image, rows, boxes)
        found.update()
    kinds, known = found.kinds(image, rows, boxes)
    assert known.all() and kinds[1] in (2, 3) and kinds[3] in (4, 5)


def test_the_copy_stays_until_the_next_is_taken() -> None:
    network = _Colours()
    found = Clusters(network, LEVELS, 2)
    with torch.no_grad():
        network.scale.fill_(3.0)
    assert found.network.scale == 1 and not found.network.scale.requires_grad
    found.by_level[0].ready.fill_(True)
    found.by_level[0].filled.fill_(5)
    found.take(network)
    assert found.network.scale == 3 and found.taken == 1
    assert not found.by_level[0].ready and found.by_level[0].filled == 0


def test_kmeans_finds_groups_and_loses_none() -> None:
    torch.manual_seed(0)
    directions = functional.normalize(torch.randn(5, 16), dim=1)
    # The first fifty points are of one group, from which all centres start.
    own = torch.cat((torch.zeros(50, dtype=torch.int64), torch.arange(50) % 5))
    points = functional.normalize(directions[own] + 0.02 * torch.randn(100, 16), dim=1)
    centres = spherical_kmeans(points, 5)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(5))
    nearest = (directions @ centres.T).max(1)
    assert nearest.values.min() > 0.99
    assert len(set(nearest.indices.tolist())) == 5


def test_features_that_are_all_the_same_make_no_nan() -> None:
    level = Clusters(_Colours(), LEVELS, 4).by_level[0]
    level.keep(torch.ones(5000, 3))
    level.make()
    assert level.filled == len(level.seen)
    assert torch.isfinite(level.turn).all() and torch.isfinite(level.centres).all()
    assert torch.isfinite(level._whitened(torch.rand(3, 3))).all()


@pytest.fixture
def task(tiny_backbone: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch) -> Regions:
    monkeypatch.setattr(clusters, "_SEEN", 8)
    torch.manual_seed(0)
    return Regions(tiny_backbone(), RegionsConfig(rounds=(0.3, 0.6), clusters=4))


def _batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    boxes = torch.zeros(2, 100, 4)
    boxes[:, 0] = torch.tensor([8.0, 8.0, 28.0, 28.0])
    boxes[:, 1] = torch.tensor([40.0, 8.0, 60.0, 28.0])
    return {
        "image": torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8),
        "boxes": boxes,
        "kinds": torch.ones(2, 100, dtype=torch.int64),
        "count": torch.tensor([2, 2]),
    }


def test_rounds_begin_at_their_points_of_the_run(task: Regions, monkeypatch: Any) -> None:
    batch = _batch()
    assert task.clusters is not None and task.head.num_classes == KINDS + 12
    taken = []
    for progress in (0.1, 0.3, 0.4, 0.5, 0.6, 0.9, 1.0):
        targets = task._targets(batch)
        assert targets.boxes.shape == (4, 4) and targets.image.tolist() == [0, 0, 1, 1]
        taken.append((int(task.clusters.taken), bool((targets.classes >= KINDS).all())))
        task.after_step(progress)
    # The copy of 0.3 sees four boxes at 0.4 and 0.5 each, and says their kinds at 0.6.
    assert taken == [
        (0, False),
        (0, False),
        (1, False),
        (1, False),
        (1, True),
        (2, False),
        (2, False),
    ]


def test_what_is_kept_knows_nothing_of_clusters(task: Regions) -> None:
    assert set(task.product()) == {"backbone", "neck", "head"}
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert not any(name.startswith("clusters.") for name in trained)
    plain = Regions(task.backbone, RegionsConfig())
    assert plain.clusters is None and plain.head.num_classes == KINDS


def test_rounds_are_points_of_the_run() -> None:
    with pytest.raises(ValueError):
        RegionsConfig(rounds=(1.5,))
