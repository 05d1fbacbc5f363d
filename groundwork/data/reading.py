"""How stored pictures become bytes, as a person states it; groundwork/data/bands.py does it.

Nothing here imports numpy: a recipe's mistake is told at once.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass

from groundwork.errors import UsageError

MAX_PIXELS = 100_000_000

Bands = tuple[int, ...]
Range = tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """How stored pictures become bytes of `channels` channels, see groundwork/data/bands.py.

    Pictures of `max_pixels` or more are refused. Raises UsageError for bands or a range that say
    nothing.
    """

    max_pixels: int = MAX_PIXELS
    bands: Bands | None = None
    value_range: Range | None = None

    def __post_init__(self) -> None:
        if self.bands is not None and (not self.bands or min(self.bands) < 1):
            raise UsageError(f"bands={list(self.bands)} must be numbers from 1 up.")
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UsageError(
                    f"value_range={list(self.value_range)} must be two numbers, the smaller first."
                )

    @property
    def channels(self) -> int:
        """How many channels a picture has once it is read: one for each band, RGB without."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def mapping(self) -> tuple[Bands | None, Range | None]:
        """What is stated but for the size."""
        return self.bands, self.value_range

    @property
    def stated(self) -> bool:
        """Whether anything but the size is stated."""
        return self.mapping != (None, None)


PLAIN = Reading()


def add_flags(parser: ArgumentParser, otherwise: str, more: str = "") -> None:
    """Add --bands and --value-range to a command; `otherwise` says what holds without them."""
    parser.add_argument(
        "--bands",
        metavar="R,G,B",
        type=_numbers,
        help="the bands that are red, green and blue, from 1, joined by commas; or as many as the "
        f"network has channels (default: {otherwise})",
    )
    parser.add_argument(
        "--value-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        help=f"stored values that become 0 and 255 (default: {otherwise}){more}",
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not like 3,2,1") from None


def stated_by(
    bands: Sequence[int] | None,
    value_range: Sequence[float] | None,
    otherwise: Reading = PLAIN,
) -> Reading:
    """Return a reading by what flags or a file say, and where they say nothing by `otherwise`.

    Raises UsageError for bands or a range that say nothing.
    """
    return Reading(
        otherwise.max_pixels,
        otherwise.bands if bands is None else tuple(bands),
        otherwise.value_range if value_range is None else tuple(value_range),  # type: ignore[arg-type]
    )
