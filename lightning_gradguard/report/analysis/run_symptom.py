"""A symptom over the whole run, with its severity and its remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.detectors import Symptom
from lightning_gradguard.core.remedies import remedies

SymptomSeverity = Literal["fatal", "serious", "handled", "minor"]


@dataclass(frozen=True)
class RunSymptom(Symptom):
    """A symptom over the whole run.

    Args:
        kind: Its name, as `core.incidents.title` takes it.
        where: Names of the parameters or modules with the strongest symptom, the worst first.
        value: The measured number.
        severity: `"fatal"`: it ended the run. `"serious"`: it lasted to the end. `"handled"`: a callback
            intervened, and training continued. `"minor"`: no intervention was necessary.
        since: The first step that shows it.
        evidence: The measurement in one sentence.
        remedies: What to do, the likeliest first.
    """

    severity: SymptomSeverity
    since: int
    evidence: str
    remedies: tuple[str, ...]


def run_symptom(
    kind: str, severity: SymptomSeverity, since: int, evidence: str, value: float, where: tuple[str, ...] = ()
) -> RunSymptom:
    """Returns a symptom with the remedies of its kind; for the arguments see `RunSymptom`."""
    return RunSymptom(kind, where, value, severity, since, evidence, remedies(kind, where))
