"""Pictures that could not be read: listed, counted, and bounded in number."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from groundwork.data.loader import Batch
from groundwork.errors import DataError

logger = logging.getLogger(__name__)


class Quarantine:
    """Unreadable pictures that this rank met: listed in quarantine.jsonl, bounded in number."""

    def __init__(self, folder: Path, pictures: int, max_bad_fraction: float) -> None:
        self.path = folder / "quarantine.jsonl"
        self.pictures = pictures
        self.allowed = max(1, int(pictures * max_bad_fraction)) if max_bad_fraction else 0
        self.seen: set[tuple[str, str]] = set()

    @property
    def bad(self) -> int:
        """How many different pictures were unreadable."""
        return len(self.seen)

    def note(self, batch: Batch) -> None:
        """Write down the pictures of a batch that had to be replaced."""
        fresh = [one for one in batch.replaced if (one.source, one.key) not in self.seen]
        if fresh:
            self.seen.update((one.source, one.key) for one in fresh)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in fresh)

    def check(self, bad: int) -> None:
        """Raise DataError when `bad` different pictures are more than the recipe allows."""
        if bad > self.allowed:
            raise DataError(
                f"{bad} of {self.pictures} pictures are unreadable, more than "
                f"data.max_bad_fraction allows; they are listed in {self.path}. Mend or remove "
                "them, or raise data.max_bad_fraction."
            )

    def tell(self, replaced: int) -> None:
        """Say how many pictures were unreadable, where there were any."""
        if self.seen:
            logger.warning(
                "%d pictures were unreadable and replaced %d times by their neighbours: see %s.",
                self.bad, replaced, self.path,
            )  # fmt: skip
