"""Is it learning, and is it collapsing: what is measured on frozen features while a run goes on.

Without labels, of pooled C5 features over a fixed set of the training pictures:
- spread: the standard deviation of l2-normalised features, averaged over dimensions, times
  sqrt(D); 1 for features that point everywhere, 0 for features that all point the same way.
- RankMe (arXiv 2210.02885, equation 1): exp of the entropy of the normalised singular values.
- the same of normalised, centred features. No one of the three sees every collapse: a constant with
  a little noise has full centred rank, features on four directions have full spread, and features
  far from the origin have a low uncentred rank in healthy networks.
With labels: a weighted kNN (arXiv 1805.01978, section 3.4) and a linear probe (multinomial logistic
regression), both as class-balanced accuracy (mean recall), so that common classes do not hide rare.
With boxes: what a tiny detection head finds (pretrain/detection_probe.py).

BatchNorm's running statistics lag behind the weights: in the first hundreds of steps, what a
network computes with them has nothing to do with what it computes in training (in a healthy run of
yolo12n they took the spread from 0.06 to 0.00001 in ten steps, while it was 0.83 by each batch's
own statistics). So they are measured anew on the training pictures for each probe (precise BN,
arXiv 2105.07576, section 3), and put back afterwards.

Nothing here draws a random number, or leaves a weight, a buffer or a training mode changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor, nn
from torch.nn import functional

from groundwork.backbones.contract import Backbone
from groundwork.colour import normalise
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.samples import open_samples
from groundwork.data.scenes import open_scene_objects
from groundwork.data.shard_index import sha256_text
from groundwork.data.shards import Samples
from groundwork.errors import DataError
from groundwork.modes import evaluating
from groundwork.precise_batchnorm import measured_statistics
from groundwork.settings import ProbeSettings
from pretrain.detection_probe import DetectionProbe, open_detection_probe
from pretrain.probe_pictures import Pictures, hold_out, number, read_labeled, read_unlabeled

# Wu et al. vote with 200 neighbours out of 1.28 million; DINO found 20 better (arXiv 2104.14294).
NEIGHBOURS = 20
TEMPERATURE = 0.07
# Of the value at the start: less is a collapse. A healthy BYOL run of yolo12n had 0.9 of the spread
# and 0.4 of the centred rank left after 80 steps.
SPREAD_LEFT = 0.1
RANK_LEFT = 0.05  # jigsaw and inpainting learn while it falls to 0.10 and 0.12 (LOG.md)
# So few directions are a collapse whatever the number of pictures, but for networks that start with
# hardly more: those may lose half.
FEW = 5.0
# Under this, features are constant whatever they were at the start.
NO_SPREAD = 1e-6


@dataclass(frozen=True)
class Health:
    """Three measures of a set of features; all 0 where a feature is not finite."""

    spread: float
    rankme: float
    rankme_centred: float

    @classmethod
    def of(cls, features: Tensor) -> Health:
        """Measure features (N, D), N at least 2."""
        features = features.detach().double().cpu()
        if not torch.isfinite(features).all():
            return cls(0.0, 0.0, 0.0)
        directions = functional.normalize(features, dim=1)
        spread = directions.std(dim=0).mean() * features.shape[1] ** 0.5
        centred = directions - directions.mean(dim=0)
        return cls(float(spread), rankme(features), rankme(centred))


def rankme(features: Tensor) -> float:
    """Return the smooth rank of features (N, D), 1 to min(N, D); 0 where all are zero."""
    values = torch.linalg.svdvals(features)
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


class CollapseAlarm:
    """Says so when features have collapsed, compared with the first values it was shown.

    A measurement is bad where less than SPREAD_LEFT of the spread or RANK_LEFT of the centred rank
    is left, or FEW directions; `patience` bad ones in a row are an alarm. Without `rank` the spread
    alone counts.
    """

    def __init__(self, patience: int = 2, *, rank: bool = True) -> None:
        self.patience = patience
        self.rank = rank
        self._start: dict[str, float] | None = None
        self._bad = 0

    def check(self, measured: Mapping[str, float]) -> str | None:
        """Take what `Probe.measure` gave; return a sentence for a person where it is an alarm."""
        now = {name: measured[f"probe/{name}"] for name in ("spread", "rankme", "rankme_centred")}
        if self._start is None:
            self._start = now
        start = self._start
        spread_gone = not now["spread"] > max(SPREAD_LEFT * start["spread"], NO_SPREAD)
        rank = start["rankme_centred"]
        rank_gone = not now["rankme_centred"] >= max(RANK_LEFT * rank, min(FEW, rank / 2))
        bad = spread_gone or (self.rank and rank_gone)
        self._bad = self._bad + 1 if bad else 0
        if self._bad < self.patience:
            return None
        values = ", ".join(f"{name} {now[name]:.3g} (was {start[name]:.3g})" for name in now)
        return (
            f"The features have collapsed: {values} in {self._bad} measurements in a row. "
            "Try a smaller optim.lr or a longer schedule.warmup, and look at the task's pictures."
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON can hold it."""
        return {"start": self._start, "bad": self._bad}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self._start = None if state["start"] is None else dict(state["start"])
        self._bad = int(state["bad"])


class Probe:
    """Measures a backbone on pictures that were read once and stay the same over the whole run."""

    def __init__(
        self,
        settings: ProbeSettings,
        train: Samples,
        image_size: int,
        labeled: Samples | None = None,
        val: Samples | None = None,
        detection: DetectionProbe | None = None,
        readings: Sequence[Reading] = (PLAIN, PLAIN, PLAIN),
    ) -> None:
        """Read the pictures; `readings` are those of train, labeled and val."""
        self._detection = detection
        side = settings.image_size or image_size
        # What kNN and linear probe are measured on, as a hash.
        sets = [None if one is None else one.fingerprint for one in (train, labeled, val)]
        self._labels = sha256_text(map(repr, (settings.pictures, side, *sets)))
        self._batch_size = settings.batch_size
        self._train = read_unlabeled(train, settings.pictures, side, readings[0])
        self._bank: Pictures | None = None
        self._queries: Pictures | None = None
        self._classes: list[str] = []
        if labeled is not None:
            pixels, names = read_labeled(labeled, settings.pictures, side, readings[1])
            self._classes = sorted(set(names))
            if len(self._classes) < 2:
                raise DataError(
                    f"{labeled.name} has one class only ({self._classes[0]}); a probe needs two."
                )
            bank = Pictures(pixels, number(names, self._classes, labeled.name))
            if val is None:
                self._bank, self._queries = hold_out(bank, labeled.name)
            else:
                pixels, names = read_labeled(val, settings.pictures, side, readings[2])
                self._bank = bank
                self._queries = Pictures(pixels, number(names, self._classes, val.name))

    def measured_on(self, indicator: str) -> str:
        """Return a hash of the pictures, labels and settings that `indicator` is measured with."""
        if indicator == "probe/ap":
            return "" if self._detection is None else self._detection.fingerprint
        return self._labels

    def measure(self, backbone: Backbone, neck: nn.Module | None = None) -> dict[str, float]:
        """Return probe/spread and probe/rankme; probe/knn and probe/linear where labels are.

        And probe/ap and probe/ap50 where boxes are, through the neck where there is one.
        """
        with fresh_statistics(backbone, self._train.pixels, self._batch_size):
            measured = self._measure(backbone)
        if self._detection is not None:
            measured |= self._detection.measure(backbone, neck)
        return measured

    def _measure(self, backbone: Backbone) -> dict[str, float]:
        health = Health.of(features(backbone, self._train.pixels, self._batch_size))
        measured = {
            "probe/spread": health.spread,
            "probe/rankme": health.rankme,
            "probe/rankme_centred": health.rankme_centred,
        }
        if self._bank is not None and self._queries is not None:
            bank = _finite(features(backbone, self._bank.pixels, self._batch_size))
            queries = _finite(features(backbone, self._queries.pixels, self._batch_size))
            known, wanted = self._bank.labels, self._queries.labels
            assert known is not None and wanted is not None
            classes = len(self._classes)
            measured["probe/knn"] = balanced_accuracy(knn(bank, known, queries, classes), wanted)
            measured["probe/linear"] = balanced_accuracy(
                linear(bank, known, queries, classes), wanted
            )
        return measured


def open_probe(
    settings: ProbeSettings,
    train: Samples,
    image_size: int,
    *,
    cache: Path,
    cache_bytes: int,
    reading: Reading = PLAIN,
) -> Probe:
    """Open what the settings name and build the probe; `scenes` are the drawn objects.

    All pictures are read as those of training, but for the drawn ones.

    Raises DataError where labels are missing, or of one class only.
    """
    opened: list[Samples | None] = []
    # The drawn objects have a val split of their own.
    val = "scenes" if settings.labeled == "scenes" and settings.val is None else settings.val
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split, path in zip(splits, (settings.labeled, val), strict=True):
        if path == "scenes":
            opened.append(open_scene_objects(cache, split))
        elif path is not None:
            key = "probe.labeled" if split == "train" else "probe.val"
            opened.append(open_samples(path, cache=cache, cache_bytes=cache_bytes, key=key))
        else:
            opened.append(None)
    try:
        detection = open_detection_probe(
            settings.detection, cache=cache, cache_bytes=cache_bytes, reading=reading
        )
        labeled, held_out = opened
        theirs = (PLAIN if path == "scenes" else reading for path in (settings.labeled, val))
        return Probe(settings, train, image_size, labeled, held_out, detection, (reading, *theirs))
    finally:
        for samples in opened:
            if samples is not None:
                samples.close()


def features(
    backbone: Backbone, pixels: Tensor, batch_size: int, levels: Sequence[str] = ("c5",)
) -> Tensor:
    """Return C5, averaged over the picture, of uint8 pictures N H W 3: float32 (N, D) on the CPU.

    Several `levels` are each brought to length 1 and joined. Runs in eval mode, without gradients
    and in float32; every module gets its mode back.
    """
    device = next(backbone.parameters()).device
    pooled = []
    with evaluating(backbone), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for batch in torch.split(pixels, batch_size):
            images = normalise(batch.to(device), backbone.mean, backbone.std)
            pyramid = backbone(images)._asdict()
            means = [pyramid[level].float().mean(dim=(2, 3)) for level in levels]
            if len(levels) > 1:
                means = [functional.normalize(mean, dim=1) for mean in means]
            pooled.append(torch.cat(means, dim=1).cpu())
    return torch.cat(pooled)


def fresh_statistics(
    backbone: Backbone, pixels: Tensor, batch_size: int
) -> AbstractContextManager[None]:
    """Give every BatchNorm the statistics of these pictures; the old ones come back at the end."""
    return measured_statistics(backbone, lambda: features(backbone, pixels, batch_size))


def knn(bank: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Vote with the nearest of the bank by cosine, weighted by exp(cosine / TEMPERATURE): (Q,)."""
    columns = functional.normalize(bank, dim=1).T.contiguous()
    neighbours = min(NEIGHBOURS, len(bank))
    # In pieces: each is compared with the whole bank at once.
    votes = [
        knn_predict(piece, columns, labels, classes, knn_k=neighbours, knn_t=TEMPERATURE)[:, 0]
        for piece in torch.split(functional.normalize(queries, dim=1), 1024)
    ]
    return torch.cat(votes)


def linear(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, l2: float = 0.01) -> Tensor:
    """Classify by multinomial logistic regression on standardised features: (Q,).

    Every class weighs the same in the loss. L-BFGS from zero in float64, so there is no chance in
    it; `l2` times half the squared weights is added to the mean loss.
    """
    mean, std = bank.double().mean(dim=0), bank.double().std(dim=0).clamp_min(1e-12)
    known, asked = (bank.double() - mean) / std, (queries.double() - mean) / std
    counts = torch.bincount(labels, minlength=classes).double()
    balance = torch.where(counts > 0, 1 / counts.clamp_min(1), 0.0)
    weight = torch.zeros(known.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(known @ weight + bias, labels, weight=balance)
        value = value + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return (asked @ weight + bias).argmax(dim=1)


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes in `labels` of the share that was found."""
    present = torch.unique(labels)
    recalls = [(predicted[labels == one] == one).double().mean() for one in present]
    return float(torch.stack(recalls).mean())


def _finite(values: Tensor) -> Tensor:
    """Diverged features count as zeros: the accuracy is then that of chance, and not an error."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
