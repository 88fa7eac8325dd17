"""The likeliest cause of a failed run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from lightning_gradguard.core.detectors import EXPLOSION
from lightning_gradguard.core.remedies import remedies
from lightning_gradguard.report.analysis.outcome import RunSymptom, ends
from lightning_gradguard.report.analysis.present import present_in
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog

#: A norm above this right before NaN has exploded, even with too few logged steps to compare it with.
EXPLODED_NORM = 1e3


def failure_cause(failed_at: int, log: RunLog) -> RunSymptom:
    """Returns the likeliest cause of the values that are nonfinite from a step on, as a fatal symptom."""
    explosions = [found for g in log.gradients for found in _explosion_before(failed_at, g)]
    if explosions:
        return max(explosions, key=lambda symptom: symptom.value)
    if diagnosed := _diagnosed_explosion(failed_at, log):
        return diagnosed
    losses = [(step, value) for step, value in log.loss.finite() if step < failed_at]
    if losses and losses[-1][1] > EXPLOSION * abs(median(value for _, value in losses[:-1] or losses)):
        (start, first), (last, value) = losses[0], losses[-1]
        growth = f"from {first:.3g} (step {start}) to {value:.3g} (step {last})"
        evidence = f"the loss grew {growth} and was nonfinite from step {failed_at} on"
        return RunSymptom("divergence", "fatal", last, evidence, value)
    return _sudden_failure(failed_at, log)


def _diagnosed_explosion(failed_at: int, log: RunLog) -> RunSymptom | None:
    """Returns an explosion that was diagnosed at a step after which nothing finite was logged."""
    last = _last_finite(failed_at, log)
    for i in log.incidents:
        if i.kind == "exploding_gradient" and (last or 0) <= i.step <= failed_at:
            evidence = f"{i.detail.rstrip('.')}; nonfinite from step {failed_at} on, or before"
            steps = (i.advice,) if i.advice else ()
            return RunSymptom(i.kind, "fatal", i.step, evidence, i.value or math.inf, i.where, steps, i.cause)
    return None


def _sudden_failure(failed_at: int, log: RunLog) -> RunSymptom:
    layers = [name for g in log.gradients for name, s in g.layers.items() if _is_nonfinite(s.at(failed_at))]
    weights = [name for g in log.gradients for name, s in g.weights.items() if _is_nonfinite(s.at(failed_at))]
    n_layers = sum(len(g.layers) for g in log.gradients)
    where: tuple[str, ...] = ()
    if _is_nonfinite(log.loss.at(failed_at)):
        kind, what = "nonfinite_loss", "the loss was nonfinite"
    elif weights and not layers:
        kind, what, where = "nonfinite_weights", f"weights of {weights[0]} were nonfinite", tuple(weights[:5])
    else:
        kind = "nonfinite_gradient"
        which = f"{'all' if len(layers) == n_layers else len(layers)} gradients" if layers else "gradients"
        what = f"the loss was finite, {which} were not" if len(log.loss) else f"{which} were nonfinite"
        # the nonfinite layer nearest to the output is next to the fault
        where = () if len(layers) == n_layers else tuple(reversed(layers[-5:]))
    last = _last_finite(failed_at, log)
    unlogged = failed_at if last is None else failed_at - last - 1
    if last is not None:
        before = f"from step {failed_at} on; step {last} showed nothing unusual"
        before += f" (the {unlogged} steps between were not logged)" if unlogged else ""
    elif unlogged:
        before = f"at the first logged step, {failed_at}; the {unlogged} steps before were not logged"
    else:
        before = "from the first step on"
    next_steps: tuple[str, ...] = ()
    if unlogged:
        # a sudden NaN points to the batch; but in steps that were not logged norms can have exploded
        present = present_in(log)
        of_kind = remedies(kind, where, present)
        next_steps = (
            *of_kind[:1],
            "Log the steps before it: Trainer(log_every_n_steps=1).",
            *remedies("divergence", present={*present, "rollback"})[:3],
            *of_kind[1:],
        )
    evidence, own = f"{what} {before}", tuple(dict.fromkeys(next_steps))
    return RunSymptom(kind, "fatal", failed_at, evidence, math.nan, where, own)


def _explosion_before(failed_at: int, gradients: GradientLog) -> Iterator[RunSymptom]:
    before = [(step, value) for step, value in gradients.total.finite() if step < failed_at]
    if not before:
        return
    norms = [value for _, value in before]
    peak_step, peak = max(before[-20:], key=lambda point: point[1])
    usual = min(median(norms), ends(norms)[0])
    if peak <= EXPLOSION * usual and not (peak > EXPLODED_NORM and len(before) <= 3):
        return
    since, _ = next(p for p in before if p[1] > EXPLOSION * usual or p == (peak_step, peak))
    where, share = largest_layers_at(peak_step, gradients)
    start = f"grew from {norms[0]:.3g} (step {before[0][0]}) to" if len(before) > 1 else "was"
    evidence = (
        f"the total norm {start} {peak:.3g} (step {peak_step}){share}; nonfinite from step {failed_at} on"
    )
    yield RunSymptom("exploding_gradient", "fatal", since, evidence, peak, where)


def largest_layers_at(step: int, gradients: GradientLog) -> tuple[tuple[str, ...], str]:
    """Returns the layers with the largest norms at a step, and the share of the first in words."""
    norms = {name: series.at(step) for name, series in gradients.layers.items()}
    known = {name: norm for name, norm in norms.items() if norm is not None and math.isfinite(norm)}
    where = tuple(sorted(known, key=lambda name: -known[name])[:5])
    total = gradients.total.at(step)
    if not where or not total:
        return where, ""
    # squares of norms add up: 0.95 is nine tenths of the whole, 0.71 is half
    ratio = known[where[0]] / total
    how_much = "nearly all" if ratio > 0.95 else "most" if ratio > 0.71 else "the largest part"
    return where, f", {how_much} of it in {where[0]}"


def _last_finite(failed_at: int, log: RunLog) -> int | None:
    """Returns the last step before a failure at which something finite was logged."""
    logged = (log.loss, *(g.total for g in log.gradients))
    return max((step for s in logged for step, _ in s.finite() if step < failed_at), default=None)


def _is_nonfinite(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)
