"""Symptoms in gradient norms: explosion, vanishing, stagnation, collapse, constant clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from lightning_gradguard.core.detectors import (
    CONSTANT_CLIPPING,
    EXPLOSION,
    HARD_CLIPPING,
    STAGNANT,
    CollapseDetector,
    Symptom,
    SymptomDetector,
)
from lightning_gradguard.report.analysis.failure import largest_layers_at
from lightning_gradguard.report.analysis.outcome import MIN_POINTS, Outcome, RunSymptom, ends
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series

#: Logged steps that detectors check; of more steps, evenly spread ones.
MAX_CHECKS = 500
#: A spike of the norm counts only above this many times the norm at the start: late in a run norms are small.
ABOVE_START = 10.0


def gradient_symptoms(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields the symptoms of each optimizer's gradients."""
    for gradients in log.gradients:
        yield from _explosion(log, gradients, outcome)
        yield from _lasting(gradients, outcome)
        yield from _collapse(gradients, outcome)
        yield from _constant_clipping(gradients, outcome)


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


def _lasting(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields symptoms that detectors find in the whole run, and in its last third alone."""
    steps = _thinned(sorted({s for series in gradients.layers.values() for s in series.steps}))
    late = {symptom.kind: symptom for _, symptom in _alarms(steps[-len(steps) // 3 :], gradients)}
    for since, symptom in _alarms(steps, gradients):
        now = late.pop(symptom.kind, None)
        if now is None:
            continue
        if now.kind == "weight_stagnation":
            evidence = f"updates are below {STAGNANT:g} of the weight norm from step {since} to the end"
            if len(now.where) > 1:
                evidence = f"{len(now.where)} layers or more: {evidence}"
        else:
            evidence = _profile_in_words(gradients, now.value)
        yield RunSymptom(
            now.kind, "minor" if outcome.has_learned else "serious", since, evidence, now.value, now.where
        )


def _alarms(steps: Sequence[int], gradients: GradientLog) -> Iterator[tuple[int, Symptom]]:
    """Yields the first alarm of each kind that a detector raises over these steps."""
    if not steps:
        return
    persistence_steps = min(20, (steps[-1] - steps[0]) // 2)
    detector = SymptomDetector(warmup_steps=0, persistence_steps=persistence_steps)
    seen = set()
    for step in steps:
        names, grads = _layers_at(step, gradients)
        # without logged weights the profile is that of the gradient norms alone
        unknown = 0.0 if gradients.weights else 1.0
        weights = [_at(gradients.weights, name, step, unknown) for name in names]
        ratios = [_at(gradients.ratios, name, step, math.inf) for name in names]
        for symptom in detector.update(
            step,
            names=names,
            is_matrix=_are_matrices(names),
            grad_norms=grads,
            weight_norms=weights,
            update_ratios=ratios,
            # spikes of the total norm, the loss and nonfinite values have rules of their own
            total_norm=math.nan,
            loss=math.nan,
            nonfinite_fraction=0.0,
        ):
            if symptom.kind not in seen:
                seen.add(symptom.kind)
                yield max(step - persistence_steps, steps[0]), symptom


def _profile_in_words(gradients: GradientLog, profile: float) -> str:
    names = [name for name, series in gradients.layers.items() if series.last_half()]
    layers = [name for name, is_matrix in zip(names, _are_matrices(names), strict=True) if is_matrix][:-1]
    first, last = layers[0], layers[-1]
    norms = [f"{median(gradients.layers[name].last_half()):.2g} at {name}" for name in (last, first)]
    change = "shrink" if profile > 0 else "grow"
    by = "to zero" if math.isinf(profile) else f"by {abs(profile):.1f} decades"
    return f"gradients {change} {by} from the last layer to the first: {norms[0]}, {norms[1]}"


def _collapse(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    detector = CollapseDetector()
    # a network without gradients from the first step on has collapsed as well
    detector.update(is_collapsed=False)
    has_collapsed = False
    since: int | None = None
    for step in _thinned(gradients.total.steps):
        names, grads = _layers_at(step, gradients)
        matrices = [g for g, is_matrix in zip(grads, _are_matrices(names), strict=True) if is_matrix]
        is_collapsed = bool(matrices) and not any(matrices) and any(grads)
        since = (step if since is None else since) if is_collapsed else None
        has_collapsed = detector.update(is_collapsed)
    if has_collapsed and since is not None and not outcome.has_learned:
        evidence = f"no weight matrix has received a gradient since step {since}, while biases still do"
        yield RunSymptom("gradient_collapse", "serious", since, evidence, 0.0)


def _constant_clipping(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    fractions = gradients.clip_fraction.last_half()
    coefficients = gradients.clip_coefficient.last_half()
    if not fractions:
        return
    share = sum(fractions) / len(fractions)
    usual = median(coefficients) if coefficients else 0.0
    if share <= CONSTANT_CLIPPING or usual > HARD_CLIPPING:
        return
    evidence = f"{share:.0%} of the steps in the second half were clipped, to {usual:.2g} of their norm"
    is_sure = len(fractions) >= MIN_POINTS and not outcome.has_learned
    since = gradients.clip_fraction.steps[len(gradients.clip_fraction) // 2]
    yield RunSymptom("constant_clipping", "serious" if is_sure else "minor", since, evidence, share)


def _layers_at(step: int, gradients: GradientLog) -> tuple[list[str], list[float]]:
    norms = {name: series.at(step) for name, series in gradients.layers.items()}
    known = {name: norm for name, norm in norms.items() if norm is not None}
    return list(known), list(known.values())


def _at(family: Mapping[str, Series], name: str, step: int, default: float) -> float:
    value = family[name].at(step) if name in family else None
    return default if value is None else value


def _are_matrices(names: Iterable[str]) -> list[bool]:
    """Returns for each name True if it belongs to a weight matrix; names of modules all do."""
    names = list(names)
    if not any(re.search(r"(^|\.)(weight|bias)", name) for name in names):
        return [True] * len(names)
    return [
        not re.search(r"bias[^.]*$|(^|[._])(norm|bn|ln|batch_?norm|layer_?norm)[_\d]*\.", name, re.IGNORECASE)
        for name in names
    ]


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    """Returns at most `MAX_CHECKS` of them, evenly spread."""
    return steps[:: math.ceil(len(steps) / MAX_CHECKS) or 1]
