"""Symptoms in the loss: divergence, a stuck loss, isolated nonfinite values, spikes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from lightning_gradguard.core.detectors import (
    ADVERSARIAL_DIVERGENCE_RATIO,
    MIN_LOSS_RATIO,
    DivergenceDetector,
    SpikeDetector,
    best_constant,
)
from lightning_gradguard.report.analysis.outcome import (
    MIN_POINTS,
    NOISE_FACTOR,
    STAGNANT,
    Outcome,
    RunSymptom,
    ends,
    noise_of,
)
from lightning_gradguard.report.analysis.run_log import RunLog

#: A loss is stuck within this share of its start, over this many logged values and steps.
STUCK, STUCK_POINTS, STUCK_STEPS = 0.02, 30, 100
#: A loss has diverged if it rises again by this share of its fall.
UNLEARNED = 0.5
#: Two levels differ if they do by this many times the noise of their medians.
MEDIAN_NOISE_FACTOR = 4.5
#: Smallest number of values for the median of a level.
MIN_WINDOW = 5
#: A loss spike counts above this share of the first loss.
SPIKE_FLOOR = 0.25
#: Spikes are serious from this number on, nonfinite steps above this share.
SERIOUS_SPIKES, SERIOUS_NONFINITE = 3, 0.05


def loss_symptoms(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields the symptoms of the loss."""
    diverged = [*_divergence(log, outcome)]
    yield from diverged
    yield from _stuck_loss(log, outcome)
    yield from _isolated_nonfinite(log, outcome)
    if not diverged:  # its rise is no spike
        yield from _spikes(log, outcome)


def _divergence(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields a loss that ends far above its start, or far above its lowest level."""
    points = log.loss.finite()
    losses = [value for _, value in points]
    if outcome.failed_at is not None or len(losses) < MIN_POINTS:
        return
    first, final = ends(losses)
    window = max(len(losses) // 10, MIN_WINDOW)
    starts = range(0, len(losses) - window + 1, max(window // MIN_WINDOW, 1))
    best, at = min((median(losses[i : i + window]), points[i][0]) for i in starts)
    had_learned = _is_far_above(first, best, losses, 10)
    if had_learned:
        has_risen = final - best > UNLEARNED * (first - best) and _is_far_above(final, best, losses, 10)
    else:
        # a jump at the end shows in tenths, a slow rise among noise in thirds
        has_risen = any(_is_far_above(*ends(losses, share)[::-1], losses, share) for share in (10, 3))
    # adversarial networks undo what the other has learned
    if not has_risen or (len(log.gradients) > 1 and not _adversaries_diverge(log)):
        return
    low = best if had_learned else first
    since = _last_rise(points, (low + final) / 2)
    evidence = f"the loss began at {first:.3g} and ended at {final:.3g}"
    if had_learned:
        evidence = f"the loss had fallen from {first:.3g} to {best:.3g} (step {at}) and ended at {final:.3g}"
    acted = any(i.kind in ("divergence", "rollback", "training_diverged") for i in log.incidents)
    if len(log.skips) and not acted:
        evidence += "; NaNRollback, which sees every step, has found no divergence"
        yield RunSymptom("rising_loss", "minor", since, evidence, final)
    else:
        yield RunSymptom("divergence", "serious", since, evidence, final)


def _is_far_above(high: float, low: float, losses: Sequence[float], share: int) -> bool:
    """True if one of two medians, each over a `share`-th of the losses, is higher by more than the noise."""
    n = max(len(losses) // share, 1)
    # the noise of a difference of two medians
    scale = MEDIAN_NOISE_FACTOR * math.sqrt(math.pi / n)
    if min(losses) > 0:
        return math.log(high) - math.log(low) > max(
            math.log(MIN_LOSS_RATIO), scale * noise_of([*map(math.log, losses)])
        )
    return high - low > max((MIN_LOSS_RATIO - 1) * abs(low), scale * noise_of(losses))


def _adversaries_diverge(log: RunLog) -> bool:
    """True if networks trained against each other diverge beyond what they undo of each other."""
    detector, ratio = DivergenceDetector(), 0.0
    totals = [g.total for g in log.gradients]
    for step, loss in log.loss.finite():
        norms = [norm for total in totals if (norm := total.at(step)) is not None and math.isfinite(norm)]
        ratio = detector.update(loss, max(norms, default=1.0))
    return ratio > ADVERSARIAL_DIVERGENCE_RATIO


def _last_rise(points: Sequence[tuple[int, float]], level: float) -> int:
    """Returns the step after which the loss stays above a level, except for single values."""
    below = [i for i, (_, value) in enumerate(points) if value < level]
    # noise falls below at times: from this step on most values are above
    for i in below[::-1]:
        if median(value for _, value in points[max(i - MIN_WINDOW, 0) : i + 1]) < level:
            return points[min(i + 1, len(points) - 1)][0]
    return points[0][0]


def _stuck_loss(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    points = log.loss.finite()
    if outcome.failed_at is None and log.over_constant is not None:
        then, final = ends([value for _, value in points[len(points) // 2 :]], 3) if points else (1.0, 1.0)
        if log.over_constant * min(final / then if then > 0 else 1.0, 1.0) > best_constant.STUCK:
            since, evidence = points[-1][0] if points else 0, best_constant.describe_loss(log.over_constant)
            yield RunSymptom("little_learned", "serious", since, evidence, log.over_constant)
            return
    is_long = len(points) >= STUCK_POINTS and points[-1][0] - points[0][0] >= STUCK_STEPS
    if outcome.failed_at is not None or not is_long or len(log.gradients) > 1:
        return
    losses = [value for _, value in points]
    first, final = ends(losses)
    if abs(first - final) > STUCK * abs(first) or abs(first - final) > NOISE_FACTOR * noise_of(losses):
        return
    evidence = f"the loss began at {first:.4g} and ended at {final:.4g}, {outcome.steps} steps later"
    ratios = [median(known) for g in log.gradients for s in g.ratios.values() if (known := s.last_half())]
    still = sum(ratio < STAGNANT for ratio in ratios)
    if 2 * still > len(ratios):
        evidence += f"; {still} of {len(ratios)} weights did not move"
        yield RunSymptom("stuck_loss", "serious", points[0][0], evidence, final)
    else:
        evidence += ": it is stuck, or had converged before"
        yield RunSymptom("stuck_loss", "minor", points[0][0], evidence, final)


def _isolated_nonfinite(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields nonfinite values without an incident, in a run that continued."""
    is_recorded = any(i.kind.startswith("nonfinite") or i.kind == "amp_overflow" for i in log.incidents)
    if outcome.failed_at is not None or is_recorded:
        return
    logged = [("nonfinite_loss", log.loss)]
    logged += [("nonfinite_gradient", g.total) for g in log.gradients]
    for kind, series in logged:
        bad = [i for i, value in enumerate(series.values) if not math.isfinite(value)]
        if not bad:
            continue
        late = [i for i in bad if i >= len(series) // 2]
        is_frequent = len(late) > SERIOUS_NONFINITE * len(series) / 2
        evidence = (
            f"{len(bad)} of {len(series)} logged values, from step {series.steps[bad[0]]} "
            f"to step {series.steps[bad[-1]]}; training continued"
        )
        yield RunSymptom(
            kind, "serious" if is_frequent else "minor", series.steps[bad[0]], evidence, math.nan
        )
        return


def _spikes(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields spikes of loss and total norm at once."""
    if outcome.failed_at is not None or any(i.kind == "loss_spike" for i in log.incidents):
        return
    losses, norms = SpikeDetector(), SpikeDetector()
    spikes: list[tuple[int, float]] = []
    totals = [g.total for g in log.gradients if len(g.total)]
    for step, loss in log.loss.finite():
        known = [norm for total in totals if (norm := total.at(step)) is not None]
        seen = [losses.update(loss), *(norms.update(max(known)) for _ in known[:1])]
        is_new = not spikes or step - spikes[-1][0] > 10
        if all(seen) and is_new and loss > SPIKE_FLOOR * abs(outcome.first_loss or 0.0):
            spikes.append((step, loss))
    if spikes:
        step, value = max(spikes, key=lambda spike: spike[1])
        is_serious = len(spikes) >= SERIOUS_SPIKES and not outcome.has_learned
        times = "once" if len(spikes) == 1 else f"{len(spikes)} times"
        evidence = f"{times}, the highest at step {step} with a loss of {value:.3g}"
        yield RunSymptom("loss_spike", "serious" if is_serious else "minor", spikes[0][0], evidence, value)
