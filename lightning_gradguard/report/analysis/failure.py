"""What a run died of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from statistics import median

from lightning_gradguard.core.detectors import EXPLOSION
from lightning_gradguard.core.remedies import remedies
from lightning_gradguard.report.analysis.outcome import ends
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog
from lightning_gradguard.report.analysis.run_symptom import RunSymptom, run_symptom

#: A norm as large as this ahead of NaN has exploded, even if too little was logged to compare it with.
HUGE = 1e3


def failure_cause(died_at: int, log: RunLog) -> RunSymptom:
    """The likeliest, as far as what was logged tells.

    Args:
        died_at: The step from which on all was nonfinite.
        log: What the run logged.
    """
    explosions = [found for g in log.gradients for found in _explosion_ahead_of(died_at, g)]
    if explosions:
        return max(explosions, key=lambda symptom: symptom.value)
    losses = [(step, value) for step, value in log.loss.finite() if step < died_at]
    if losses and losses[-1][1] > EXPLOSION * abs(median(value for _, value in losses[:-1] or losses)):
        (start, first), (last, value) = losses[0], losses[-1]
        growth = f"from {first:.3g} (step {start}) to {value:.3g} (step {last})"
        evidence = f"the loss grew {growth} and was nonfinite from step {died_at} on"
        return run_symptom("divergence", "fatal", last, evidence, value)
    return _out_of_the_blue(died_at, log)


def _out_of_the_blue(died_at: int, log: RunLog) -> RunSymptom:
    sick = [name for g in log.gradients for name, s in g.layers.items() if _is_sick(s.at(died_at))]
    weights = [name for g in log.gradients for name, s in g.weights.items() if _is_sick(s.at(died_at))]
    n_layers = sum(len(g.layers) for g in log.gradients)
    where: tuple[str, ...] = ()
    if _is_sick(log.loss.at(died_at)):
        kind, what = "nonfinite_loss", "the loss was nonfinite"
    elif weights and not sick:
        kind, what, where = "nonfinite_weights", f"weights of {weights[0]} were nonfinite", tuple(weights[:5])
    else:
        kind = "nonfinite_gradient"
        which = "gradients" if not sick else f"{'all' if len(sick) == n_layers else len(sick)} gradients"
        what = f"the loss was finite, {which} were not" if len(log.loss) else f"{which} were nonfinite"
        # from the output back: the first that is sick is next to the fault
        where = () if len(sick) == n_layers else tuple(reversed(sick[-5:]))
    pulses = (log.loss, *(g.total for g in log.gradients))
    last = max((step for s in pulses for step, _ in s.finite() if step < died_at), default=None)
    unseen = died_at if last is None else died_at - last - 1
    if last is not None:
        before = f"from step {died_at} on; step {last} showed nothing unusual"
        before += f" (the {unseen} steps between were not logged)" if unseen else ""
    elif unseen:
        before = f"at the first logged step, {died_at}; the {unseen} steps before were not logged"
    else:
        before = "from the first step on"
    symptom = run_symptom(kind, "fatal", died_at, f"{what} {before}", math.nan, where)
    if not unseen:
        return symptom
    # NaN out of the blue is a matter of the batch; in steps that nobody has seen norms can have exploded
    first = (*remedies("divergence")[:3], "See what came ahead of it: Trainer(log_every_n_steps=1).")
    return dataclasses.replace(symptom, remedies=tuple(dict.fromkeys((*first, *symptom.remedies))))


def _explosion_ahead_of(died_at: int, gradients: GradientLog) -> Iterator[RunSymptom]:
    before = [(step, value) for step, value in gradients.total.finite() if step < died_at]
    if not before:
        return
    norms = [value for _, value in before]
    peak_step, peak = max(before[-20:], key=lambda point: point[1])
    usual = min(median(norms), ends(norms)[0])
    if peak <= EXPLOSION * usual and not (peak > HUGE and len(before) <= 3):
        return
    since, _ = next(p for p in before if p[1] > EXPLOSION * usual or p == (peak_step, peak))
    where, share = largest_at(peak_step, gradients)
    start = f"grew from {norms[0]:.3g} (step {before[0][0]}) to" if len(before) > 1 else "was"
    evidence = (
        f"the total norm {start} {peak:.3g} (step {peak_step}){share}; nonfinite from step {died_at} on"
    )
    yield run_symptom("exploding_gradient", "fatal", since, evidence, peak, where)


def largest_at(step: int, gradients: GradientLog) -> tuple[tuple[str, ...], str]:
    """Layers by their norm at a step, and the share of the first in words."""
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


def _is_sick(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)
