"""What a checkpoint holds of a run, the same for both stages: where it stands, and what it trains.

The loops own their networks and their clock; this is how they are put aside, put back, and taken
back after gradients that were not finite.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from groundwork import checkpoint as checkpoints
from groundwork.checkpoint import Checkpoint
from groundwork.config import Section
from groundwork.ema import Ema
from groundwork.errors import CheckpointError, DivergedError
from groundwork.optim import state_from_tensors, state_to_tensors

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands; all of it is in every checkpoint."""

    step: int = 0
    samples: int = 0  # consumed of the endless stream
    seconds: float = 0.0  # of the loop's wall clock
    skipped: int = 0  # steps without an update, in all
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    replaced: int = 0  # samples whose picture was unreadable, of all ranks
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics
    best: float = -1.0  # of the measurements that choose the weights
    measured_on: str = ""  # what they were made on, as a hash; empty: a checkpoint does not say
    worse: int = 0  # measurements since, as far as patience counts them


class Pictures(Protocol):
    """What a checkpoint says of the data, so that other data is refused on resume."""

    @property
    def name(self) -> str:
        """What a person calls the data."""

    @property
    def fingerprint(self) -> str:
        """A hash over what is in the data."""

    def __len__(self) -> int:
        """How many pictures there are."""


def copy_all(into: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy tensors into others of their shapes; of a network without buffers there are none."""
    # Of one dtype at a time: a mixture is copied one by one.
    for dtype in {one.dtype for one in into}:
        chosen = [index for index, one in enumerate(into) if one.dtype == dtype]
        torch._foreach_copy_([into[i] for i in chosen], [tensors[i] for i in chosen])


@dataclass(frozen=True)
class Trained:
    """A network and all that moves with it; `name` is its group of a checkpoint's tensors."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    scaler: torch.amp.GradScaler | None  # of fp16

    def save(
        self, folder: Path, position: Position, recipe: Section, data: Pictures, keep: int
    ) -> None:
        """Write a checkpoint into `folder` and keep the newest `keep`. Raises CheckpointError."""
        tensors, details = state_to_tensors(self.optimizer)
        groups = {self.name: dict(self.network.state_dict()), "optimizer": tensors}
        if self.ema is not None:
            groups["ema"] = self.ema.state()
        documents = {
            "state": dataclasses.asdict(position),
            "optimizer": details,
            "recipe": recipe.model_dump(mode="json"),
            "data": {
                "name": data.name,
                "pictures": len(data),
                "fingerprint": data.fingerprint,
            },
        }
        if self.scaler is not None:
            documents["scaler"] = self.scaler.state_dict()
        checkpoints.save(folder, position.step, groups, documents, keep)

    def restore(self, saved: Checkpoint) -> None:
        """Take what a checkpoint holds. Raises CheckpointError where it is of another network."""
        try:
            self.network.load_state_dict(saved.tensors[self.name], strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{saved.path} is of another model than the recipe's: {error}"
            ) from error
        state_from_tensors(self.optimizer, saved.tensors["optimizer"], saved.documents["optimizer"])
        if self.ema is not None:
            self.ema.load(saved.tensors["ema"])
        if self.scaler is not None and "scaler" in saved.documents:
            self.scaler.load_state_dict(saved.documents["scaler"])

    def roll_back(self, saved: Checkpoint | None, position: Position, most: int) -> None:
        """Take a checkpoint's weights again, and go on behind the bad batches at half the rate.

        Raises DivergedError where there is none, or `most` rollbacks have been.
        """
        if saved is None or position.rollbacks >= most:
            raise DivergedError(
                f"Gradients were not finite for {position.skipped_in_a_row} steps in a row until "
                f"step {position.step}, after {position.rollbacks} rollback(s). Lower optim.lr, "
                "set optim.clip, or look at the pictures of the skipped samples."
            )
        self.restore(saved)
        position.rollbacks += 1
        position.skipped_in_a_row = 0
        logger.warning(
            "Rolled back to the weights of step %d; the learning rate is halved.", saved.step
        )
