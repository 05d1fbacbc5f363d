"""The sections of a recipe that both stages share: optimiser, schedule, moving average, probe.

They are here, and not beside the code that uses them, because nothing in this file imports torch or
timm: a mistake in a recipe is told in under a second, before the libraries are loaded.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from groundwork.config import Section

Fraction = Annotated[float, Field(ge=0, le=1)]
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


class ProbeSettings(Section):
    """What is measured while a run learns, how often and on which pictures (pretrain/probe.py)."""

    # Measured at the start and then this many times, evenly over the budget; 0 is never.
    times: int = Field(default=5, ge=0)
    # How many pictures of each set, at most; they are held in memory at image_size. Under 32 the
    # rank of healthy features is too small to tell a collapse.
    pictures: int = Field(default=512, ge=32)
    # The side the probe sees; None is the side of training. A multiple of 32.
    image_size: int | None = Field(default=None, ge=32, multiple_of=32)
    batch_size: int = Field(default=64, ge=1)
    # Labeled pictures (class folders, shards with .cls members, or `scenes`) for kNN and linear
    # probe; without `val` every fifth picture of a class is held out.
    labeled: str | None = None
    val: str | None = None
    # The run ends with exit code 5 when the features collapse; else it is told and goes on.
    stop_on_collapse: bool = False

    @model_validator(mode="after")
    def _val_needs_labeled(self) -> ProbeSettings:
        if self.val is not None and self.labeled is None:
            raise ValueError("val needs labeled: the pictures that val is compared with")
        return self
