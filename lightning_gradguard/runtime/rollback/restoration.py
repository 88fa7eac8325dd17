"""Carries out what is decided about bad weights: a rollback, or the end of the run."""

from __future__ import annotations

from typing import Any, NoReturn

import pytorch_lightning as pl

from lightning_gradguard.core import tags
from lightning_gradguard.core.incidents import AT_ANY_RATE
from lightning_gradguard.core.recovery import RecoveryPolicy
from lightning_gradguard.runtime.distributed import any_rank
from lightning_gradguard.runtime.incidents.investigation import Investigation
from lightning_gradguard.runtime.incidents.lost_batches import LostBatches
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.termination import (
    combined_advice,
    divergence_error,
    save_last_good,
)
from lightning_gradguard.runtime.rollback.outcome import Counts
from lightning_gradguard.runtime.rollback.reporter import IncidentReporter
from lightning_gradguard.runtime.rollback.snapshot_schedule import SnapshotSchedule
from lightning_gradguard.runtime.steps import trainer_state
from lightning_gradguard.runtime.steps.side_effects import SideEffects
from lightning_gradguard.runtime.steps.suite import Suite


class Restoration:
    """Restores the snapshots of one fit, and publishes that."""

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        suite: Suite,
        side_effects: SideEffects,
        *,
        policy: RecoveryPolicy,
        counts: Counts,
        snapshots: SnapshotSchedule,
        investigation: Investigation,
        lost_batches: LostBatches,
        reporter: IncidentReporter,
    ) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._suite = suite
        self._side_effects = side_effects
        self._policy = policy
        self._counts = counts
        self._snapshots = snapshots
        self._investigation = investigation
        self._lost_batches = lost_batches
        self._reporter = reporter

    def roll_back(self, *, has_diverged: bool) -> None:
        """Restores a snapshot; bad data, without a divergence, is no reason to doubt the newest one."""
        cause = self._investigation.cause
        is_bad_data = cause == "bad_input" and not has_diverged
        step = self._snapshots.roll_back(self._trainer, again=is_bad_data, trusted=has_diverged)
        self._policy.on_rollback()
        self._lost_batches.mark_undone(step)
        facts: dict[str, Any] = {"value": step, "action": "rolled_back"}
        if cause in AT_ANY_RATE and not has_diverged:
            facts |= {"cause": cause, "advice": "The weights are those of an earlier step."}
        self._reporter.publish("rollback", **facts)

    def stop(self) -> NoReturn:
        """Ends the run, with a checkpoint of the last good state.

        Raises:
            TrainingDivergedError: With the reason, and how to resume.
        """
        if self._policy.stopped_at_first and not self.state_is_nonfinite():
            step, which = self._trainer.global_step, "without the bad step"  # it was skipped, or undone
        else:
            step, which = self._snapshots.restore_newest(self._trainer), "the last qualified ones"
            self._lost_batches.mark_undone(step)
        self._counts.has_stopped = True
        is_bad = any_rank(self.state_is_nonfinite(), self._pl_module.device)  # from the first step on
        last_good = None if is_bad else save_last_good(self._trainer)
        found = self._investigation.found
        self._reporter.publish(
            "training_diverged", action="stopped", advice=combined_advice(found, present_in(self._trainer))
        )
        self._counts.log(self._suite.metrics, self._policy.rollbacks)
        self._suite.metrics.flush(self._trainer, self._pl_module)
        counts = {tag: n for member in self._suite.members for tag, n in member.final_counts().items()}
        scale = counts.get(tags.LR_SCALE, 1.0)
        raise divergence_error(self._trainer, self._policy, step, found, last_good, which, scale)

    def state_is_nonfinite(self) -> bool:
        """Scans the training state, with a host synchronization."""
        return bool(trainer_state.state_is_nonfinite(self._trainer, self._side_effects))
