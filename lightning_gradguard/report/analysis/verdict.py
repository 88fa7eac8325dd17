"""The verdict on a run: what is to be said of it in a few words, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.incidents import title
from lightning_gradguard.report.analysis.findings import LEAST_POINTS, symptoms_of
from lightning_gradguard.report.analysis.outcome import Outcome, outcome_of
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog
from lightning_gradguard.report.analysis.run_symptom import RunSymptom, Severity

Status = Literal["healthy", "rescued", "sick", "dead", "unknown"]

_SEVERITIES: Sequence[Severity] = ("fatal", "serious", "handled", "minor")
#: What comes first where several symptoms are equally severe: causes ahead of what follows from them.
_ORDER = (
    "exploding_gradient",
    "nonfinite_weights",
    "nonfinite_loss",
    "nonfinite_gradient",
    "divergence",
    "gradient_collapse",
    "vanishing_gradient",
    "stuck_loss",
    "weight_stagnation",
)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run.

    Args:
        status: `"healthy"`; `"rescued"`: something was wrong and was dealt with; `"sick"`: it is wrong at the
            end; `"dead"`: nonfinite at the end, or given up; `"unknown"`: too little was logged.
        headline: The same in a few words.
        outcome: How the run ended.
        symptoms: The worst first.
    """

    status: Status
    headline: str
    outcome: Outcome
    symptoms: tuple[RunSymptom, ...]


def judge(log: RunLog) -> Verdict:
    """Say what was wrong with a run.

    Args:
        log: What it logged.

    Example:
        >>> from lightning_gradguard.report.analysis.run_log import Series
        >>> norms = Series(range(4), [1.0, 1.7, 8e15, float("nan")])
        >>> losses = Series(range(4), [4.6, 3.9, 1e14, float("nan")])
        >>> verdict = judge(RunLog(losses, [GradientLog(norms, {"rnn.weight_hh_l0": norms})]))
        >>> verdict.status, verdict.headline, verdict.symptoms[0].where
        ('dead', 'exploding gradients', ('rnn.weight_hh_l0',))
    """
    outcome = outcome_of(log)
    symptoms = tuple(sorted(symptoms_of(log, outcome), key=_rank))
    status = _status(log, outcome, symptoms)
    return Verdict(status, _headline(status, symptoms), outcome, symptoms)


def worst_layers(gradients: GradientLog, verdict: Verdict) -> list[str]:
    """Names of the layers, those first that a symptom names, then those with the largest norms."""

    def largest(name: str) -> float:
        return max((v for _, v in gradients.layers[name].finite()), default=math.inf)

    named = dict.fromkeys(n for s in verdict.symptoms for n in s.where if n in gradients.layers)
    return list(dict.fromkeys([*named, *sorted(gradients.layers, key=lambda n: -largest(n))]))


def _rank(symptom: RunSymptom) -> tuple[int, int]:
    kind = symptom.kind
    return _SEVERITIES.index(symptom.severity), _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _status(log: RunLog, outcome: Outcome, symptoms: Sequence[RunSymptom]) -> Status:
    severities = {symptom.severity for symptom in symptoms}
    if outcome.died_at is not None or outcome.was_stopped:
        return "dead"
    if "serious" in severities:
        return "sick"
    intervened = any(len(s) and s.values[-1] > 0 for s in (log.skips, log.rollbacks))
    if "handled" in severities or intervened:
        return "rescued"
    points = max([len(log.loss), *(len(g.total) for g in log.gradients)])
    return "healthy" if points >= LEAST_POINTS else "unknown"


def _headline(status: Status, symptoms: Sequence[RunSymptom]) -> str:
    worst = title(symptoms[0].kind) if symptoms else ""
    if status == "healthy":
        is_flat = any(symptom.kind == "stuck_loss" for symptom in symptoms)
        return "healthy, with a flat loss" if is_flat else "healthy"
    if status == "unknown":
        return "too little was logged to judge"
    if status == "rescued":
        return f"rescued from {worst}" if worst else "rescued"
    return worst or "given up"
