"""Carries out what is decided about bad weights: a rollback, or the end of the run."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from lightning_gradguard.core import tags
from lightning_gradguard.core.incidents import AT_ANY_RATE
from lightning_gradguard.runtime.incidents.lost_batches import LostBatches
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.termination import (
    combined_advice,
    divergence_error,
    save_last_good,
)
from lightning_gradguard.runtime.rollback.fit_context import FitContext
from lightning_gradguard.runtime.rollback.reporter import IncidentReporter


class Restoration:
    """Restores the snapshots of one fit, and publishes that."""

    def __init__(self, fit: FitContext, lost_batches: LostBatches, reporter: IncidentReporter) -> None:
        self._fit = fit
        self._lost_batches = lost_batches
        self._reporter = reporter

    def roll_back(self, *, has_diverged: bool) -> None:
        """Restores a snapshot; bad data, without a divergence, is no reason to doubt the newest one."""
        is_bad_data = self._fit.investigation.cause == "bad_input" and not has_diverged
        # a collapse, or no progress
        learned = has_diverged and self._fit.policy.risen_loss == math.inf
        step = self._fit.snapshots.roll_back(
            self._fit.trainer, again=is_bad_data, trusted=has_diverged, learned=learned
        )
        self._fit.policy.on_rollback()
        self._lost_batches.mark_undone(step)
        facts: dict[str, Any] = {"value": step, "action": "rolled_back"}
        cause = self._fit.investigation.likely_cause
        if cause in (*AT_ANY_RATE, "corrupted_weights", "transient") and not has_diverged:
            facts |= {"cause": cause, "advice": "The weights are those of an earlier step."}
        elif not self._fit.policy.has_good_step:  # no update has made it so
            facts["advice"] = "The weights are those of the start."
        self._reporter.publish("rollback", **facts)

    def stop(self) -> NoReturn:
        """Ends the run, with a checkpoint of the last good state.

        Raises:
            TrainingDivergedError: With the reason, and how to resume.
        """
        if self._fit.policy.stopped_at_first and not self._fit.is_nonfinite_on_any_rank():
            weights = "those without the bad step"  # it was skipped, or undone
        else:
            step = self._fit.snapshots.restore_newest(self._fit.trainer)
            weights = f"the last qualified ones, from before step {step}"
            self._lost_batches.mark_undone(step)
        self._fit.counts.has_stopped = True
        is_bad_from_start = self._fit.is_nonfinite_on_any_rank()
        last_good = None if is_bad_from_start else save_last_good(self._fit.trainer)
        found = self._fit.investigation.found
        self._reporter.publish(
            "training_diverged",
            action="stopped",
            advice=combined_advice(found, present_in(self._fit.trainer)),
        )
        self._fit.counts.log(self._fit.suite.metrics, self._fit.policy.rollbacks)
        self._fit.suite.metrics.flush(self._fit.trainer, self._fit.pl_module)
        counts = {tag: n for member in self._fit.suite.members for tag, n in member.final_counts().items()}
        scale = counts.get(tags.LR_SCALE, 1.0)
        stopped_at = self._reporter.step
        raise divergence_error(
            self._fit.trainer, self._fit.policy, stopped_at, found, last_good, weights, scale
        )
