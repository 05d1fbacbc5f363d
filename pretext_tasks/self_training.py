"""Self-training: the whole detector learns what one that was trained on the few labels finds.

A detector that a few labels have trained is right about most of what it is sure of. What it finds
in unlabeled pictures, above a score, are labels for a student that sees the pictures in other
colours, and whose fine-tuning on the true labels starts from there. Sources: Noisy Student (Xie et
al. 2020, arXiv 1911.04252); for detectors STAC (Sohn et al. 2020, arXiv 2005.04757).

`task.weights` is the detector's file, which fine-tuning wrote (detector.safetensors); where the
teacher looks at views, its weights are in every checkpoint. Teacher and student see the same view,
the teacher in its own colours and, with `task.teacher_size`, larger: a detector of small pictures
finds more in larger ones, and the student is taught to find it in small ones. With
`task.find=picture` the teacher looks once at every whole picture instead, several times where
`task.looks` says so, and what it finds is remembered (pretext_tasks/found_once.py); then the file
itself must be there when a run goes on. What the teacher finds without being sure is neither taught
as an object nor as background. The student learns backbone, neck and all of the head, the class
branch too: its classes are the detector's, and the product's file says them. So the file is a
detector's as it is.

Differs from the papers: labels are made as the views are, or as the pictures are first seen (not
before training), and true labels have no part: they are fine-tuning's. Scores are a dense
detector's, which are lower than those of STAC's two stages: the threshold is ours. Efficient
Teacher (Xu et al. 2023, arXiv 2302.07577) has a place for uncertain labels too; it teaches their
scores softly, here the points inside them are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from finetune.assign import Targets
from finetune.augment import Rule
from finetune.detector import Detections, Limits, suppress
from finetune.weights import about_detector, detector_from_file
from groundwork import colour
from groundwork.backbones.contract import Backbone
from groundwork.colour import Colour
from groundwork.config import starting_from
from groundwork.data.reading import Reading
from groundwork.errors import CheckpointError, UsageError
from pretext_tasks.contract import StepOutput, Views
from pretext_tasks.crops import AreaRange, check_side
from pretext_tasks.found_once import MOST, FoundOnce, Teacher, digest_of
from pretext_tasks.one_view import OneView, OneViewKeys
from pretext_tasks.through_neck import Letter
from pretext_tasks.whole_detector import COLOUR, WholeDetector

Share = Annotated[float, Field(gt=0, lt=1)]


class SelfTrainingConfig(OneViewKeys):
    """Ours, but for the loss's weights, which are the second stage's defaults."""

    weights: str | None = None  # detector.safetensors of the teacher; must be named
    score: Share | dict[str, Share] = 0.4  # what is found with less is not taught; or by class
    unsure: Share = 0.1  # and down to this not denied either; score: all of it is background
    iou: Share = 0.5  # of two boxes of a class with more in common the better one is taught
    neck: Letter | Literal["auto"] = "auto"  # width of the student's neck and head
    crop_scale: AreaRange = (0.5, 1.0)  # part of the picture's area
    # Where the teacher looks: at every view, on the device; or once at each whole picture, on the
    # data workers' CPUs, which is for pictures that are seen in many epochs.
    find: Literal["view", "picture"] = "view"
    # 2: also mirrored; 4: also upside down; 8: also turned by quarters; of pictures alone.
    looks: Literal[1, 2, 4, 8] = 1
    # Side in pixels of what the teacher sees; None: the student's, image_size. Of whole pictures it
    # is the longer side; None: as in the teacher's training.
    teacher_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    colour: Annotated[Colour, starting_from(COLOUR)] = COLOUR
    boxes: Literal["score", "equal", "class"] = "class"  # as the second stage's loss.boxes

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        scores = self.score if isinstance(self.score, dict) else {"score": self.score}
        for name, score in scores.items():
            if self.unsure > score:
                raise ValueError(f"unsure={self.unsure:g} is above {name}={score:g}")
        if self.looks > 1 and self.find == "view":
            raise ValueError("looks is about find=picture: a view is looked at once")
        return self


class SelfTraining(WholeDetector):
    """The student, and the teacher, which does not change."""

    Config = SelfTrainingConfig
    metadata_bytes: Tensor
    teacher_digest: Tensor

    def __init__(self, backbone: Backbone, config: SelfTrainingConfig) -> None:
        if config.weights is None:
            raise UsageError(_NO_WEIGHTS)
        try:
            teacher, about = detector_from_file(Path(config.weights))
        except CheckpointError as error:
            raise CheckpointError(f"task.weights={config.weights}: {error}") from error
        if teacher.backbone.in_channels != backbone.in_channels:
            raise UsageError(
                f"task.weights={config.weights} sees {teacher.backbone.in_channels} channels and "
                f"the pictures have {backbone.in_channels}: name as many data.bands."
            )
        super().__init__(backbone, config.neck, teacher.head.num_classes, config.boxes)
        self.config = config
        # Where pictures are looked at once, the data workers have it.
        self.teacher = None if config.find == "picture" else teacher.requires_grad_(False)
        if self.teacher is None:
            digest = list(digest_of(Path(config.weights)))
            self.register_buffer("teacher_digest", torch.tensor(digest, dtype=torch.uint8))
        self._about = about
        _by_class(config, about.names)  # a wrong name is told here
        # With the teacher's weights, in every checkpoint: the file may be another on a resume.
        written = json.dumps({"names": about.names, "image_size": about.image_size}).encode()
        self.register_buffer("metadata_bytes", torch.tensor(list(written), dtype=torch.uint8))
        self._scores: Tensor | None = None  # of each class, from which on it is taught
        self._last_told: dict[str, Tensor] = {}  # of the last batch that had a sure box

    @classmethod
    def views(cls, config: Any, image_size: int) -> Views:
        """Return the maker of the view. Raises UsageError where no detector's file is named."""
        check_side(image_size, "self-training needs")
        if config.weights is None:
            raise UsageError(_NO_WEIGHTS)
        if config.find == "view":
            return OneView(config, image_size, config.teacher_size)
        file, side = Path(config.weights), config.teacher_size
        there = file.is_file()  # not yet, maybe, where a recipe is only checked: __init__ wants it
        if side is None:
            side = detector_from_file(file)[1].image_size if there else image_size
        digest = digest_of(file) if there else b""
        teacher = Teacher(file.absolute(), digest, side, config.looks, config.unsure, config.iou)
        return FoundOnce(OneView(config, image_size), teacher)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        """Raise CheckpointError where the teacher's file is not the one that a run began with."""
        began = state_dict.get(f"{prefix}teacher_digest")
        if (
            self.teacher is None
            and began is not None
            and bytes(began.tolist()) != bytes(self.teacher_digest.tolist())
        ):
            raise CheckpointError(
                f"task.weights={self.config.weights} is another file than the one that this run "
                "began with: put that one back, or start a new run."
            )
        about = state_dict.get(f"{prefix}metadata_bytes")
        if about is not None:  # its length is that of a text
            self.metadata_bytes = about.to(self.metadata_bytes.device, copy=True)
            self._scores = None
        super()._load_from_state_dict(state_dict, prefix, *others, **named)

    def train(self, mode: bool = True) -> Self:
        """Leave the teacher in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the detection loss.

        Metrics: its parts; boxes of a view in the mean, their mean score, and the middle side of
        them in pixels (the root of their area; fine-tuning's boxes should be about as large). Score
        and side are of the last batch that had a box.
        """
        found = self._found(batch)
        surely = [self._sure(one) for one in found]
        sure = [_those(one, which) for one, which in zip(found, surely, strict=True)]
        unsure = [_those(one, ~which) for one, which in zip(found, surely, strict=True)]
        output = self.detection_loss(
            self.coloured(batch["view"], batch["colour"]), _targets(sure), _targets(unsure)
        )
        scores = torch.cat([one.scores for one in sure])
        boxes = torch.cat([one.boxes for one in sure])
        if len(scores):
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            self._last_told = {"taught_score": scores.mean(), "side": areas.sqrt().median()}
        nothing = scores.new_zeros(())
        metrics = {
            "taught": scores.new_tensor(len(scores) / len(sure)),
            **{name: self._last_told.get(name, nothing) for name in ("taught_score", "side")},
        }
        return StepOutput(output.loss, {**output.metrics, **metrics})

    def product(self) -> dict[str, nn.Module]:
        """Return the student: backbone, neck and head."""
        return {**super().product(), "head": self.head}

    def metadata(self) -> dict[str, Any]:
        """Say which classes the head is for, and all else that makes the file a detector's.

        Its image_size is the teacher's, of whole pictures: views are parts of one.
        """
        about = json.loads(bytes(self.metadata_bytes.tolist()))
        return about_detector(self.product(), about["names"], about["image_size"])

    def warnings(self, image_size: int, reading: Reading) -> list[str]:
        """Say where the teacher was trained to see something else."""
        about, file = self._about, self.config.weights
        found = []
        side, key = image_size, "image_size"
        if self.config.teacher_size is not None:
            side, key = self.config.teacher_size, "task.teacher_size"
        elif self.config.find == "picture":
            side = about.image_size
        if not 0.5 <= side / about.image_size <= 2:
            found.append(
                f"task.weights={file} was trained at {about.image_size} px and sees "
                f"{self.config.find}s of {key}={side}: things look larger or smaller than it "
                "knows them."
            )
        if about.reading().mapping != reading.mapping:
            found.append(
                "task.weights={} was trained with data.bands={} and data.value_range={}, here they "
                "are {} and {}: it sees other colours than it knows.".format(
                    file, *about.reading().mapping, *reading.mapping
                )
            )
        return found

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the student sees, with the teacher's boxes, and with what it finds, drawn."""
        wanted = [one.boxes[self._sure(one)] for one in self._found(batch)]
        taught, found = self.with_boxes(self.coloured(batch["view"], batch["colour"]), wanted)
        return {"taught": taught, "found": found}

    @torch.no_grad()
    def _found(self, batch: dict[str, Tensor]) -> list[Detections]:
        """Return what the teacher finds, its boxes within the student's view, down to `unsure`."""
        if self.teacher is None:
            entries = ("boxes", "scores", "classes")
            return [
                Detections(*(batch[entry][row, :count] for entry in entries))
                for row, count in enumerate(batch["count"].tolist())
            ]
        backbone, config = self.teacher.backbone, self.config
        view = batch["view" if config.teacher_size is None else "teacher_view"]
        image = colour.normalise(view, backbone.mean, backbone.std)
        side, own = image.shape[2], batch["view"].shape[1]
        raw = self.teacher(image)
        # Autocast would have boxes in half precision: half a pixel at stride 8.
        with torch.autocast(image.device.type, enabled=False):
            boxes, scores = self.teacher.head.read(raw, side, side)
        limits = Limits(config.unsure, config.iou, MOST)
        found = [
            suppress(*one, limits)
            for one in zip(boxes.clamp(0, side) * (own / side), scores, strict=True)
        ]
        # Of what lies outside the view the view's edge is left.
        return [_those(one, _least_side(one) > 0) for one in found]

    def _sure(self, found: Detections) -> Tensor:
        """Tell which boxes are taught; what is too small for the student is not denied either."""
        if self._scores is None:  # of the checkpoint's classes, whose order may be another
            names = json.loads(bytes(self.metadata_bytes.tolist()))["names"]
            self._scores = found.scores.new_tensor(_by_class(self.config, names))
        enough = found.scores >= self._scores[found.classes]
        return enough & (_least_side(found) >= Rule().min_side)


def _by_class(config: SelfTrainingConfig, names: Sequence[str]) -> list[float]:
    """Return the score of each of the teacher's classes."""
    given = config.score
    if not isinstance(given, dict):
        return [given] * len(names)
    if sorted(given) != sorted(names):
        raise UsageError(
            f"task.score names {', '.join(given)}; the classes of task.weights={config.weights} "
            f"are {', '.join(names)}: give each of them a score, or one number for all."
        )
    return [given[name] for name in names]


def _those(found: Detections, which: Tensor) -> Detections:
    rows = which.nonzero().squeeze(1)  # a mask would wait for a GPU at every use
    return Detections(found.boxes[rows], found.scores[rows], found.classes[rows])


def _least_side(found: Detections) -> Tensor:
    return (found.boxes[:, 2:] - found.boxes[:, :2]).amin(1)


def _targets(found: Sequence[Detections]) -> Targets:
    """Put the boxes of a batch's pictures one after the other."""
    counts = torch.tensor([len(one.boxes) for one in found], device=found[0].boxes.device)
    return Targets(
        torch.arange(len(found), device=counts.device).repeat_interleave(counts),
        torch.cat([one.boxes for one in found]),
        torch.cat([one.classes for one in found]),
    )


_NO_WEIGHTS = (
    "task.weights is not set (of several tasks: task.self_training.weights): name the "
    "detector.safetensors that fine-tuning on your labels wrote; what it finds is what is taught."
)
