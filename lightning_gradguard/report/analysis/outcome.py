"""The end of a run (its length, its loss, the step at which it failed), and symptoms over the whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lightning_gradguard.core.detectors import MAD_TO_STD
from lightning_gradguard.report.analysis.run_log import MAX_DELAY, RunLog, Series

SymptomSeverity = Literal["fatal", "serious", "handled", "minor"]

#: Logged steps below which a run without symptoms is too short for a verdict.
MIN_POINTS = 10
#: A run has learned if its loss fell by this share.
LEARNED = 0.2
#: Changes of the loss up to this many times its noise are noise.
NOISE_FACTOR = 5.0
#: Relative updates below it do not change a weight: float32 resolves about 1.2e-7.
STAGNANT = 1e-7


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Args:
        steps: Number of steps, as far as they were logged.
        survived: Number of steps before the first from which on all values were nonfinite; `None` if nothing
            finite was logged and the first steps were not logged.
        failed_at: That step; `None` if there is none.
        was_stopped: True if the suite stopped the run, or `EarlyStopping` at a nonfinite metric.
        first_loss: Median of the first tenth; `None` if unknown.
        final_loss: Median of the last tenth; NaN if the run failed, `None` if unknown.
        has_learned: True if the loss fell by at least a fifth, and by more than its noise; by the
            latter alone if it may be negative.
        has_improved: True if it has learned, or if the loss after the first intervention is below that
            before; `None` if no loss was logged, or too few for a verdict, or of a resumed run, which may
            have learned before, whose loss has not risen.
    """

    steps: int
    survived: int | None
    failed_at: int | None
    was_stopped: bool
    first_loss: float | None
    final_loss: float | None
    has_learned: bool
    has_improved: bool | None


@dataclass(frozen=True)
class RunSymptom:
    """A symptom over the whole run.

    Args:
        kind: Its name, as `core.incidents.title` takes it.
        severity: `"fatal"`: it ended the run. `"serious"`: it lasted to the end, or the loss was no better
            after the interventions. `"handled"`: a callback intervened, and the loss fell afterwards, or in
            a resumed run did not rise. `"minor"`: the run learned without an intervention.
        since: The first step that shows it.
        evidence: The measurement in one sentence.
        value: The measured number.
        where: Names of the parameters or modules with the strongest symptom, the worst first.
        remedies: What to do, the likeliest first; those of its kind if empty.
        cause: What an examination, or the diagnosis, has found; empty if unknown.
        is_tried: True if the remedies were tried in the run: initializers on a batch, or a learning rate.
    """

    kind: str
    severity: SymptomSeverity
    since: int
    evidence: str
    value: float
    where: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    cause: str = ""
    is_tried: bool = False


def outcome_of(log: RunLog) -> Outcome:
    """Returns the end of a run."""
    everything = [s for s in (log.loss, *(g.total for g in log.gradients), log.skips) if len(s)]
    steps = max((series.steps[-1] + 1 - _first_number(series) for series in everything), default=0)
    last = max((series.steps[-1] for series in everything), default=0)
    # a stop followed by further steps was that of a run which has been resumed
    was_stopped = any(
        (i.kind == "training_diverged" or i.action == "stopped") and last <= i.step + MAX_DELAY
        for i in log.incidents
    )
    failed_at = _failed_at(log)
    survived: int | None = steps if everything else None
    if failed_at is not None:
        finite = [s for series in everything for s, _ in series.finite() if s < failed_at]
        is_from_start = min(s.steps[0] - _first_number(s) for s in everything) == 0
        survived = steps - (last - max(finite)) if finite else 0 if is_from_start else None
    losses = [value for _, value in log.loss.finite()]
    first, final = ends(losses) if losses else (None, None)
    if failed_at is not None:
        final = math.nan if len(log.loss) else None
    has_learned = _has_learned(losses, first, final)
    has_improved = (has_learned or _fell_after_intervention(log)) if losses else None
    if has_improved is False and len(losses) < MIN_POINTS:
        has_improved = None
    if has_improved is False and _is_resumed(everything) and not _falls(losses[::-1], share=3):
        has_improved = None
    return Outcome(steps, survived, failed_at, was_stopped, first, final, has_learned, has_improved)


def ends(values: Sequence[float], share: int = 10) -> tuple[float, float]:
    """Returns the medians of the first and of the last tenth, or of another share."""
    n = max(len(values) // share, 1)
    return median(values[:n]), median(values[-n:])


def noise_of(values: Sequence[float]) -> float:
    """Returns the standard deviation from one value to the next, independent of the trend.

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
        return first - final > LEARNED * first and any(_falls(losses, share) for share in (10, 3))
    # a loss that may be negative has no zero to measure its fall against
    return first - final > NOISE_FACTOR * noise_of(losses)


def _falls(losses: Sequence[float], share: int) -> bool:
    """Returns whether the median of the last part is below that of the first by more than their noise."""
    first, final = ends(losses, share)
    return first - final > NOISE_FACTOR * noise_of(losses) / math.sqrt(max(len(losses) // share, 1))


def _fell_after_intervention(log: RunLog) -> bool:
    """True if the median loss after the first intervention is lower than before it."""
    acted = [i.step for i in log.incidents if i.action not in ("none", "stopped")]
    counted = [s for series in (log.skips, log.rollbacks) for s, n in series.finite() if n > 0]
    first = min(acted or counted, default=None)
    if first is None:
        return False
    losses = log.loss.finite()
    before, after = ([v for s, v in losses if (s < first) is early] for early in (True, False))
    return bool(before and after) and median(after[len(after) // 2 :]) < median(before)


def _failed_at(log: RunLog) -> int | None:
    if len(log.skips):
        return None  # where nonfinite steps are skipped, one at the end is no failure
    totals = [g.total for g in log.gradients if len(g.total)]
    found = [_nonfinite_from(series) for series in ([log.loss] if len(log.loss) else totals)]
    if not found or None in found:
        return None
    if not len(log.loss) and all(_is_overflow(series) for series in totals):
        return None
    return min(step for step in (*found, *map(_nonfinite_from, totals)) if step is not None)


def _is_overflow(totals: Series) -> bool:
    """True if only the last norm is infinite: a loss scaler of float16 skips such a step."""
    values = totals.values
    return len(values) > 1 and math.isinf(values[-1]) and math.isfinite(values[-2])


def _is_resumed(everything: Sequence[Series]) -> bool:
    """True if the first logged step is further from step 0 than logged steps are from each other."""
    return all(len(s) > 1 and s.steps[0] > s.steps[1] - s.steps[0] for s in everything)


def _first_number(series: Series) -> int:
    """Returns 1 if the first step is as large as the distance to the next, as in runs that count from one."""
    steps = series.steps
    return int(len(steps) > 1 and steps[0] == steps[1] - steps[0])


def _nonfinite_from(series: Series) -> int | None:
    """Returns the step from which on every value is nonfinite."""
    if not len(series) or math.isfinite(series.values[-1]):
        return None
    last = max((i for i, value in enumerate(series.values) if math.isfinite(value)), default=-1)
    return series.steps[last + 1]
