"""The learning rate over its peak, as a pure function of progress from 0 to 1.

A budget may be steps, epochs, samples or minutes; a schedule sees only the share of it that is
spent, so that nothing has to be stored, and a resumed run is where it was.

Sources: cosine with linear warmup (arXiv 1608.03983, equation 5, one cycle; warmup arXiv
1706.02677, section 2.2); one cycle (arXiv 1708.07120, section 3); cyclical: triangles (arXiv
1506.01186, section 3) or cosine with warm restarts (arXiv 1608.03983).

Differs from the papers:
- one_cycle rises and falls along half cosines in two phases, as torch's OneCycleLR does by
  default; the paper has straight lines and a third phase for the last, smallest values, and moves
  momentum against the learning rate, which is constant here.
- Cosine restarts have cycles of one length (T_mult = 1).
- Triangles start and end at `final`, which the paper calls base_lr over max_lr.
"""

from __future__ import annotations

import math

from groundwork.settings import Schedule


def multiplier(schedule: Schedule, progress: float) -> float:
    """Return the learning rate over its peak, 0 to 1; progress outside 0 to 1 is clamped."""
    progress = min(max(progress, 0.0), 1.0)
    if schedule.name == "one_cycle":
        return _one_cycle(schedule, progress)
    if schedule.name == "cyclical" and schedule.form == "triangular":
        return _triangles(schedule, progress)
    if progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.name == "constant" or schedule.warmup == 1:
        return 1.0
    rest = (progress - schedule.warmup) / (1 - schedule.warmup)
    if schedule.name == "cosine":
        return _half_cosine(1.0, schedule.final, rest)
    cycle, within = _cycle(schedule, rest)
    return _half_cosine(_peak(schedule, cycle), schedule.final, within)


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _one_cycle(schedule: Schedule, progress: float) -> float:
    if progress < schedule.rise:
        return _half_cosine(schedule.start, 1.0, progress / schedule.rise)
    return _half_cosine(1.0, schedule.final, (progress - schedule.rise) / (1 - schedule.rise))


def _triangles(schedule: Schedule, progress: float) -> float:
    cycle, within = _cycle(schedule, progress)
    height = _peak(schedule, cycle) - schedule.final
    return schedule.final + height * (1 - abs(2 * within - 1))


def _cycle(schedule: Schedule, share: float) -> tuple[int, float]:
    """Return which cycle this is, and the share of it that is over; the end belongs to the last."""
    cycle = min(int(share * schedule.cycles), schedule.cycles - 1)
    return cycle, min(share * schedule.cycles - cycle, 1.0)


def _peak(schedule: Schedule, cycle: int) -> float:
    """Return the top of a cycle: what lies above `final` shrinks by `decay` from cycle to cycle."""
    return schedule.final + (1 - schedule.final) * schedule.decay**cycle
