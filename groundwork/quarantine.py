"""Pictures that could not be read: listed, counted, and bounded in number."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import torch
import torch.distributed

from groundwork.data.loader import Batch
from groundwork.errors import DataError
from groundwork.files import Journal

logger = logging.getLogger(__name__)

NAME = "quarantine.jsonl"  # of a run folder


class Quarantine:
    """Unreadable pictures, of all ranks: listed in quarantine.jsonl, bounded in number.

    `before` is the folder of the run that is gone on with: what was bad there is known, unless it
    was so much that it ended that run, after which it is counted anew.
    """

    def __init__(
        self,
        folder: Path,
        pictures: int,
        max_bad_fraction: float,
        *,
        before: Path | None = None,
        main: bool = True,
    ) -> None:
        self.path = folder / NAME
        self._list = Journal(self.path)
        self.pictures = pictures
        self.allowed = max(1, int(pictures * max_bad_fraction)) if max_bad_fraction else 0
        known = {} if before is None else _read(before / NAME)
        # So many ended that run with a sentence: who goes on with it has done what it says.
        ended = len(known) > self.allowed
        if ended:
            known = {}
        self.seen: set[tuple[str, str]] = set(known)
        self.fresh = False  # whether this rank has met some that the others may not know
        if main and (ended or before is None or before.resolve() != folder.resolve()):
            self.path.unlink(missing_ok=True)  # of a start that failed
            if known:
                self.path.write_text("".join(known.values()), encoding="utf-8")

    @property
    def bad(self) -> int:
        """How many different pictures were unreadable."""
        return len(self.seen)

    def note(self, batch: Batch) -> None:
        """Write down the pictures of a batch that had to be replaced."""
        fresh = [one for one in batch.replaced if (one.source, one.key) not in self.seen]
        if fresh:
            self.fresh = True
            self.seen.update((one.source, one.key) for one in fresh)
            self._list.add(json.dumps(dataclasses.asdict(one)) for one in fresh)

    def check(self, group: torch.distributed.ProcessGroup | None = None, news: bool = True) -> None:
        """Raise DataError when more pictures were unreadable than the recipe allows.

        `group` is of all ranks, None for one process; every rank calls this, with the same `news`:
        whether one of them has met a picture that the others may not know.
        """
        if group is not None and news:
            world = torch.distributed.get_world_size(group)
            all_seen: list[set[tuple[str, str]]] = [set()] * world
            torch.distributed.all_gather_object(all_seen, self.seen, group=group)
            self.seen = set().union(*all_seen)
        self.fresh = False
        if self.bad > self.allowed:
            raise DataError(
                f"{self.bad} of {self.pictures} pictures are unreadable, more than "
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


def _read(path: Path) -> dict[tuple[str, str], str]:
    """Return the lines of a list by source and key; the last one may have been cut by a kill."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            one = json.loads(line)
            found[one["source"], one["key"]] = f"{line}\n"
        except (ValueError, KeyError, TypeError):
            continue
    return found
