"""Symptoms in the gradients of a run: spikes of the total norm, collapse, constant clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from lightning_gradguard.core import tags
from lightning_gradguard.core.detectors import (
    ABOVE_START,
    CONSTANT_CLIPPING,
    EXPLOSION,
    FAR_CLIPPING,
    FAR_IF_TOO_LARGE,
    HARD_CLIPPING,
    NEARLY_ALL,
    USUAL_UPDATE,
    CollapseDetector,
    describe_clipping,
)
from lightning_gradguard.core.remedies import Present, advice, advice_for_cause
from lightning_gradguard.report.analysis.failure import largest_layers_at
from lightning_gradguard.report.analysis.lasting_symptoms import (
    are_matrices,
    lasting_symptoms,
    layers_at,
    thinned,
)
from lightning_gradguard.report.analysis.outcome import MIN_POINTS, Outcome, RunSymptom, SymptomSeverity, ends
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog

#: Causes by which updates are too large without clipping.
TOO_LARGE = ("update_too_large", "input_scale", "data_scale", "target_scale")
#: A coefficient is smaller than another one below this share of it.
SMALLEST_DIFFERENCE = 0.99


def gradient_symptoms(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields the symptoms of each optimizer's gradients."""
    for gradients in log.gradients:
        yield from _explosion(log, gradients, outcome)
        yield from lasting_symptoms(gradients, outcome)
        yield from _collapse(gradients, outcome)
        yield from _constant_clipping(log, gradients, outcome)
    yield from _large_norm(log)


def _explosion(log: RunLog, gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields a total norm far above those before it, in a run that continued."""
    points = gradients.total.finite()
    if outcome.failed_at is not None or not points:
        return
    norms = [value for _, value in points]
    start, end = ends(norms)
    # a run that learns at once has small norms within its first tenth; a hard batch then is no explosion
    start = max(start, median(norms[:3]))
    floor = max(ABOVE_START * start, EXPLOSION * min(norms))
    peaks = [
        (value, step, usual)
        for i, (step, value) in enumerate(points)
        if i and value > floor and value / EXPLOSION > (usual := median(norms[max(i - 100, 0) : i])) > 0
    ]
    if not peaks:
        return
    value, step, usual = max(peaks)
    where, share = largest_layers_at(step, gradients)
    evidence = (
        f"the total norm spiked to {value:.3g} at step {step}, from a recent median of {usual:.3g}{share}"
    )
    if len(peaks) > 1:
        evidence += f"; {len(peaks)} such steps up to step {max(step for _, step, _ in peaks)}"
    clipped = gradients.clipped.at(step)
    was_clipped = clipped is not None and clipped < value
    if was_clipped:
        evidence += f"; clipping reduced it to {clipped:.3g}"
    is_handled = was_clipped or any(times > 0 for times in log.rollbacks.values[-1:])
    lasts = not outcome.has_learned and (end > EXPLOSION * start or not is_handled)
    since = min(step for _, step, _ in peaks)
    yield RunSymptom(
        "exploding_gradient",
        "serious" if lasts else "handled" if is_handled else "minor",
        since,
        evidence,
        value,
        where,
    )


def _large_norm(log: RunLog) -> Iterator[RunSymptom]:
    """Yields a largest norm that a mean loss of data of unit scale does not have."""
    logged = [point for gradients in log.gradients for point in gradients.total.finite()]
    since, largest = max(logged, key=lambda point: point[1], default=(0, 0.0))
    largest = max(largest, log.largest_norm or 0.0)
    if largest > tags.USUAL_LARGEST_NORM:
        usual = f"usual: below {tags.USUAL_LARGEST_NORM:g} for a mean loss"
        evidence = f"the largest gradient norm is {largest:.3g}, {usual}"
        yield RunSymptom("large_norm", "minor", since, evidence, largest)


def _collapse(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    detector = CollapseDetector()
    # a network without gradients from the first step on has collapsed as well
    detector.update(is_collapsed=False)
    has_collapsed = False
    since: int | None = None
    for step in thinned(gradients.total.steps):
        names, grads = layers_at(step, gradients)
        matrices = [g for g, is_matrix in zip(grads, are_matrices(names), strict=True) if is_matrix]
        is_collapsed = bool(matrices) and not any(matrices) and any(grads)
        since = (step if since is None else since) if is_collapsed else None
        has_collapsed = detector.update(is_collapsed)
    if has_collapsed and since is not None and not outcome.has_learned:
        evidence = f"no weight matrix has received a gradient since step {since}, while biases still do"
        yield RunSymptom("gradient_collapse", "serious", since, evidence, 0.0)


def _constant_clipping(log: RunLog, gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    fractions = gradients.clip_fraction.last_half()
    coefficients = gradients.clip_coefficient.last_half()
    if any(clipped_elsewhere(gradients)):
        yield from _clipping_by_trainer(gradients, outcome)
        return
    if not fractions:
        return
    share = sum(fractions) / len(fractions)
    usual = median(coefficients) if coefficients else 0.0
    is_hard = share > CONSTANT_CLIPPING and usual <= HARD_CLIPPING
    if not is_hard and (log.clipped_fraction or 0.0) <= CONSTANT_CLIPPING:
        return
    evidence = f"{describe_clipping(share, usual)}, in the second half of the run"
    if log.clipped_fraction is not None:  # the numbers that the end of the run has
        share, usual = log.clipped_fraction, log.clip_coefficient or usual
        evidence = describe_clipping(share, usual)
    cause = next((i.cause for i in log.incidents if i.cause in TOO_LARGE), "")
    is_far = share > NEARLY_ALL and usual < (FAR_IF_TOO_LARGE if cause else FAR_CLIPPING)
    is_sure = is_hard and len(fractions) >= MIN_POINTS and (is_far or not outcome.has_learned)
    since = gradients.clip_fraction.steps[len(gradients.clip_fraction) // 2]
    present: tuple[Present, ...] = ("explained",) if cause else ()
    next_steps = (advice("constant_clipping", present=present, coefficient=usual or None),)
    severity: SymptomSeverity = "serious" if is_sure else "minor"
    cause = cause if is_far else ""
    yield RunSymptom("constant_clipping", severity, since, evidence, share, (), next_steps, cause)


def clipped_elsewhere(gradients: GradientLog) -> list[bool]:
    """Returns whether the optimizer got less than the suite's own clipping has left, by logged step."""
    own = dict(gradients.clip_coefficient.finite())
    left = _clipped_shares(gradients)
    return [share < SMALLEST_DIFFERENCE * own.get(step, 1.0) for step, share in left]


def _clipped_shares(gradients: GradientLog) -> list[tuple[int, float]]:
    """Returns the norm after all clipping relative to that before, by logged step."""
    before = ((step, norm, gradients.total.at(step)) for step, norm in gradients.clipped.finite())
    return [(step, norm / total) for step, norm, total in before if total and math.isfinite(total)]


def _clipping_by_trainer(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    shares = [share for _, share in _clipped_shares(gradients)]
    shares = shares[len(shares) // 2 :]
    hard = sum(share < HARD_CLIPPING for share in shares) / len(shares)
    if hard <= CONSTANT_CLIPPING:
        return
    value, usual = max(gradients.clipped.last_half()), median(gradients.total.last_half())
    ratios = [median(known) for series in gradients.ratios.values() if (known := series.last_half())]
    evidence = (
        f"{hard:.0%} of the steps in the second half were clipped to less than half of their norm, by the "
        f"Trainer or the module: to {value:.3g}, from {usual:.3g} as a rule"
    )
    # without small updates, clipping hinders nothing: Adam divides it away
    is_sure = len(shares) >= MIN_POINTS and not outcome.has_learned
    is_sure = is_sure and bool(ratios) and median(ratios) < USUAL_UPDATE
    since = gradients.clipped.steps[len(gradients.clipped) // 2]
    if not is_sure:
        yield RunSymptom("constant_clipping", "minor", since, evidence, hard)
        return
    cause = "clip_value_too_small"
    yield RunSymptom(
        "constant_clipping", "serious", since, evidence, hard, (), (advice_for_cause(cause),), cause
    )
