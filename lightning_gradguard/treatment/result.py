"""The result of a treatment, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gradguard import __version__
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.strict_json import to_json
from lightning_gradguard.treatment.candidates import Candidate
from lightning_gradguard.treatment.prescriptions import Prescription
from lightning_gradguard.treatment.trials.trial import Trial, name_of, treated
from lightning_gradguard.treatment.trials.trial_log import content_of
from lightning_gradguard.treatment.verification import SeedResult, TreatmentVerdict

#: Raised when a field of `treatment.json` changes its meaning or is removed; new fields do not raise it.
SCHEMA_VERSION = 1

_HEADLINES: dict[TreatmentVerdict, str] = {
    "healthy": "healthy: nothing is changed",
    "cured": "cured",
    "better": "better, not cured",
    "no_treatment_found": "no treatment found: nothing is changed",
    "budget_too_small": "no trial was made, as the budget is too small",
}


@dataclass(frozen=True, kw_only=True)
class TreatmentResult:
    """The outcome of a treatment: what ailed the program, what was tried, and what makes it train.

    Args:
        verdict: `"healthy"`, `"cured"`, `"better"`, `"no_treatment_found"` or `"budget_too_small"`.
        evidence: What the verdict rests on.
        program: Name of the module's class.
        problems: What the probe has found.
        changes: The changes that make it train; none if there are none, or the suite's callbacks suffice.
        reason: What suggested them.
        prescriptions: What only the user can change.
        probe: The run without changes.
        trials: Every trial, in the order in which they ended.
        verification: Runs with fresh seeds.
        candidates: What was to be tried, with the reasons.
        metric: What is compared.
        budget: In seconds.
        spent: Seconds that were spent.
        steps: Optimizer steps of a trial of full length.
        seed: Of the search.
        notes: Limits that a reader should know.
        folder: Where the files are.
    """

    verdict: TreatmentVerdict
    evidence: str
    program: str
    problems: Sequence[str]
    changes: tuple[Change, ...]
    reason: str
    prescriptions: Sequence[Prescription]
    probe: Trial
    trials: Sequence[Trial]
    verification: Sequence[SeedResult]
    candidates: Sequence[Candidate]
    metric: str
    budget: float
    spent: float
    steps: int
    seed: int
    notes: Sequence[str] = field(default=())
    folder: Path = Path("treatment")

    @property
    def is_treated(self) -> bool:
        """True if a treatment was found, if only the callbacks of the suite."""
        return self.verdict in ("cured", "better")

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        by = f" by {name_of(self.changes)}" if self.is_treated else ""
        if self.verdict == "no_treatment_found" and not (self.problems or self.prescriptions):
            return f"{self.program}: nothing was found that ails it, nor what helps: nothing is changed"
        return f"{self.program}: {_HEADLINES[self.verdict]}{by}"

    @property
    def costs(self) -> dict[str, tuple[float, float]]:
        """Parameters and seconds of a step, of the program as it is and with the changes."""
        after = next((result.treated for result in self.verification), self.probe)
        before = next((result.untreated for result in self.verification), self.probe)
        return {
            "parameters": (self.probe.parameters, after.parameters or self.probe.parameters),
            "seconds_per_step": (before.seconds_per_step, after.seconds_per_step),
        }

    def callbacks(self) -> list[Any]:
        """Returns the callbacks for `Trainer(callbacks=...)` that train as the treated runs did.

        Raises:
            ValueError: If no treatment was found.
        """
        if not self.is_treated:
            raise ValueError(f"There is no treatment: {self.headline}.")
        return treated(self.changes)

    def as_json(self) -> str:
        """Returns `treatment.json`, which `schema.json` describes; nonfinite numbers are strings."""
        before, after = self.costs["parameters"]
        slow, slower = self.costs["seconds_per_step"]
        content = {
            "schema_version": SCHEMA_VERSION,
            "lightning_gradguard": __version__,
            "program": self.program,
            "verdict": self.verdict,
            "evidence": self.evidence,
            "ailments": list(self.problems),
            "changes": [change.as_dict() for change in self.changes],
            "reason": self.reason,
            "prescriptions": [vars(p) for p in self.prescriptions],
            "metric": self.metric,
            "budget_seconds": self.budget,
            "spent_seconds": round(self.spent, 1),
            "steps": self.steps,
            "seed": self.seed,
            "parameters": {"untreated": before, "treated": after},
            "seconds_per_step": {"untreated": slow, "treated": slower},
            "candidates": [
                {"changes": [change.as_dict() for change in c.changes], "reason": c.reason}
                for c in self.candidates
            ],
            "probe": content_of(self.probe),
            "trials": [content_of(trial) for trial in self.trials],
            "verification": [
                {"untreated": content_of(r.untreated), "treated": content_of(r.treated)}
                for r in self.verification
            ],
            "notes": list(self.notes),
        }
        return to_json(content, indent=2)
