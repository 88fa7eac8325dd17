"""A symptom as hindsight sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.detectors import Symptom
from lightning_gradguard.core.remedies import remedies

Severity = Literal["fatal", "serious", "handled", "minor"]


@dataclass(frozen=True)
class RunSymptom(Symptom):
    """A symptom as hindsight sees it.

    Args:
        kind: Its name, as `core.incidents.title` takes it.
        where: Names of the parameters or modules that show it most, the worst first.
        value: The number that gave it away.
        severity: `"fatal"`: the run ended of it. `"serious"`: it was there to the end. `"handled"`: something
            was done about it, and the run went on. `"minor"`: it is worth knowing.
        since: The step at which it showed first.
        evidence: What was seen, in one sentence.
        remedies: What to do, the likeliest first.
    """

    severity: Severity
    since: int
    evidence: str
    remedies: tuple[str, ...]


def run_symptom(
    kind: str, severity: Severity, since: int, evidence: str, value: float, where: tuple[str, ...] = ()
) -> RunSymptom:
    """A symptom with the remedies of its kind; for the arguments see `RunSymptom`."""
    return RunSymptom(kind, where, value, severity, since, evidence, remedies(kind, where))
