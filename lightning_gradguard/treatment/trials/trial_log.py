"""The trials of a treatment in a file, from which a treatment that was stopped continues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.strict_json import to_json
from lightning_gradguard.treatment.trials.program import OF_USER, Program, TreatmentError
from lightning_gradguard.treatment.trials.trial import Job, Trial


class TrialLog:
    """Appends trials to `trials.jsonl`, and returns those that are in it already.

    The first line identifies the program and its batches.

    Args:
        path: The file.
        identity: What a program and its batches are known by.
        steps: Optimizer steps of a trial of full length; those of the file if it has trials.

    Attributes:
        trials: By the keys of their jobs.
        was_resumed: True if the file had trials of this program.

    Raises:
        TreatmentError: If the file has trials of another one; nothing is written then.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], steps: int) -> None:
        self.path = path
        self.steps = steps
        self.trials: dict[str, Trial] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        head = _decoded(lines[0]) if lines else None
        if isinstance(head, dict) and {**head, "steps": 0} == {**identity, "steps": 0}:
            found = [trial_of(content) for line in lines[1:] if (content := _decoded(line))]
            # what an exception or the budget has ended is run again
            self.trials = {trial.job.key: trial for trial in found if not trial.error}
            self.steps = head["steps"] if self.trials else steps
        elif len(lines) > 1:
            raise TreatmentError(
                f"{path} has the trials of another program, or of yours with other code, data or settings. "
                f"Give another folder with --out (out=), or delete {path.parent} if you need it no more."
            )
        self.was_resumed = bool(self.trials)
        first = json.dumps({**identity, "steps": self.steps})
        kept = [first, *(to_json(content_of(trial)) for trial in self.trials.values())]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, trial: Trial) -> None:
        """Appends a trial."""
        self.trials[trial.job.key] = trial
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(content_of(trial)) + "\n")


def identity_of(program: Program, module: nn.Module, probed: Trial) -> dict[str, Any]:
    """Returns what trials of the same program have in common."""
    losses = [f"{loss:.6g}" for _, loss in probed.curve[:5]]
    arguments = {name: str(value) for name, value in program.trainer.items() if name in OF_USER}
    content = [str(module), program.batches.fingerprint, program.seed, losses, sorted(arguments.items())]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return {"module": type(module).__qualname__, "digest": digest}


def content_of(trial: Trial) -> dict[str, Any]:
    """Returns a trial as plain data."""
    fields = {field.name: getattr(trial, field.name) for field in dataclasses.fields(trial)}
    job = fields.pop("job")
    changes = None if job.changes is None else [change.as_dict() for change in job.changes]
    asked = {"seed": job.seed, "steps": job.steps, "enough": job.enough, "patience": job.patience}
    return {"changes": changes, **asked, **fields}


def trial_of(content: Mapping[str, Any]) -> Trial:
    """Returns a trial from plain data."""
    rest = dict(content)
    changes = rest.pop("changes")
    known = None if changes is None else tuple(Change(c["kind"], c["arguments"]) for c in changes)
    ends = rest.pop("enough", None), rest.pop("patience", None)
    job = Job(known, rest.pop("seed"), rest.pop("steps"), *ends)
    for key in ("curve", "training"):
        rest[key] = [(step, float(loss)) for step, loss in rest[key]]
    for key in ("over_constant", "over_permuted", "reachable", "seconds_per_step"):
        rest[key] = float(rest[key])
    rest["metrics"] = {name: float(value) for name, value in rest["metrics"].items()}
    return Trial(job=job, **rest)


def _decoded(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # the line that was being written when the process was killed
        return None
