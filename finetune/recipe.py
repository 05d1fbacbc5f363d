"""Every key of a fine-tuning recipe with its default, and how the three layers become one.

Defaults here < a recipe file (only what differs) < key=value on the command line. Nothing here
imports torch, so that a mistake is told before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from finetune.augment.settings import Augment
from groundwork.config import (
    Section,
    changes_on_resume,
    find_recipe,
    merge,
    parse_overrides,
    read_yaml,
    starting_from,
    validate,
)
from groundwork.settings import (
    WHOLE,
    Count,
    Data,
    Ema,
    Fraction,
    Optimiser,
    RunKeys,
    Schedule,
    Side,
)

Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


# Where a detector's recipe differs from pretraining's; one key given leaves the others as here.
SCHEDULE = Schedule(final=0.01)
EMA = Ema(enabled=True, decay=0.9998)


class LabeledData(Data):
    """Where labeled pictures come from; `train` is a data set's root, which supplies its splits."""

    train: str = "scenes"
    train_list: str | None = None  # a file of picture names, one a line: the label fraction
    val: str | None = None  # null: the validation split of the root of data.train, if it has one
    test: str | None = None  # null: the test split of that root, if it has one; scored at the end
    # Share of the labeled pictures that is kept for validation where no set is: by their names, so
    # the same ones in every run. Pictures of one scene or patient want sets of their own.
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DetectorKeys(Section):
    """What is built on the backbone."""

    width: Literal["n", "s", "m", "l", "x"] | None = None  # of neck and head; null: the backbone's
    objectness: bool = False  # a third branch in the head
    # What of --init is taken: all that it holds, backbone and neck, or the backbone.
    take: Literal["all", "neck", "backbone"] = "all"


class Optim(Optimiser):
    """The optimiser; `lr` is that of neck and head."""

    backbone_lr: Weight = 1.0  # times lr, for the backbone
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # a layer's rate over the next one's
    clip: float | None = Field(default=10.0, gt=0)


class Freeze(Section):
    """What keeps its weights and BatchNorm statistics at first, and for how long."""

    backbone: Fraction = 0.0  # share of the budget during which the backbone is frozen
    neck: Fraction = 0.0


class ClassificationKeys(Section):
    """finetune/losses.py says which loss is which."""

    kind: Literal["bce", "focal", "varifocal", "quality_focal"] = "bce"
    weight: Weight = 0.5
    gamma: Weight = 2.0
    alpha: Fraction | None = None  # null: 0.25 for focal (RetinaNet), 0.75 for varifocal
    smoothing: Fraction = 0.0  # label smoothing's epsilon


class LocalisationKeys(Section):
    """The overlap loss of boxes."""

    kind: Literal["iou", "giou", "diou", "ciou"] = "ciou"
    weight: Weight = 7.5


class PartKeys(Section):
    """A part of the loss that has a weight and no choices."""

    weight: Weight = 1.0


class PenaltyKeys(Section):
    """The penalty on weights: beside weight decay, which the optimiser has."""

    l2: Weight = 0.0
    l1_scales: Weight = 0.0  # of BatchNorm


class AssignKeys(Section):
    """Task-aligned assignment (finetune/assign.py)."""

    topk: Count = 10
    alpha: Weight = 0.5
    beta: Weight = 6.0


class LossKeys(Section):
    """The loss: weights of its parts and their kinds. The weights are those of the YOLO family."""

    classification: ClassificationKeys = ClassificationKeys()
    localisation: LocalisationKeys = LocalisationKeys()
    distribution: PartKeys = PartKeys(weight=1.5)
    objectness: PartKeys = PartKeys(weight=1.0)
    penalty: PenaltyKeys = PenaltyKeys()
    assign: AssignKeys = AssignKeys()
    # What a box weighs in localisation and distribution: its points' scores within its class, with
    # each class by its number of boxes; its points' scores alone; or all boxes the same.
    boxes: Literal["class", "score", "equal"] = "class"


class Regularize(Section):
    """Noise inside the network while it trains (finetune/regularize.py); 0 is none."""

    dropblock: Fraction = 0.0  # probability of DropBlock, on P3 to P5
    block: Count = 7  # cells of a side of its blocks, at most half of a map's side
    spatial_dropout: Fraction = 0.0  # probability of dropping a channel of P3 to P5
    stochastic_depth: Fraction = 0.0  # of a residual branch of the backbone, rising with depth


class Phase(Section):
    """What differs until a share of the budget is spent; null is the recipe's own."""

    until: Annotated[float, Field(gt=0, le=1)]
    batch_size: Count | None = None
    image_sizes: tuple[Side, ...] | None = None


class EvalKeys(Section):
    """When validation is scored, and what it decides."""

    times: Annotated[int, Field(ge=0)] = 10  # evenly over the budget; 0 is never
    batch_size: Count = 16
    score: Fraction = 0.001  # boxes below are left out
    iou: Fraction = 0.7  # of non-maximum suppression
    most: Count = 300  # boxes of one picture
    select: Literal["best", "last"] = "best"  # which weights become detector.safetensors
    test: bool = True  # the test split is scored at the end, where there is one
    patience: Count | None = None  # scorings without a better AP after which training stops
    patience_from: Fraction = 0.5  # share of the budget before which patience does not count


class Recipe(RunKeys):
    """A fine-tuning recipe, resolved: what runs is what is written in the run folder."""

    detector: DetectorKeys = DetectorKeys()
    data: LabeledData = LabeledData()
    image_size: Side = 640  # longer side of what the network sees, px
    image_sizes: tuple[Side, ...] = ()  # multi-scale: every batch draws one; empty: image_size
    phases: tuple[Phase, ...] = ()
    optim: Optim = Optim()
    schedule: Annotated[Schedule, starting_from(SCHEDULE)] = SCHEDULE
    ema: Annotated[Ema, starting_from(EMA)] = EMA
    ema_from: Fraction = 0.0  # share of the budget before which the average just follows
    # BatchNorm of a pretrained start: measured anew on the labeled pictures before the first
    # step, taken from the file, or (the backbone's) taken from the file and never changed, which
    # wants a backbone_lr of a tenth (LOG.md: at 1 it diverged).
    batchnorm: Literal["measure", "file", "freeze"] = "measure"
    freeze: Freeze = Freeze()
    loss: LossKeys = LossKeys()
    augment: Augment = Augment()
    regularize: Regularize = Regularize()
    eval: EvalKeys = EvalKeys()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for phase in self.phases:
            if phase.batch_size is not None and phase.batch_size % self.accumulate:
                raise ValueError(
                    f"phases: batch_size={phase.batch_size} is not divisible by "
                    f"accumulate={self.accumulate}"
                )
        if self.freeze.neck > self.freeze.backbone:
            raise ValueError(
                f"freeze.neck={self.freeze.neck} is longer than freeze.backbone="
                f"{self.freeze.backbone}: a neck is frozen only with its backbone"
            )
        if self.eval.patience is not None and not self.eval.times:
            raise ValueError("eval.patience counts scorings, and eval.times=0 asks for none")
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)):
            raise ValueError("phases: each `until` must be larger than the one before it")
        return self


def resolve(recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """Lay the layers over each other; `recipe` is a path or a name of recipes/finetune.

    Raises UsageError for anything that is not a known key.
    """
    values = read_yaml(find_recipe(recipe or "default", "finetune"))
    return build(merge(values, parse_overrides(overrides), WHOLE))


def build(values: dict[str, Any]) -> Recipe:
    """Validate a nested dict as a Recipe; raises UsageError."""
    return validate(Recipe, values)


# Keys that make another model or another stream: a resumed run must not change them.
FIXED = (
    "backbone", "detector", "seed", "image_size", "optim.name", "data.window_shards", "data.bands",
    "data.value_range", "ema.",
    "batchnorm", "freeze", "phases", "augment",
)  # fmt: skip


def refuse_changes(old: Recipe, new: Recipe) -> list[str]:
    """Return a line for every harmless change on resume; raises UsageError for another kind."""
    return changes_on_resume(old, new, FIXED)
