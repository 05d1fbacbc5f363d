"""Views with what a detector finds in their whole picture, which is looked for once.

The teacher of self-training may look at every view (pretext_tasks/self_training.py), or once at a
picture, as evaluation does: whole, its longer side `task.teacher_size`. Then what it finds is
remembered (groundwork/data/memory.py) and every view takes along what it shows of it. A look costs
nothing more in the next epoch, so there may be several, mirrored and turned, whose mean is better
(finetune/looks.py). The detector runs in the data workers, on their CPUs.

A box of which a view shows less than fine-tuning would keep (finetune.augment.Rule) has score 0
there: it is neither taught nor denied.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.augment import Rule
from finetune.detector import Limits
from finetune.looks import looking
from finetune.predict import Predictor
from finetune.weights import detector_from_file
from groundwork.data.decode import Picture
from groundwork.data.memory import Memory
from groundwork.errors import CheckpointError
from pretext_tasks.crops import in_view
from pretext_tasks.one_view import OneView

MOST = 1000  # boxes of a picture: what is found and left out would be taught as background
_VERSION = 1  # of what is found in the same picture by the same detector


@dataclass(frozen=True)
class Teacher:
    """A detector's file, and how its detector looks at a whole picture.

    `image_size` is the longer side of what it sees; boxes below `score` are not wanted, and of two
    of one class with more than `iou` in common the better one is.
    """

    file: Path
    digest: bytes  # of the file, as it was when training began
    image_size: int
    looks: int
    score: float
    iou: float

    def signature(self) -> bytes:
        """Return bytes that change where the same picture may give other boxes."""
        how = f"{self.image_size} {self.looks} {self.score!r} {self.iou!r}"
        return f"found {_VERSION}, torch {torch.__version__}: {how} ".encode() + self.digest

    def find(self, picture: Picture) -> npt.NDArray[np.float32]:
        """Find what is in a picture: K 6, corners as shares of its sides, score and class."""
        found = _predictor(self).find(picture)
        sides = np.array([picture.width, picture.height] * 2, np.float32)
        return np.concatenate(
            [
                found.boxes.numpy() / sides,
                found.scores.numpy()[:, None],
                found.classes.numpy()[:, None].astype(np.float32),
            ],
            1,
        ).astype(np.float32)


def digest_of(file: Path) -> bytes:
    """Return 16 bytes that tell a file from others. Raises CheckpointError where it is missing."""
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=1)  # one for each data worker
def _predictor(teacher: Teacher) -> Predictor:
    detector, _ = detector_from_file(teacher.file)
    if digest_of(teacher.file) != teacher.digest:
        raise CheckpointError(
            f"task.weights={teacher.file} is another file than the one that training began with: "
            "put that one back."
        )
    limits = Limits(teacher.score, teacher.iou, MOST)
    finder = looking(detector.to(memory_format=torch.channels_last), teacher.looks, limits)
    return Predictor(finder, teacher.image_size, limits)


@dataclass(frozen=True)
class FoundOnce:
    """Cuts one view, and takes what the teacher found in the whole picture along."""

    one_view: OneView
    teacher: Teacher
    memory: Memory | None = field(default=None, repr=False, compare=False)

    def __call__(
        self, picture: Picture, generator: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Return view and colour, as OneView, and boxes, scores, classes and count.

        Of boxes (float32 MOST 4, in the view's pixels), scores and classes the first `count` were
        found; the rest are zeros.
        """
        box, turn = self.one_view.place(picture, generator)
        found = self.found(picture)
        shares, shown = in_view(found[:, :4], picture.width, picture.height, box, turn)
        there = (shares[:, 2:] - shares[:, :2]).min(1) > 0
        count = int(there.sum())
        boxes, scores = np.zeros((MOST, 4), np.float32), np.zeros(MOST, np.float32)
        classes = np.zeros(MOST, np.int64)
        boxes[:count] = shares[there] * self.one_view.image_size
        scores[:count] = np.where(shown >= Rule().min_visible, found[:, 4], 0)[there]
        classes[:count] = found[there, 5]
        return {
            **self.one_view.at(picture, box, turn, generator),
            "boxes": boxes,
            "scores": scores,
            "classes": classes,
            "count": np.array(count),
        }

    def with_memory(self, memory: Memory) -> FoundOnce:
        """Return these views, with a memory for what is found."""
        return replace(self, memory=memory)

    def found(self, picture: Picture) -> npt.NDArray[np.float32]:
        """Return what the teacher finds in a picture, as Teacher.find, K at most MOST."""
        if self.memory is None:
            return self.teacher.find(picture)
        key = picture.digest(also=self.teacher.signature())
        kept = self.memory.remembered(
            key, lambda: self.teacher.find(picture).astype("<f4").tobytes()
        )
        return np.frombuffer(kept, "<f4").reshape(-1, 6)
