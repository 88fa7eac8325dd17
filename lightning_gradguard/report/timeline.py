"""Timeline of a run: first signs of symptoms, incidents, the failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from lightning_gradguard.core.incidents import Incident, label, title
from lightning_gradguard.report.analysis.run_log import RunLog
from lightning_gradguard.report.analysis.verdict import RunVerdict

#: Most entries for incidents; neighbours are merged until they fit.
MAX_ENTRIES = 12

#: Kinds that are interventions themselves, so that their action adds nothing.
_INTERVENTIONS = ("rollback", "learning_rate_backoff", "training_diverged")


@dataclass(frozen=True)
class TimelineEntry:
    """An event, from its first to its last step; they are equal for a single step."""

    first_step: int
    last_step: int
    text: str

    @property
    def steps(self) -> str:
        """The steps in words.

        Example:
            >>> TimelineEntry(40, 58, "Nonfinite loss (12 times), skipped").steps
            'steps 40 to 58'
        """
        first, last = self.first_step, self.last_step
        return f"step {first}" if first == last else f"steps {first} to {last}"


def timeline(log: RunLog, verdict: RunVerdict) -> list[TimelineEntry]:
    """Returns the events of a run in the order of steps."""
    recorded = {incident.kind for incident in log.incidents}
    entries = []
    for symptom in verdict.symptoms:
        if symptom.kind not in recorded:
            where = f" at {symptom.where[0]}" if symptom.where else ""
            text = f"First sign of {title(symptom.kind, symptom.cause)}{where}"
            entries.append(TimelineEntry(symptom.since, symptom.since, text))
    entries += _merged(log.incidents) if recorded else _counted(log)
    failed_at = verdict.outcome.failed_at
    if failed_at is not None:
        entries.append(TimelineEntry(failed_at, failed_at, "Nonfinite from here to the end"))
    return sorted(entries, key=lambda entry: entry.first_step)


def _merged(incidents: Sequence[Incident]) -> list[TimelineEntry]:
    """Returns at most `MAX_ENTRIES` entries: repeats in one, then neighbours across the smallest gaps."""
    ordered = sorted(incidents, key=lambda incident: incident.step)
    groups = [list(group) for _, group in groupby(ordered, key=lambda i: (title(i.kind, i.cause), i.action))]
    gaps = sorted(range(1, len(groups)), key=lambda i: groups[i - 1][-1].step - groups[i][0].step)
    starts = sorted({0, *gaps[: MAX_ENTRIES - 1]})
    merged = (groups[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True))
    return [_entry([*chain.from_iterable(neighbours)]) for neighbours in merged] if groups else []


def _entry(members: Sequence[Incident]) -> TimelineEntry:
    if len(members) == 1:
        text = _event(members[0])
    else:
        counts = Counter((i.kind, title(i.kind, i.cause), i.action) for i in members)
        text = "; ".join(
            f"{name}{f' ({n} times)' if n > 1 else ''}{_action(kind, action)}"
            for (kind, name, action), n in counts.items()
        )
    return TimelineEntry(members[0].step, members[-1].step, text[:1].upper() + text[1:])


def _event(incident: Incident) -> str:
    if incident.kind == "rollback" and incident.value is not None:
        return f"rolled back to step {incident.value:.0f}"
    if incident.kind == "learning_rate_backoff" and incident.value is not None:
        return f"learning rate scaled by {incident.value:.3g}"
    where = f" at {incident.where[0]}" if incident.where else ""
    cause = f"; cause: {label(incident.cause)}" if incident.cause else ""
    return f"{title(incident.kind, incident.cause)}{where}{_action(incident.kind, incident.action)}{cause}"


def _action(kind: str, action: str) -> str:
    return "" if action == "none" or kind in _INTERVENTIONS else f", {label(action)}"


def _counted(log: RunLog) -> list[TimelineEntry]:
    """Returns skips and rollbacks from their counters, for runs without a file of incidents."""
    entries = []
    for series, name in ((log.skips, "Skipped"), (log.rollbacks, "Rolled back")):
        points = list(zip(series.steps, series.values, strict=True))
        increases = [(s, b - a) for (_, a), (s, b) in zip(points, points[1:], strict=False) if b > a]
        if increases:
            total = sum(n for _, n in increases)
            times = f" {total:.0f} times" if total > 1 else ""
            entries.append(TimelineEntry(increases[0][0], increases[-1][0], f"{name}{times}"))
    return entries
