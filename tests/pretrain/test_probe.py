"""The probe: each collapse is told and no healthy run is, and accuracies worked by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from groundwork.backbones import build_backbone
from groundwork.backbones.contract import Backbone, Level, Pyramid
from groundwork.colour import normalise
from groundwork.data.reading import Reading
from groundwork.data.shards import Sample, evenly
from groundwork.errors import DataError, UnavailableError
from groundwork.settings import ProbeSettings
from pretrain.probe import (
    CollapseAlarm,
    Health,
    Probe,
    balanced_accuracy,
    features,
    fresh_statistics,
    knn,
    linear,
    open_probe,
    rankme,
)
from pretrain.probe_pictures import Pictures, evenly_over_shards, hold_out, read_unlabeled


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Memory:
    """Samples held in memory: one shard, `labels` beside the pictures."""

    name = "memory"
    fingerprint = "none"

    def __init__(self, pictures: Sequence[bytes], labels: Sequence[str | None]) -> None:
        self.shard_sizes = np.array([len(pictures)], dtype=np.int64)
        self._pictures = pictures
        self._labels = labels

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, shard: int, index: int) -> Sample:
        return Sample(f"p{index}", self._pictures[index], self._labels[index], "memory", 0)

    def prefetch(self, shards: Sequence[int]) -> None: ...

    def close(self) -> None: ...


def coloured(count: int, labeled: bool = True) -> Memory:
    """Make noisy pictures, red and blue in turn, labeled so."""
    generator = np.random.default_rng(0)
    pictures = []
    for index in range(count):
        pixels = generator.integers(0, 60, (40, 50, 3), dtype=np.uint8)
        pixels[..., 2 * (index % 2)] += 150
        pictures.append(png(pixels))
    return Memory(pictures, [["red", "blue"][i % 2] if labeled else None for i in range(count)])


class Means(Backbone):
    """A backbone whose C5 is the mean colour, times a parameter; its neighbours are empty."""

    name = "means"
    levels = (Level(8, 1), Level(16, 1), Level(32, 3))
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image: Tensor) -> Pyramid:
        c5 = nn.functional.avg_pool2d(self.norm(self.frozen(image)), 32) * self.scale
        return Pyramid(image[:, :1, ::8, ::8], image[:, :1, ::16, ::16], c5)


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def measured(values: Tensor) -> dict[str, float]:
    health = Health.of(values)
    return {f"probe/{name}": value for name, value in vars(health).items()}


COLLAPSES: dict[str, Callable[[int, int, int], Tensor]] = {
    "constant with noise": lambda n, d, seed: noise(1, d) + 1e-4 * noise(n, d, seed),
    "four directions": lambda n, d, seed: noise(n, 4, seed) @ noise(4, d, 9),
    "four directions and an offset": lambda n, d, seed: 1 + noise(n, 4, seed) @ noise(4, d, 9),
    "zeros": lambda n, d, seed: torch.zeros(n, d),
    "not a number": lambda n, d, seed: torch.full((n, d), torch.nan),
    "infinite": lambda n, d, seed: torch.full((n, d), torch.inf),
}


def backbone_features(name: str, seed: int, pixels: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return features(build_backbone(name), pixels, 32)


def drawn_pixels(count: int, seed: int = 0) -> Tensor:
    """Draw smooth pictures with structure at several scales, 32 x 32."""
    coarse = [
        nn.functional.interpolate(
            torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed + side)),
            size=32,
            mode="bilinear",
        )
        for side in (2, 5, 16)
    ]
    return (sum(coarse, torch.zeros(1)) / 3 * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_health_by_hand() -> None:
    # Two features along each axis: directions are +-1 on two axes; both singular values are equal.
    cross = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    health = Health.of(cross)
    assert health.rankme == pytest.approx(2)
    assert health.rankme_centred == pytest.approx(2)
    # Each column is 1, -1, 0, 0: variance 2 / 3; times sqrt(2).
    assert health.spread == pytest.approx((2 / 3) ** 0.5 * 2**0.5)
    # Singular values 3 and 1: entropy of (0.75, 0.25).
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        float(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    )


def test_each_measure_alone_overlooks_a_collapse() -> None:
    healthy = Health.of(noise(1024, 256))
    four = Health.of(COLLAPSES["four directions"](1024, 256, 0))
    constant = Health.of(COLLAPSES["constant with noise"](1024, 256, 0))
    assert healthy.spread == pytest.approx(1, abs=0.01)
    assert healthy.rankme == pytest.approx(247, abs=2)
    assert four.spread > 0.8
    assert four.rankme == pytest.approx(4, abs=0.2)
    assert constant.rankme == pytest.approx(1, abs=0.05)
    assert constant.rankme_centred > 200
    assert constant.spread < 1e-3


@pytest.mark.parametrize("kind", ["zeros", "not a number", "infinite"])
def test_measures_stay_finite_so_that_they_fit_into_json(kind: str) -> None:
    values = measured(COLLAPSES[kind](64, 32, 0))
    assert set(values.values()) == {0.0}
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "convnext_atto"])
def test_each_collapse_of_a_real_backbone_is_told_at_the_second_measurement(name: str) -> None:
    start = backbone_features(f"timm/{name}", 0, drawn_pixels(48))
    shape = (len(start), start.shape[1])
    for kind, make in COLLAPSES.items():
        alarm = CollapseAlarm()
        assert alarm.check(measured(start)) is None
        assert alarm.check(measured(make(*shape, 1))) is None, kind
        message = alarm.check(measured(make(*shape, 2)))
        assert message is not None, kind
        assert "was" in message


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "convnext_atto"])
def test_random_backbones_do_not_alarm(name: str) -> None:
    alarm = CollapseAlarm(patience=1)
    pixels = drawn_pixels(48)
    for seed in range(3):
        shaken = pixels.int() + (noise(1, 32, seed) * 4).int().view(1, 32, 1, 1)
        values = backbone_features(f"timm/{name}", seed, shaken.clamp(0, 255).to(torch.uint8))
        assert alarm.check(measured(values)) is None


def test_few_directions_are_no_collapse_where_boxes_are_learned() -> None:
    start, constant = noise(64, 256, 0), torch.ones(64, 256)
    few = noise(64, 2, 1) @ noise(2, 256, 2)
    assert measured(few)["probe/rankme_centred"] < 3
    for rank in (False, True):
        alarm = CollapseAlarm(patience=1, rank=rank)
        assert alarm.check(measured(start)) is None
        assert (alarm.check(measured(few)) is None) is not rank
        assert alarm.check(measured(constant)) is not None


@pytest.mark.parametrize("columns", [16, 64, 256, 1024])
def test_small_healthy_batches_do_not_alarm(columns: int) -> None:
    alarm = CollapseAlarm(patience=1)
    for seed in range(20):
        assert alarm.check(measured(noise(64, columns, seed))) is None


def test_running_statistics_that_lag_behind_are_no_collapse() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("yolo12n")
    pixels = drawn_pixels(48)
    samples = Memory([png(one.numpy()) for one in pixels], [None] * 48)
    probe = Probe(ProbeSettings(), samples, 32)
    alarm = CollapseAlarm(patience=1)
    first = probe.measure(backbone)
    assert alarm.check(first) is None
    random = Health.of(features(backbone, pixels, 48))
    backbone.train()
    for _ in range(5):
        backbone(normalise(pixels, backbone.mean, backbone.std))
    # No weight has moved: only the running statistics did, half of the way.
    lagging = Health.of(features(backbone, pixels, 48))
    assert lagging.spread < 0.1 * random.spread
    second = probe.measure(backbone)
    assert alarm.check(second) is None
    assert second == pytest.approx(first, rel=1e-4)


def test_fresh_statistics_are_those_of_the_pictures_and_are_put_back() -> None:
    backbone = Means()
    nn.init.constant_(backbone.norm.get_buffer("running_mean"), 7.0)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pixels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    pixels[1::2, ..., 0] = 255
    with fresh_statistics(backbone, pixels, 4):
        # Red is -1 or 1: mean 0, variance 1. Green and blue are always -1.
        assert backbone.frozen.get_buffer("running_mean").tolist() == pytest.approx(
            [0, -1, -1], abs=1e-4
        )
        assert backbone.frozen.get_buffer("running_var").tolist() == pytest.approx(
            [1, 0, 0], abs=1e-4
        )
        found = features(backbone, pixels, 3)
        assert found[:, 0].tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-3)
        assert found[:, 1:].abs().max() < 1e-2
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert not backbone.norm._forward_pre_hooks


def test_one_bad_measurement_between_good_ones_is_no_alarm() -> None:
    alarm = CollapseAlarm()
    good, bad = measured(noise(64, 32)), measured(torch.zeros(64, 32))
    assert [alarm.check(one) for one in (good, bad, good, bad, good)] == [None] * 5
    assert alarm.check(bad) is None
    assert alarm.check(bad) is not None
    assert alarm.check(bad) is not None


def test_features_that_start_constant_are_told_as_well() -> None:
    alarm = CollapseAlarm()
    assert alarm.check(measured(torch.zeros(64, 32))) is None
    assert alarm.check(measured(torch.zeros(64, 32))) is not None


def test_an_alarm_goes_on_after_a_checkpoint() -> None:
    first = CollapseAlarm()
    first.check(measured(noise(64, 32)))
    first.check(measured(torch.zeros(64, 32)))
    second = CollapseAlarm()
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.check(measured(torch.zeros(64, 32))) is not None
    fresh = CollapseAlarm()
    fresh.load(json.loads(json.dumps(CollapseAlarm().state())))
    assert fresh.check(measured(noise(64, 32))) is None


def test_places_are_even_and_in_file_order() -> None:
    sizes = np.array([3, 0, 5, 2], dtype=np.int64)
    everything = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 0), (3, 1)]
    assert evenly(sizes, 10) == everything
    assert evenly(sizes, 99) == everything
    assert evenly(sizes, 5) == everything[::2]
    assert evenly(np.zeros(2, dtype=np.int64), 5) == []
    assert evenly(np.zeros(0, dtype=np.int64), 5) == []


def test_unlabeled_pictures_come_from_few_shards() -> None:
    places = evenly_over_shards(np.full(100_000, 1000, dtype=np.int64), 512)
    assert len(places) == len(set(places)) == 512
    assert {shard for shard, _ in places} == {12_500 * i for i in range(8)}
    # Shards of one picture: as many shards as pictures, at least.
    assert len(evenly_over_shards(np.ones(1000, dtype=np.int64), 512)) == 512
    assert len(evenly_over_shards(np.ones(9, dtype=np.int64), 512)) == 9
    assert evenly_over_shards(np.zeros(0, dtype=np.int64), 512) == []


def test_features_are_the_pooled_c5_of_normalised_pictures() -> None:
    pixels = torch.full((3, 32, 32, 3), 255, dtype=torch.uint8)
    pixels[1] = 0
    pixels[2, ..., 1:] = 0
    found = features(Means(), pixels, 2)
    expected = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, -1]])
    assert torch.allclose(found, expected, atol=1e-4)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_measuring_changes_nothing_and_gives_the_same_twice() -> None:
    backbone = Means().train()
    backbone.frozen.eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    probe = Probe(ProbeSettings(), coloured(40), 32, coloured(40))
    chance = torch.random.get_rng_state()
    first, second = probe.measure(backbone), probe.measure(backbone)
    assert first == second
    assert torch.equal(chance, torch.random.get_rng_state())
    assert backbone.training
    assert backbone.norm.training
    assert not backbone.frozen.training
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_a_probe_measures_what_its_pictures_allow() -> None:
    plain = Probe(ProbeSettings(), coloured(40, labeled=False), 32).measure(Means())
    assert list(plain) == ["probe/spread", "probe/rankme", "probe/rankme_centred"]
    labeled = Probe(ProbeSettings(), coloured(40), 32, coloured(40)).measure(Means())
    assert labeled["probe/knn"] == labeled["probe/linear"] == 1.0
    apart = Probe(ProbeSettings(), coloured(40), 32, coloured(40), coloured(7)).measure(Means())
    assert apart["probe/knn"] == apart["probe/linear"] == 1.0
    json.dumps(labeled, allow_nan=False)


def test_diverged_weights_are_measured_as_chance() -> None:
    backbone = Means()
    nn.init.constant_(backbone.scale, torch.nan)
    found = Probe(ProbeSettings(), coloured(40), 32, coloured(40)).measure(backbone)
    assert found["probe/spread"] == 0.0
    assert found["probe/knn"] == found["probe/linear"] == 0.5


def test_every_fifth_picture_of_a_class_is_held_out() -> None:
    labels = torch.tensor([0] * 10 + [1, 0] * 5)
    rows = torch.arange(20).view(20, 1, 1, 1).to(torch.uint8)
    bank, queries = hold_out(Pictures(rows, labels), "here")
    assert queries.pixels.flatten().tolist() == [4, 9, 18, 19]
    assert sorted([*bank.pixels.flatten().tolist(), 4, 9, 18, 19]) == list(range(20))
    with pytest.raises(DataError, match="fewer than 5"):
        hold_out(Pictures(rows[:4], labels[:4]), "here")


def test_neighbours_vote_by_cosine_and_temperature() -> None:
    # One neighbour at cosine 1 weighs exp(1 / 0.07), which two at cosine 0.9 cannot outvote
    # (2 exp(-0.1 / 0.07) = 0.48), but five can (1.2). Length plays no part.
    near = torch.tensor([[10.0, 0.0]])
    far = torch.tensor([[0.9, 0.19**0.5]])
    query = torch.tensor([[0.1, 0.0]])
    for count, winner in [(2, 0), (5, 1)]:
        bank = torch.cat([near, far.repeat(count, 1)])
        labels = torch.tensor([0] + [1] * count)
        assert knn(bank, labels, query, 2).tolist() == [winner]


def test_only_the_twenty_nearest_vote() -> None:
    # Twenty at cosine 1, a hundred at cosine 0.99 that would win together.
    bank = torch.cat([torch.tensor([[1.0, 0.0]] * 20), torch.tensor([[0.99, 0.1411]] * 100)])
    labels = torch.tensor([0] * 20 + [1] * 100)
    assert knn(bank, labels, torch.tensor([[1.0, 0.0]]), 2).tolist() == [0]


def test_many_queries_are_answered_as_one_by_one() -> None:
    bank, queries = noise(50, 8), noise(1500, 8, 1)
    labels = torch.arange(50) % 3
    alone = torch.cat([knn(bank, labels, one[None], 3) for one in queries[1000:1050]])
    assert torch.equal(knn(bank, labels, queries, 3)[1000:1050], alone)


def test_the_boundary_of_a_linear_probe_does_not_lean_to_the_rarer_class() -> None:
    bank = torch.tensor([[0.0]] * 30 + [[1.0]] * 3)
    labels = torch.tensor([0] * 30 + [1] * 3)
    assert linear(bank, labels, torch.tensor([[0.45], [0.55]]), 2).tolist() == [0, 1]


def test_a_linear_probe_separates_what_neighbours_cannot() -> None:
    # The class is in one small dimension, beside twenty large ones that mean nothing.
    values = torch.cat([100 * noise(400, 20), noise(400, 1, 1)], dim=1)
    labels = (values[:, -1] > 0).long()
    found = linear(values[:300], labels[:300], values[300:], 2)
    assert balanced_accuracy(found, labels[300:]) > 0.9
    by_neighbours = knn(values[:300], labels[:300], values[300:], 2)
    assert balanced_accuracy(by_neighbours, labels[300:]) < 0.65


def test_balanced_accuracy_by_hand() -> None:
    # 3 of 4, 0 of 1; class 2 is never asked for.
    labels = torch.tensor([0, 0, 0, 0, 1])
    assert balanced_accuracy(torch.tensor([0, 0, 0, 2, 0]), labels) == pytest.approx(0.375)


def test_mistakes_in_labeled_pictures_are_told() -> None:
    train = coloured(40)
    with pytest.raises(DataError, match="has no label"):
        Probe(ProbeSettings(), train, 32, coloured(40, labeled=False))
    one = Memory([png(np.zeros((8, 8, 3), np.uint8))] * 10, ["a"] * 10)
    with pytest.raises(DataError, match="one class only"):
        Probe(ProbeSettings(), train, 32, one)
    with pytest.raises(DataError, match="the class a, which"):
        Probe(ProbeSettings(), train, 32, coloured(40), one)
    with pytest.raises(DataError, match="p0 of memory"):
        Probe(ProbeSettings(), train, 32, Memory([b"no picture"], ["a"]))


def test_unreadable_unlabeled_pictures_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    good = png(np.zeros((8, 8, 3), np.uint8))
    found = Probe(ProbeSettings(), Memory([good, b"no picture", good], [None] * 3), 32)
    assert found.measure(Means())["probe/spread"] == 0.0
    assert "leaves out p1 of memory" in caplog.text
    with pytest.raises(DataError, match="0 readable pictures of 3"):
        Probe(ProbeSettings(), Memory([b"no picture"] * 3, [None] * 3), 32)


def test_class_folders_are_opened_by_their_path(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 60, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            (tmp_path / "data" / name / f"{index}.png").write_bytes(png(pixels))
    settings = ProbeSettings(labeled=str(tmp_path / "data"))
    probe = open_probe(settings, coloured(40), 32, cache=tmp_path / "cache", cache_bytes=10**9)
    assert probe.measure(Means())["probe/knn"] == 1.0


@pytest.mark.slow
def test_the_drawn_objects_are_labeled_pictures(tmp_path: Path) -> None:
    settings = ProbeSettings(labeled="scenes")
    probe = open_probe(settings, coloured(40), 64, cache=tmp_path, cache_bytes=10**9)
    found = probe.measure(Means())
    assert 0.2 < found["probe/knn"] <= 1
    assert 0.2 < found["probe/linear"] <= 1
    # They are drawn in colours, and read so whatever the mapping of the training pictures.
    mapped = open_probe(
        settings, coloured(40), 64, cache=tmp_path, cache_bytes=10**9,
        reading=Reading(bands=(3, 2, 1), value_range=(0, 4000)),
    )  # fmt: skip
    assert probe._bank is not None and mapped._bank is not None
    assert torch.equal(mapped._bank.pixels, probe._bank.pixels)
    assert not torch.equal(mapped._train.pixels, probe._train.pixels)


def test_a_store_that_does_not_answer_ends_the_probe_and_no_picture_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples, reads = coloured(8, labeled=False), []

    def unavailable(shard: int, index: int) -> Sample:
        reads.append(index)
        raise UnavailableError("no answer.")

    monkeypatch.setattr(samples, "read", unavailable)
    monkeypatch.setattr("groundwork.data.reach.PATIENCE", -1.0)
    with pytest.raises(UnavailableError, match="no answer"):
        read_unlabeled(samples, 8, 32)
    assert reads == [0]
