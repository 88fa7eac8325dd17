"""One trial: a program with some changes, trained for some steps on the recorded batches."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_gradguard.callbacks.defaults import callbacks_of, default_callbacks
from lightning_gradguard.callbacks.training_diagnosis import TrainingDiagnosis
from lightning_gradguard.core import tags
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.core.remedies.kinds import KINDS
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.logging.silence import messages_silenced
from lightning_gradguard.treatment.trials.held_out import HeldOutLoss
from lightning_gradguard.treatment.trials.program import Program, TreatmentError, described

#: The error of a trial that was not finished for want of time.
OUT_OF_TIME = "the budget was spent before its end"
#: Callbacks of the suite that intervene; they guard each trial with changes, as they do under `fit`.
WATCHING = ("initialization_check", "gradient_norm_monitor", "training_diagnosis")


@dataclass(frozen=True)
class Job:
    """A trial to run.

    Args:
        changes: Changes of the program, under the suite's guard; `None` for the program as it is, without.
        seed: Of the module, and of all that it draws.
        steps: Optimizer steps.
        enough: Held-out loss at which it ends before; `None` for a run of all its steps.
        patience: Optimizer steps after which it ends if the held-out loss has not fallen; `None` for a run of
            all its steps.
    """

    changes: tuple[Change, ...] | None
    seed: int
    steps: int
    enough: float | None = None
    patience: int | None = None

    @property
    def key(self) -> str:
        """A text that is equal for equal jobs."""
        changes = None if self.changes is None else [change.as_dict() for change in self.changes]
        ends = [] if self.enough is self.patience is None else [self.enough, self.patience]
        return json.dumps([changes, self.seed, self.steps, *ends], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The outcome of a trial.

    Args:
        job: What was run.
        curve: Step and held-out loss.
        training: Step and loss of the batch.
        over_constant: Final held-out loss over that of the best constant answer; NaN if unknown.
        over_permuted: Final held-out loss over that with permuted targets; NaN if unknown.
        is_likelihood: True if the loss is the negative logarithm of probabilities of classes.
        reachable: Loss over that of the best constant answer that plain learners reach; NaN if unknown.
        metrics: What the program has logged, at the end.
        incidents: Incidents of the run, by kind.
        parameters: Parameters of the module.
        seconds_per_step: Median duration of a step.
        seconds: Duration of the trial.
        error: Why it has no outcome, or not a whole one; empty if it has.
    """

    job: Job
    curve: Sequence[tuple[int, float]] = ()
    training: Sequence[tuple[int, float]] = ()
    over_constant: float = math.nan
    over_permuted: float = math.nan
    is_likelihood: bool = False
    reachable: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    incidents: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0
    seconds_per_step: float = math.nan
    seconds: float = 0.0
    error: str = ""

    @property
    def loss(self) -> float:
        """The final held-out loss; infinite where it is nonfinite or the trial has failed."""
        final = self.curve[-1][1] if self.curve and not self.error else math.inf
        return final if math.isfinite(final) else math.inf

    @property
    def loss_in_words(self) -> str:
        """The final held-out loss with four digits, or that it is nonfinite."""
        return f"{self.loss:.4g}" if math.isfinite(self.loss) else "nonfinite"

    @property
    def reached(self) -> int:
        """Optimizer steps that were made."""
        return min(self.curve[-1][0], self.job.steps) if self.curve else 0

    @property
    def is_undisturbed(self) -> bool:
        """True if no rollback was needed, and nothing has exploded in a run of all its steps."""
        return not any(map(self.incidents.get, ("rollback", "exploding_gradient")))

    def loss_at(self, steps: int) -> float:
        """Returns the held-out loss after a number of optimizer steps; infinite where it is nonfinite."""
        reached = self.curve[-1][0] * steps / self.job.steps if self.curve else 0.0
        losses = [loss for step, loss in self.curve if step <= reached]
        return losses[-1] if losses and math.isfinite(losses[-1]) and not self.error else math.inf

    @property
    def lowest(self) -> float:
        """The lowest held-out loss; infinite if none is finite."""
        return min((loss for _, loss in self.curve if math.isfinite(loss)), default=math.inf)


def name_of(changes: Sequence[Change] | None) -> str:
    """Returns changes in words."""
    if changes is None:
        return "untreated"
    return " + ".join(change.describe() for change in changes) or "the suite's callbacks alone"


def treated(changes: Sequence[Change]) -> list[Any]:
    """Returns the callbacks of a run with changes: those of the changes, and the suite's for the rest."""
    own = callbacks_of(changes)
    omitted: dict[str, Any] = dict.fromkeys(WATCHING)
    guards = [g for g in default_callbacks(**omitted) if not any(isinstance(one, type(g)) for one in own)]
    return [*own, *guards]


def _seeded(changes: Sequence[Change], seed: int) -> list[Change]:
    """Returns changes that draw weights with the seed of the run."""
    return [c.with_arguments(seed=seed) if "seed" in KINDS[c.kind].arguments else c for c in changes]


def run(program: Program, job: Job, deadline: float) -> Trial:
    """Runs a trial; an exception of the program is its outcome."""
    began = time.monotonic()
    steps = program.n_batches(job.steps)
    patience = None if job.patience is None else program.n_batches(job.patience)
    held_out = HeldOutLoss(program.batches.held_out, steps, deadline, enough=job.enough, patience=patience)
    error = ""
    parameters, metrics = 0, {}
    with messages_silenced(logging.CRITICAL), tempfile.TemporaryDirectory() as folder:
        try:
            module = program.module(job.seed)
            callbacks = [] if job.changes is None else treated(_seeded(job.changes, job.seed))
            arguments = {c.kind: c["value"] for c in job.changes or () if c.alters == "trainer"}
            watching: list[Callback] = [held_out]
            # what explodes in a long run is no treatment; short ones of the search end before
            if job.enough is None and (job.patience is None or job.seed != program.seed):
                watching.append(TrainingDiagnosis())
            trainer = program.trainer_of(module, [*callbacks, *watching], job.steps, folder, **arguments)
            program.fit(trainer, module)
            parameters, metrics = sum(p.numel() for p in module.parameters()), logged(trainer)
        except torch.OutOfMemoryError:
            error = "the device is out of memory"
            torch.cuda.empty_cache()
        except TreatmentError as unbuilt:
            error = str(unbuilt)
        except Exception as raised:  # the program's own, or a change that does not fit it
            error = described(raised)
    if held_out.is_out_of_time and not error:
        error = OUT_OF_TIME
    return Trial(
        job=job,
        reachable=program.reachable,
        metrics=metrics,
        parameters=parameters,
        seconds=time.monotonic() - began,
        error=error,
        **held_out.outcome(),
    )


def logged(trainer: pl.Trainer) -> dict[str, float]:
    """Returns what the program itself has logged."""
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    own = tuple(form.partition("/")[0] for form in (tags.GRAD_NORM_TOTAL, tags.SKIPS, tags.LR_SCALE))
    return {name: value for name, value in numbers.items() if not name.startswith(own)}
