"""Symptoms from recorded incidents and from learning-rate cuts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from lightning_gradguard.core.detectors.best_constant import STUCK
from lightning_gradguard.core.incidents import CURE, HELD, OF_WEIGHTS, SYMPTOM_CAUSES, Incident, label
from lightning_gradguard.core.remedies import Present, advice_for_cause, remedies
from lightning_gradguard.report.analysis.outcome import (
    LEARNED,
    MIN_POINTS,
    Outcome,
    RunSymptom,
    SymptomSeverity,
    ends,
)
from lightning_gradguard.report.analysis.present import present_in
from lightning_gradguard.report.analysis.run_log import RunLog

#: A learning-rate scale at or below this has not recovered.
BACKED_OFF = 1 / 8
#: Causes of a stuck loss whose incident has that ratio as its value.
_MEASURED_RATIO = ("input_scale", "data_scale", "learning_rate_too_low")
#: A run whose last steps, as many as this, were skipped has not recovered.
ENDING = 3
#: Details of one symptom that are quoted in full.
MAX_DETAILS = 5

#: Kinds that record an intervention, not a symptom.
_RESPONSES = ("rollback", "learning_rate_backoff", "learning_rate_found", "training_diverged", "lost_batch")
#: Those that end a learning rate, and that which finds one.
_OF_RATE = ("learning_rate_backoff", "training_diverged", "learning_rate_found")
#: Kinds that the check of the initialization finds.
INITIALIZATION = ("poor_initialization", "dead_units", "saturated_units")


def incident_symptoms(log: RunLog, outcome: Outcome, known: set[str]) -> Iterator[RunSymptom]:
    """Yields the symptoms that the suite recorded or responded to."""
    falling = _falling_learning_rate(log, outcome)
    if falling is not None:
        yield falling
        known = {*known, falling.kind}
    yield from _recorded(log, outcome, known)


def found_rate(log: RunLog) -> float | None:
    """Returns the learning rate that a run has found to train; `None` if there is none, or it failed."""
    found = [i for i in log.incidents if i.kind in _OF_RATE]
    return found[-1].value if found and found[-1].kind == "learning_rate_found" else None


def _falling_learning_rate(log: RunLog, outcome: Outcome) -> RunSymptom | None:
    """Returns learning-rate cuts that were not recovered."""
    points = log.backoff_scale.finite()
    scales = [scale for _, scale in points]
    recorded = [i for i in log.incidents if i.kind == "learning_rate_backoff"]
    if not (points or recorded):
        return None
    if recorded:
        # right after a cut the rate is rewarmed from a tenth of the recorded one
        cuts, level = [i.step for i in recorded], recorded[-1].value or [1.0, *scales][-1]
    else:
        lows = [step for i, (step, scale) in enumerate(points) if scale < min(scales[:i], default=0.0)]
        cuts, level = lows, scales[-1]
    rate = found_rate(log)
    if len(cuts) < 2 or (max([level, *scales[-1:]]) > BACKED_OFF and rate is None):
        return None
    evidence = f"lowered {len(cuts)} times since step {cuts[0]}, to {level:.2g} of the configured rate"
    severity: SymptomSeverity = "minor" if outcome.has_learned else "serious"
    if rate is None:
        reasons = [i.advice for i in log.incidents if i.cause == "update_too_large" and i.advice]
        next_steps = (*reasons[:1], *remedies("falling_learning_rate"))
        return RunSymptom("falling_learning_rate", severity, cuts[0], evidence, level, remedies=next_steps)
    evidence += f"; the last one was lr={rate:.3g}, {HELD}"
    next_steps = (f"Train with lr={rate:.3g}, {HELD}.",)
    return RunSymptom(
        "falling_learning_rate", severity, cuts[0], evidence, level, remedies=next_steps, is_tried=True
    )


def _recorded(log: RunLog, outcome: Outcome, known: set[str]) -> Iterator[RunSymptom]:
    """Yields recorded incidents of kinds that no other symptom names."""
    by_kind: dict[str, list[Incident]] = defaultdict(list)
    for incident in _with_causes(log.incidents):
        by_kind[incident.kind].append(incident)
    reported = [kind for kind in by_kind if kind not in _RESPONSES and kind not in known]
    last = pending = ""  # before the run was stopped: tests and validation may follow
    for incident in _with_causes(log.incidents):
        pending = incident.kind if incident.kind in reported else pending
        last = pending if incident.action == "stopped" else last
    on_rollback = {step for i in by_kind["rollback"] for step in (i.step - 1, i.step)}
    stops = by_kind["training_diverged"]
    present = present_in(log)
    if outcome.was_stopped and stops and not reported and not known:
        yield _symptom("training_diverged", "fatal", stops, present)
    for kind in reported:
        if outcome.failed_at is not None and kind.startswith("nonfinite"):
            continue  # a consequence of the failure, which is a symptom already
        members = by_kind[kind]
        handled = any(i.action not in ("none", "stopped") or i.step in on_rollback for i in members)
        severity: SymptomSeverity = "minor"
        if (outcome.was_stopped and kind == last) or kind == "exception_in_step":
            severity = "fatal"
        elif handled:
            skipped = {i.step for i in members if i.action == "skipped"}
            severity = (
                "serious" if skipped.issuperset(range(outcome.steps - ENDING, outcome.steps)) else "handled"
            )
        elif _is_diagnosed(kind, members) and not _has_learned_since(kind, members, log, outcome):
            severity = "serious"
        yield _symptom(kind, severity, members, present)


def _with_causes(incidents: Sequence[Incident]) -> list[Incident]:
    """Returns incidents of which those that were not examined are of the kind that began their episode."""
    found, first = [], None
    for incident in incidents:
        if incident.action == "skipped":
            if not incident.examined and first is not None:
                incident = replace(incident, kind=first.kind, advice="")
            elif incident.cause:
                first = incident
        found.append(incident)
    return found


def _is_diagnosed(kind: str, members: Sequence[Incident]) -> bool:
    """True for a symptom that the suite has named by a measurement of its own, with its cause."""
    is_measured = kind in (*INITIALIZATION, "stuck_loss", "vanishing_weights")
    return is_measured or any(i.cause in SYMPTOM_CAUSES for i in members)


def _has_learned_since(kind: str, members: Sequence[Incident], log: RunLog, outcome: Outcome) -> bool:
    """True if the run has learned, also after an incident by which it does not."""
    is_stuck = kind in ("stuck_loss", "constant_clipping") or members[0].cause == "inactive_output"
    losses = [loss for step, loss in log.loss.finite() if step >= members[0].step]
    if not (outcome.has_learned and is_stuck and len(losses) >= MIN_POINTS):
        return outcome.has_learned
    first, final = ends(losses, share=3)
    if members[0].cause in ("targets_out_of_range", "not_log_probabilities") and final < 0:
        return False  # such a loss has no bound
    over_constant = members[0].value if members[0].cause in _MEASURED_RATIO else None
    if kind == "stuck_loss" and over_constant and first > 0 and over_constant * final / first > STUCK:
        return False  # it falls, and is still above that of the best constant
    return first - final > LEARNED * abs(first)


def _details(members: Sequence[Incident]) -> list[str]:
    """Returns different details; of those at one line of code, which differ by their numbers, the first."""
    details: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for incident in members:
        detail = incident.detail.rstrip(".")
        # details of a batch name its samples
        place = detail if incident.cause == "bad_input" else incident.location or detail
        details.setdefault(place, detail)
        counts[place] += 1
    return [
        detail if place == detail or counts[place] == 1 else f"{detail} (the first of {counts[place]} there)"
        for place, detail in details.items()
    ]


def _symptom(
    kind: str, severity: SymptomSeverity, members: Sequence[Incident], present: Collection[Present]
) -> RunSymptom:
    counts: Counter[str] = Counter(i.cause for i in reversed(members) if i.cause)
    causes = [cause for cause, _ in counts.most_common()]  # of equally frequent ones the latest first
    main = next(iter(causes), "")
    example = next(i for i in reversed(members) if i.cause == main)
    steps = [i.step for i in members]
    first, last = min(steps), max(steps)
    count = "once" if len(members) == 1 else f"{len(members)} times"
    evidence = f"{count}, at step {first}" if first == last else f"{count}, from step {first} to {last}"
    actions = Counter(i.action for i in members if i.action != "none")
    evidence += "".join(f"; {n} {label(action)}" for action, n in actions.items())
    for cause in causes or [""]:
        of_some = "" if counts[cause] == len(members) else f" of {counts[cause]}"
        evidence += f"; cause{of_some}: {label(cause)}" if cause else ""
        details = _details([i for i in members if i.cause == cause and i.detail])
        quoted = 1 if cause in OF_WEIGHTS else MAX_DETAILS  # they differ by numbers of elements only
        more = f"; and {len(details) - quoted} more" if len(details) > quoted else ""
        evidence += f": {'; '.join(details[:quoted])}{more}" if details else ""
    value = math.nan if example.value is None else example.value
    # an examination knows more than the cause
    own = tuple(dict.fromkeys(i.advice for i in members if i.advice))[:MAX_DETAILS]
    found = tuple(dict.fromkeys(i.advice for i in members if i.advice and i.cause))[:MAX_DETAILS]
    if kind in INITIALIZATION:  # what a trial on the batch has shown to help
        found = own
    advice = advice_for_cause(main, example.where, present, kind=kind)
    listed = remedies(kind, example.where, present)
    if len(listed) < 2:  # the advice of its kind alone, which the run has with its numbers
        listed = own or listed
    next_steps = found or ((advice,) if advice else listed)
    is_tried = kind in INITIALIZATION and bool(own) and own[0].startswith(CURE)
    return RunSymptom(kind, severity, first, evidence, value, example.where, next_steps, main, is_tried)
