"""How a run ended, as far as what it logged tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lightning_gradguard.core.detectors import MAD_TO_STD
from lightning_gradguard.report.analysis.run_log import RunLog, Series

#: A loss that lost this share of what it began with has been learned from.
LEARNED = 0.2
#: A change of this many times the noise is no noise.
CLEAR = 5.0
#: Steps by which what is told of a step, a stop among it, may come late.
LATE = 1


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        steps: How many it made, as far as they were logged.
        survived: How many of them ahead of the first from which on all was nonfinite; `None` if nothing
            finite was logged and the first steps were not logged.
        died_at: That step; `None` if there is none.
        was_stopped: Whether the suite gave it up.
        first_loss: Median of the first tenth; `None` if unknown.
        final_loss: Median of the last tenth; NaN if the run died, `None` if unknown.
        has_learned: Whether the loss has fallen by a fifth at least; where it may be negative, by more than
            its noise.
    """

    steps: int
    survived: int | None
    died_at: int | None
    was_stopped: bool
    first_loss: float | None
    final_loss: float | None
    has_learned: bool


def outcome_of(log: RunLog) -> Outcome:
    """How the run ended.

    Args:
        log: What it logged.
    """
    everything = [s for s in (log.loss, *(g.total for g in log.gradients), log.skips) if len(s)]
    steps = max((_steps_made(series) for series in everything), default=0)
    last = max((series.steps[-1] for series in everything), default=0)
    # a stop that steps follow was that of a run which has been resumed
    was_stopped = any(
        (i.kind == "training_diverged" or i.action == "stopped") and last <= i.step + LATE
        for i in log.incidents
    )
    died_at = _died_at(log)
    survived: int | None = steps if everything else None
    if died_at is not None:
        alive = [s for series in everything for s, _ in series.finite() if s < died_at]
        is_from_start = min(s.steps[0] - _first_number(s) for s in everything) == 0
        survived = steps - (last - max(alive)) if alive else 0 if is_from_start else None
    losses = [value for _, value in log.loss.finite()]
    first, final = ends(losses) if losses else (None, None)
    if died_at is not None:
        final = math.nan if len(log.loss) else None
    return Outcome(steps, survived, died_at, was_stopped, first, final, _has_learned(losses, first, final))


def ends(values: Sequence[float], share: int = 10) -> tuple[float, float]:
    """Medians of the first and of the last tenth, or of another share."""
    n = max(len(values) // share, 1)
    return median(values[:n]), median(values[-n:])


def noise_of(values: Sequence[float]) -> float:
    """Standard deviation from one value to the next, whatever the trend.

    Example:
        >>> noise_of([1.0, 2.0, 3.0]) < noise_of([1.0, 9.0, 3.0])
        True
    """
    changes = [abs(b - a) for a, b in zip(values, values[1:], strict=False)]
    return MAD_TO_STD * median(changes) / math.sqrt(2) if changes else math.inf


def _has_learned(losses: Sequence[float], first: float | None, final: float | None) -> bool:
    if first is None or final is None or math.isnan(final):
        return False
    if min(losses) > 0:
        return first - final > LEARNED * first
    # there is no zero that it falls towards
    return first - final > CLEAR * noise_of(losses)


def _died_at(log: RunLog) -> int | None:
    if len(log.skips):
        return None  # while there is somebody who skips nonfinite steps, one at the end is no death
    totals = [g.total for g in log.gradients if len(g.total)]
    pulses = [log.loss] if len(log.loss) else totals
    found = [_end_of_life(series) for series in pulses]
    if not found or None in found:
        return None
    if not len(log.loss) and all(_is_overflow(series) for series in totals):
        return None
    return min(end for end in (*found, *map(_end_of_life, totals)) if end is not None)


def _is_overflow(totals: Series) -> bool:
    """Whether only the last norm is infinite: a loss scaler of float16 skips such a step."""
    values = totals.values
    return len(values) > 1 and math.isinf(values[-1]) and math.isfinite(values[-2])


def _steps_made(series: Series) -> int:
    return series.steps[-1] + 1 - _first_number(series)


def _first_number(series: Series) -> int:
    """What the first step is called: whose first is as large as the distance to the next counts from one."""
    steps = series.steps
    return int(len(steps) > 1 and steps[0] == steps[1] - steps[0])


def _end_of_life(series: Series) -> int | None:
    """The step from which on every value is nonfinite."""
    if not len(series) or math.isfinite(series.values[-1]):
        return None
    last = max((i for i, value in enumerate(series.values) if math.isfinite(value)), default=-1)
    return series.steps[last + 1]
