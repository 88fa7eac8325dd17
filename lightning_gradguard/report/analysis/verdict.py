"""The verdict on a run: its status, a headline, and its symptoms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_gradguard.core.incidents import AT_ANY_RATE, CAUSES, SYMPTOM_CAUSES, label, title
from lightning_gradguard.core.remedies import remedies
from lightning_gradguard.report.analysis.failure import failure_cause
from lightning_gradguard.report.analysis.gradient_symptoms import gradient_symptoms
from lightning_gradguard.report.analysis.incident_symptoms import (
    INITIALIZATION,
    found_rate,
    incident_symptoms,
)
from lightning_gradguard.report.analysis.loss_symptoms import loss_symptoms
from lightning_gradguard.report.analysis.outcome import (
    MIN_POINTS,
    Outcome,
    RunSymptom,
    SymptomSeverity,
    outcome_of,
)
from lightning_gradguard.report.analysis.present import present_in
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog

Status = Literal["healthy", "recovered", "unhealthy", "failed", "unknown"]

_SEVERITIES = ("fatal", "serious", "handled", "minor")
#: Symptoms of which incidents know more than logs do; so they do of those whose cause is diagnosed.
_DIAGNOSED = ("stuck_loss",)
#: Order among equally severe symptoms without a cause: causes before their consequences.
_ORDER = (
    *("exploding_gradient", "nonfinite_weights", "nonfinite_loss", "nonfinite_gradient", "divergence"),
    *("poor_initialization", "dead_units", "saturated_units", "gradient_collapse", "vanishing_weights"),
    *("vanishing_gradient", "stuck_loss", "constant_clipping", "weight_stagnation"),
)


@dataclass(frozen=True)
class RunVerdict:
    """The verdict on a run.

    Args:
        status: `"healthy"`; `"recovered"`: the suite intervened, and the loss fell afterwards, or in a
            resumed run did not rise; `"unhealthy"`: a serious symptom lasts to the end; `"failed"`: nonfinite
            at the end, or stopped; `"unknown"`: too few steps, or no loss after an intervention, were logged.
        headline: The same in a few words.
        outcome: The end of the run.
        symptoms: The worst first.
    """

    status: Status
    headline: str
    outcome: Outcome
    symptoms: tuple[RunSymptom, ...]


def analyze_run(log: RunLog) -> RunVerdict:
    """Finds the symptoms of a run and what they amount to.

    Example:
        >>> from lightning_gradguard.report.analysis.run_log import Series
        >>> norms = Series(range(4), [1.0, 1.7, 8e15, float("nan")])
        >>> losses = Series(range(4), [4.6, 3.9, 1e14, float("nan")])
        >>> verdict = analyze_run(RunLog(losses, [GradientLog(norms, {"rnn.weight_hh_l0": norms})]))
        >>> verdict.status, verdict.headline, verdict.symptoms[0].where
        ('failed', 'exploding gradients', ('rnn.weight_hh_l0',))
    """
    outcome = outcome_of(log)
    symptoms = tuple(sorted(_symptoms_of(log, outcome), key=_rank))
    status = _status(log, outcome, symptoms)
    return RunVerdict(status, _headline(status, symptoms), outcome, symptoms)


def order_layers(gradients: GradientLog, verdict: RunVerdict) -> list[str]:
    """Returns names of layers: first those that a symptom names, then those with the largest norms."""

    def largest(name: str) -> float:
        return max((v for _, v in gradients.layers[name].finite()), default=math.inf)

    where = [name for symptom in verdict.symptoms for name in symptom.where]
    named = [layer for name in where for layer in gradients.layers if is_within(layer, name)]
    return list(dict.fromkeys([*named, *sorted(gradients.layers, key=lambda n: -largest(n))]))


def is_within(layer: str, name: str) -> bool:
    """True if a layer is, or is within, the parameter or module of a name; that of a batch has none."""
    return f"{layer}.".startswith(f"{name}.")


def _symptoms_of(log: RunLog, outcome: Outcome) -> list[RunSymptom]:
    found = [] if outcome.failed_at is None else [failure_cause(outcome.failed_at, log)]
    found += gradient_symptoms(log, outcome)
    found += loss_symptoms(log, outcome)
    diagnosed = {*_DIAGNOSED, *(i.kind for i in log.incidents if i.cause in SYMPTOM_CAUSES)}
    recorded = [*incident_symptoms(log, outcome, {s.kind for s in found} - diagnosed)]
    if any(s.kind == "little_learned" for s in found):  # a cause that was diagnosed is its reason
        recorded = [replace(s, severity="serious") if _is_minor_cause(s) else s for s in recorded]
    serious = [s for s in (*found, *recorded) if s.severity == "serious"]
    begins_badly = any(s.kind in INITIALIZATION for s in serious)
    rolled_back = [i.cause in AT_ANY_RATE for i in log.incidents if i.kind == "rollback"]
    is_at_any_rate = any(s.severity == "fatal" and s.cause in AT_ANY_RATE for s in recorded)
    if is_at_any_rate or (rolled_back and all(rolled_back) and found_rate(log) is None):
        recorded = [s for s in recorded if s.kind != "falling_learning_rate"]
    # what follows from other symptoms, and has other remedies, or is measured from charts alone
    follows = {
        "stuck_loss": begins_badly or any(s.cause in SYMPTOM_CAUSES for s in serious),
        "weight_stagnation": begins_badly,
        "constant_clipping": any(s.cause == "clip_value_too_small" for s in recorded),
        "little_learned": any(s.kind != "little_learned" for s in serious),
        "large_norm": any(
            s.severity != "minor" or s.kind == "exploding_gradient" for s in (*found, *recorded)
        ),
    }
    known = {s.kind for s in recorded} | {kind for kind, does_so in follows.items() if does_so}
    outliers = {s.since for s in recorded if s.kind == "loss_spike" and s.cause == "bad_input"}
    found = [
        s
        for s in found
        if s.kind not in known and not (s.kind == "exploding_gradient" and s.since in outliers)
    ] + recorded
    present = present_in(log)
    return [
        replace(
            symptom,
            severity=_by_outcome(symptom, outcome, found),
            remedies=symptom.remedies or remedies(symptom.kind, symptom.where, present),
        )
        for symptom in found
    ]


def _is_minor_cause(symptom: RunSymptom) -> bool:
    return symptom.severity == "minor" and symptom.cause in SYMPTOM_CAUSES


def _by_outcome(symptom: RunSymptom, outcome: Outcome, found: Sequence[RunSymptom]) -> SymptomSeverity:
    """Returns the severity that the outcome of the run leaves of a symptom."""
    severity = symptom.severity
    if severity == "handled" and outcome.has_improved is False:
        # the suite intervened, and nothing was better afterwards, unless that has a reason from before, or
        # what was repaired is followed by something else
        if symptom.kind in INITIALIZATION and any(s.severity == "serious" for s in found):
            return severity
        earlier = [s for s in found if s.severity == "serious" and s.since <= symptom.since]
        return severity if any(s.cause in SYMPTOM_CAUSES for s in earlier) else "serious"
    is_diagnosed = symptom.cause in SYMPTOM_CAUSES
    lasts = symptom.kind in ("divergence", "stuck_loss", "little_learned", "constant_clipping")
    lasts |= is_diagnosed or symptom.kind.startswith("nonfinite")
    if severity == "serious" and outcome.has_learned and not lasts:
        return "minor"
    if is_diagnosed:
        return severity
    causes = [s for s in found if s.kind != "constant_clipping" and s.severity != "minor"]
    # hard clipping is what kept a bad run alive, unless there is nothing else
    hinders = symptom.kind == "constant_clipping" and not outcome.has_learned
    return "minor" if hinders and causes else severity


def _rank(symptom: RunSymptom) -> tuple[int, bool, int]:
    kind, cause = symptom.kind, symptom.cause
    is_examined = cause in CAUSES and cause not in ("transient", "unknown")
    order = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
    return _SEVERITIES.index(symptom.severity), not is_examined, order


def _status(log: RunLog, outcome: Outcome, symptoms: Sequence[RunSymptom]) -> Status:
    severities = {symptom.severity for symptom in symptoms}
    if outcome.failed_at is not None or outcome.was_stopped or "fatal" in severities:
        return "failed"
    if "serious" in severities:
        return "unhealthy"
    intervened = any(len(s) and s.values[-1] > 0 for s in (log.skips, log.rollbacks))
    if "handled" in severities or intervened:
        if outcome.has_improved is None and len(log.loss.finite()) < MIN_POINTS:
            return "unknown"
        return "unhealthy" if outcome.has_improved is False else "recovered"
    points = max([len(log.loss), *(len(g.total) for g in log.gradients)])
    return "healthy" if points >= MIN_POINTS else "unknown"


def _headline(status: Status, symptoms: Sequence[RunSymptom]) -> str:
    worst = ""
    if symptoms:
        cause = symptoms[0].cause
        is_known = cause not in ("", "unknown")
        worst = title(symptoms[0].kind, cause) + (f" (cause: {label(cause)})" if is_known else "")
    if status == "healthy":
        if flat := [s.value for s in symptoms if s.kind == "stuck_loss" and not s.cause]:
            return f"healthy, with a flat loss of {flat[0]:.3g}"
        return f"healthy, with {worst}" if worst else "healthy"
    if status == "unknown":
        return "too little was logged for a verdict"
    if status == "recovered":
        is_past = symptoms and symptoms[0].severity == "minor"  # the suite intervened for something else
        return f"recovered{', with' if is_past else ' from'} {worst}" if worst else "recovered"
    if status == "unhealthy":
        return worst or "the loss did not fall after the interventions"
    return worst or "stopped"
