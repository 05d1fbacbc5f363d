"""Will detection gain? A tiny detection head on frozen features, trained for seconds, scored by AP.

kNN and rank look at pooled C5; a detector reads all three levels, cell by cell. So a small labeled
set is shown once to the frozen backbone (and to the neck, where one is trained), every level is
standardised channel by channel, and an anchor-free head learns on the stored maps for a fixed
number of steps, with the second stage's own loss; AP and AP50 are of held-out pictures, by the
second stage's own scoring. LOG.md says how well that ranks checkpoints.

Everything is fixed: pictures, their order in the batches, and the head's start. Pictures are not
augmented: features are computed once, which is what makes it quick.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.assign import Targets
from finetune.augment.letterbox import letterboxed
from finetune.detector import Detector, suppress
from finetune.head import DetectionHead
from finetune.losses import DetectionLoss
from finetune.metrics import Found, Truth, score
from finetune.recipe import LossKeys
from groundwork.backbones.contract import Backbone
from groundwork.data.annotations import Annotations
from groundwork.data.decode import naming, open_picture
from groundwork.data.label_table import HeldOut
from groundwork.data.labels import LabeledSamples, has_split, open_labeled, training_split
from groundwork.data.reach import read_patiently
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.shard_index import sha256_text
from groundwork.data.shards import evenly
from groundwork.errors import DataError, UsageError
from groundwork.modes import evaluating
from groundwork.necks.yolo12 import Features
from groundwork.precise_batchnorm import measured_statistics
from groundwork.settings import DetectionProbeSettings
from pretrain.feature_maps import feature_maps

logger = logging.getLogger(__name__)

_AT_ONCE = 16  # pictures of a forward
_RATE, _CLIP = 2e-3, 10.0  # of the head's AdamW, which falls to 0 along a cosine


@dataclass(frozen=True)
class LabeledPictures:
    """Square frames, uint8 N side side 3, and what is labeled in them, in their pixels."""

    pixels: Tensor
    truth: tuple[Truth, ...]

    def targets(self, rows: list[int], crowd: bool = False) -> Targets:
        """Return the boxes of some pictures, as the loss wants them, without crowds; or crowds."""
        chosen = [self.truth[row].annotations for row in rows]
        wanted = [one.crowd == crowd for one in chosen]
        counts = torch.tensor([int(keep.sum()) for keep in wanted])
        boxes = [one.boxes[keep] for one, keep in zip(chosen, wanted, strict=True)]
        classes = [one.classes[keep] for one, keep in zip(chosen, wanted, strict=True)]
        return Targets(
            torch.repeat_interleave(torch.arange(len(rows)), counts),
            torch.from_numpy(np.concatenate(boxes)),
            torch.from_numpy(np.concatenate(classes)),
        )


class _Standardised(nn.Module):
    """Stored maps with mean 0 and deviation 1 in every channel, over the training pictures."""

    def __init__(self, maps: Features) -> None:
        super().__init__()
        self.moments = [
            torch.var_mean(level, dim=(0, 2, 3), correction=0, keepdim=True) for level in maps
        ]

    def forward(self, maps: Features) -> Features:
        """Return maps of the same shapes."""
        p3, p4, p5 = (
            (level - mean) / (variance + 1e-6).sqrt()
            for level, (variance, mean) in zip(maps, self.moments, strict=True)
        )
        return Features(p3, p4, p5)


class DetectionProbe:
    """Measures a backbone by what a small head finds with it; pictures are read once."""

    def __init__(
        self, settings: DetectionProbeSettings, train: LabeledSamples, val: LabeledSamples
    ) -> None:
        if train.names != val.names:
            raise DataError(
                f"The classes of {train.name} and {val.name} differ: the detection probe needs the "
                "same names in the same order."
            )
        self._settings = settings
        how = settings.model_dump_json(exclude={"data", "train_list", "val", "holdout"})
        self.fingerprint = sha256_text([how, train.fingerprint, val.fingerprint])
        self._names = train.names
        self._train = read_pictures(train, settings.pictures, settings.image_size)
        self._val = read_pictures(val, settings.pictures, settings.image_size)
        if not any(len(one.annotations.boxes) for one in self._val.truth):
            logger.warning(
                "No picture of %s that the detection probe looks at has a box: probe/ap will be 0. "
                "Name others by probe.detection.val, or raise probe.detection.pictures or holdout.",
                val.name,
            )

    def measure(self, backbone: Backbone, neck: nn.Module | None = None) -> dict[str, float]:
        """Return probe/ap and probe/ap50 of held-out pictures, from 0 to 1.

        BatchNorm has the statistics of the labeled pictures meanwhile. Weights, buffers, training
        modes and the state of random numbers are left as they are.
        """
        parts = nn.ModuleList([backbone] if neck is None else [backbone, neck])
        shown = self._train.pixels
        device = next(backbone.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with (
                evaluating(parts),
                measured_statistics(parts, lambda: feature_maps(backbone, neck, shown)),
            ):
                return self._measure(backbone, neck, device)

    def _measure(
        self, backbone: Backbone, neck: nn.Module | None, device: torch.device
    ) -> dict[str, float]:
        maps = feature_maps(backbone, neck, self._train.pixels)
        if not all(torch.isfinite(level).all() for level in maps):
            return {"probe/ap": 0.0, "probe/ap50": 0.0}
        channels = [level.shape[1] for level in maps]
        head = DetectionHead(channels, len(self._names)).to(device)
        standardise = _Standardised(maps)
        detector = Detector(backbone, nn.Identity(), head)
        self._learn(detector, standardise(maps))
        del maps  # of large pictures they are gigabytes
        maps = standardise(feature_maps(backbone, neck, self._val.pixels))
        found = self._find(detector, maps)
        results = score(found, self._val.truth, self._names)
        return {"probe/ap": results.ap, "probe/ap50": results.ap50}

    def _learn(self, detector: Detector, maps: Features) -> None:
        """Train the head on stored maps."""
        settings = self._settings
        head, loss = detector.head, DetectionLoss(LossKeys())
        device = maps.p3.device
        head.train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        size = (settings.image_size, settings.image_size)
        order = np.random.Generator(np.random.Philox(key=[0, 0]))
        count = len(self._train.truth)
        with torch.enable_grad():
            for _ in range(settings.steps):
                rows = order.permutation(count)[: settings.batch_size].tolist()
                targets, crowds = (
                    Targets(*(part.to(device) for part in self._train.targets(rows, crowd)))
                    for crowd in (False, True)
                )
                raw = head(Features(*(level[rows] for level in maps)))
                loss(detector, raw, size, targets, ignored=crowds).total.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(head.parameters(), _CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
        head.eval()

    @torch.no_grad()
    def _find(self, detector: Detector, maps: Features) -> list[Found]:
        side = self._settings.image_size
        found = []
        for first in range(0, len(maps.p3), _AT_ONCE):
            raw = detector.head(Features(*(level[first : first + _AT_ONCE] for level in maps)))
            for boxes, scores in zip(*detector.head.read(raw, side, side), strict=True):
                kept = suppress(boxes.clamp(0, side), scores)
                found.append(Found(*(part.cpu().numpy() for part in kept)))
        return found


def read_pictures(labeled: LabeledSamples, limit: int, side: int) -> LabeledPictures:
    """Read up to `limit` pictures, evenly over all, into frames of side x side.

    Unreadable ones are left out, as in training, and told. Raises DataError where none is left.
    """
    frames, truths = [], []
    for shard, index in evenly(labeled.shard_sizes, limit):
        sample = read_patiently(labeled, shard, index)
        try:
            with naming(f"{sample.key} of {sample.source}"):
                picture = open_picture(sample.image, labeled.reading)
                its = labeled.annotations(sample, picture)
                frame, geometry = letterboxed(picture, (side, side))
        except DataError as error:
            logger.warning("The detection probe leaves out a picture. %s", error)
            continue
        frames.append(frame)
        boxes = geometry.apply(its.boxes)
        truths.append(Truth(Annotations(boxes, its.classes, its.crowd), side, side))
    if not frames:
        raise DataError(f"{labeled.name} has no readable pictures for the detection probe.")
    return LabeledPictures(torch.from_numpy(np.stack(frames)), tuple(truths))


def open_detection_probe(
    settings: DetectionProbeSettings,
    *,
    cache: Path,
    cache_bytes: int,
    reading: Reading = PLAIN,
) -> DetectionProbe | None:
    """Open what the settings name; None where they name nothing.

    Raises DataError where the set has no validation split and neither `val` nor `holdout` makes
    one, and where it has splits but no train split; UsageError for `holdout` besides a split.
    """
    if settings.data is None:
        return None
    names = None if settings.train_list is None else Path(settings.train_list)
    split = training_split(settings.data, "the detection probe (probe.detection.data)")
    own = settings.val is not None or has_split(settings.data, "val")
    if own and settings.holdout:
        raise UsageError(
            f"probe.detection.holdout={settings.holdout:g}: there are pictures for validation, "
            f"{settings.val or settings.data}: take it away."
        )
    if not own and not settings.holdout:
        raise DataError(
            f"{settings.data} has no validation split for the detection probe: give one as "
            "probe.detection.val, or hold out a part of it by probe.detection.holdout=0.2."
        )
    where: dict[str, Any] = {"cache": cache, "cache_bytes": cache_bytes, "reading": reading}

    def part(*, kept: bool) -> LabeledSamples:
        held_out = HeldOut(settings.holdout, kept) if settings.holdout else None
        return open_labeled(settings.data or "", split, names_in=names, held_out=held_out, **where)

    train = part(kept=False)
    val = (
        part(kept=True)
        if settings.holdout
        else open_labeled(settings.val or settings.data, "val", **where)
    )
    try:
        return DetectionProbe(settings, train, val)
    finally:
        train.close()
        val.close()
