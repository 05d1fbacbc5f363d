"""How stored pictures become RGB bytes, as a person states it; groundwork/data/bands.py does it.

Nothing here imports numpy: a recipe's mistake is told at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundwork.errors import UsageError

MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Reading:
    """How stored pictures become RGB, see groundwork/data/bands.py.

    Pictures of `max_pixels` or more are refused. Raises UsageError for bands or a range that say
    nothing.
    """

    max_pixels: int = MAX_PIXELS
    bands: tuple[int, int, int] | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bands is not None and (len(self.bands) != 3 or min(self.bands) < 1):
            raise UsageError(f"bands={list(self.bands)} must be three numbers from 1 up.")
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UsageError(
                    f"value_range={list(self.value_range)} must be two numbers, the smaller first."
                )

    @property
    def stated(self) -> bool:
        """Whether anything but the size is stated."""
        return self.bands is not None or self.value_range is not None


PLAIN = Reading()
