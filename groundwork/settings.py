"""The sections of a recipe that both stages share: data, budget, optimiser, schedule, and so on.

They are here, and not beside the code that uses them, because nothing in this file imports torch or
timm: a mistake in a recipe is told in under a second, before the libraries are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from groundwork.config import Section
from groundwork.data.reading import Reading
from groundwork.errors import UsageError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=32, multiple_of=32)]  # of what a network sees, in pixels
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimiser(Section):
    """How parameters move. Norms, biases and other one-dimensional parameters never decay.

    `eps` None is the optimiser's own: 1e-8 (AdamW), 1e-6 (LAMB), 1e-8 in LARS's denominator.
    """

    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    # The peak: the schedule multiplies it.
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    # SGD and LARS.
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    # AdamW and LAMB.
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float | None = Field(default=None, gt=0)
    # LARS: eta, the trust coefficient (arXiv 1708.03888, section 5).
    trust: float = Field(default=1e-3, gt=0)
    # The largest norm of the whole gradient; None leaves it as it is.
    clip: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Optimiser:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Schedule(Section):
    """The learning rate over its peak, as a function of progress (groundwork/schedule.py)."""

    name: Literal["cosine", "one_cycle", "cyclical", "constant"] = "cosine"
    # Share of the budget with a linear rise from 0 (one_cycle and triangles rise by themselves).
    warmup: Fraction = 0.05
    # The multiplier at the end, and at the low points of cycles.
    final: Fraction = 0.0
    # one_cycle: share of the budget that rises, and the multiplier at the very start.
    rise: float = Field(default=0.3, gt=0, lt=1)
    start: Fraction = 0.04
    # cyclical: how many cycles, their form, and each cycle's peak over the one before it.
    cycles: int = Field(default=4, ge=1)
    form: Literal["triangular", "cosine"] = "triangular"
    decay: float = Field(default=1.0, gt=0, le=1)


class Ema(Section):
    """A moving average of the weights of everything that is kept (groundwork/ema.py)."""

    enabled: bool = False
    decay: Beta = 0.9998
    # The decay starts at 0 and grows as 1 - (1 + step) ** (-2 / 3) up to `decay`.
    warmup: bool = True


class DetectionProbeSettings(Section):
    """Labeled boxes that a tiny head learns on frozen features (pretrain/detection_probe.py)."""

    data: str | None = None  # a labeled data set's root; null: no detection probe
    train_list: str | None = None  # a file of picture names, one a line
    val: str | None = None  # null: the validation split of the root of data
    # Share of the labeled pictures held out where there is no such split, as fine-tuning does.
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pictures: int = Field(default=64, ge=1)  # of training and of validation, at most
    image_size: Side = 256
    batch_size: int = Field(default=8, ge=1)
    steps: int = Field(default=150, ge=1)  # of the head


class ProbeSettings(Section):
    """What is measured while a run learns, how often and on which pictures (pretrain/probe.py)."""

    # Measured at the start and then this many times, evenly over the budget; 0 is never.
    times: int = Field(default=5, ge=0)
    # How many pictures of each set, at most; they are held in memory at image_size. Under 32 the
    # rank of healthy features is too small to tell a collapse.
    pictures: int = Field(default=512, ge=32)
    # The side the probe sees; None is the side of training. A multiple of 32.
    image_size: Side | None = None
    batch_size: int = Field(default=64, ge=1)
    # Labeled pictures (class folders, shards with .cls members, or `scenes`) for kNN and linear
    # probe; without `val` every fifth picture of a class is held out.
    labeled: str | None = None
    val: str | None = None
    detection: DetectionProbeSettings = DetectionProbeSettings()
    # Which weights are kept: the last, or those with the best measurement of one of these. auto: ap
    # where detection.data is set and there are times, else the last.
    select: Literal["auto", "last", "ap", "linear", "knn"] = "auto"
    # Measurements without a better one after which the run ends; null: it never does.
    patience: int | None = Field(default=None, ge=1)
    # The run ends with exit code 5 when the features collapse; else it is told and goes on.
    stop_on_collapse: bool = False

    @model_validator(mode="after")
    def _what_it_needs_is_there(self) -> ProbeSettings:
        if self.val is not None and self.labeled is None:
            raise ValueError("val needs labeled: the pictures that val is compared with")
        if self.select == "ap" and self.detection.data is None:
            raise ValueError("select=ap needs boxes: set detection.data")
        wanted = self.detection
        if wanted.data is None and (wanted.val or wanted.train_list or wanted.holdout):
            raise ValueError("detection.val, train_list and holdout need detection.data")
        if self.select in ("linear", "knn") and self.labeled is None:
            raise ValueError(f"select={self.select} needs labels: set labeled")
        if self.patience is not None and self.indicator() is None:
            raise ValueError("patience needs select: what a better measurement is")
        if self.select not in ("auto", "last") and self.times == 0:
            raise ValueError("select needs times above 0: nothing is measured")
        return self

    def indicator(self) -> str | None:
        """Return the metric by which weights are chosen, or None for the last ones."""
        if self.select == "auto":
            measured = self.detection.data is not None and self.times > 0
            return "probe/ap" if measured else None
        return None if self.select == "last" else f"probe/{self.select}"


class Data(Section):
    """Where the pictures come from, and how they are read."""

    train: str | tuple[str, ...] = "scenes"  # a folder, shards, a URL, a list of these, or scenes
    workers: Annotated[int, Field(ge=0)] | None = None  # of each rank; null: cores less one, max 8
    # Samples are shuffled inside a window of so many shards, or up to twice as many at the end of a
    # set; readers keep 40 open.
    window_shards: Annotated[int, Field(ge=1, le=20)] = 16
    cache: str | None = None  # drawn scenes, remote shards, foreign indexes, regions
    cache_gb: Annotated[float, Field(gt=0)] = 50.0  # bound of the local copy of remote shards
    on_error: Literal["skip", "raise"] = "skip"  # what an unreadable picture does
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # of the pictures of the data
    max_pixels: Count = 100_000_000  # a larger picture is refused before it is decoded
    # The bands that are read, from 1: red, green and blue, or the channels of a network that has as
    # many as there are bands here; null: the format's own colours.
    bands: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    # Stored values that become 0 and 255; null: by the format's rules (groundwork/data/bands.py).
    value_range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _reading_is_a_mapping(self) -> Self:
        try:
            reading = self.reading()
        except UsageError as error:
            raise ValueError(str(error)) from error
        trained = (self.train,) if isinstance(self.train, str) else self.train
        if "scenes" in trained and reading.stated:
            raise ValueError("scenes are drawn in colours: bands and value_range are of data.train")
        return self

    def reading(self) -> Reading:
        """Return how pictures are read."""
        return Reading(self.max_pixels, self.bands, self.value_range)

    def cache_folder(self) -> Path:
        """Return the folder for what is made or fetched once."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.cache or f"{base}/groundwork").expanduser()

    def cache_bytes(self) -> int:
        """Return how many bytes of remote shards may lie in that folder."""
        return int(self.cache_gb * 1e9)


class BackboneKeys(Section):
    """Which backbone is trained: yolo12n, s, m, l, x, or timm/<model>."""

    name: str = "yolo12n"


class Budget(Section):
    """How long to train: exactly one of these is set. Progress runs from 0 to 1 over it."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Count | None = None
    samples: Count | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None  # of the loop's wall clock

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        chosen = [name for name, value in self if value is not None]
        if len(chosen) != 1:
            raise ValueError(
                "set exactly one of budget.epochs, budget.steps, budget.samples, budget.minutes, "
                f"not {len(chosen)}"
            )
        return self


class CheckpointKeys(Section):
    """How often a checkpoint is saved, and how many of the newest are kept."""

    every_steps: Count = 500
    keep: Count = 3


class Log(Section):
    """How often metrics are written; trackers are Accelerate's (tensorboard, wandb, ...)."""

    every_steps: Count = 10
    samples: bool = False  # also write which pictures each rank saw, to samples-<rank>.jsonl
    trackers: tuple[str, ...] = ()


class Guard(Section):
    """What happens when gradients are not finite: the step is skipped on every rank.

    After `skips` in a row the last checkpoint's weights come back with the learning rate halved
    and the stream goes on behind the bad batches; after `rollbacks` of these the run ends (5).
    """

    skips: Count = 10
    rollbacks: Annotated[int, Field(ge=0)] = 2


class RunKeys(Section):
    """How a network is trained, whatever it learns: what the recipes of both stages have."""

    backbone: BackboneKeys = BackboneKeys()
    batch_size: Count = 16  # of one optimiser step, over all ranks
    accumulate: Count = 1  # forwards for one optimiser step
    budget: Budget = Budget(epochs=100)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # compiles the networks in place
    # BatchNorm's statistics are of all ranks on CUDA. It waits for the others at every layer: with
    # a dozen pictures or more a process, try without.
    sync_batchnorm: bool = True
    threads: Count | None = None  # of a one-process CPU run; null: all allowed cores
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint: CheckpointKeys = CheckpointKeys()
    log: Log = Log()
    guard: Guard = Guard()
    report: bool = True  # report.html at the end

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}"
            )
        return self


# A later layer that sets one budget replaces the earlier layer's.
WHOLE = frozenset({"budget"})
