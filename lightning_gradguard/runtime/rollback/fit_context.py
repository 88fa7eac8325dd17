"""The objects with which one fit of `NaNRollback` works."""

from __future__ import annotations

from dataclasses import dataclass

import pytorch_lightning as pl

from lightning_gradguard.core.recovery import RecoveryPolicy
from lightning_gradguard.runtime.distributed import any_rank
from lightning_gradguard.runtime.incidents.investigation import Investigation
from lightning_gradguard.runtime.rollback.outcome import Counts
from lightning_gradguard.runtime.rollback.snapshot_schedule import SnapshotSchedule
from lightning_gradguard.runtime.steps import trainer_state
from lightning_gradguard.runtime.steps.side_effects import SideEffects
from lightning_gradguard.runtime.steps.suite import Suite


@dataclass(frozen=True)
class FitContext:
    """The objects with which one fit of `NaNRollback` works.

    Args:
        trainer: The Trainer that fits.
        pl_module: Its module.
        suite: What its callbacks share.
        side_effects: Of forward passes, saved before each step.
        policy: Decides if training continues.
        counts: Of the whole run, resumed parts included.
        snapshots: Of the training state.
        investigation: Finds causes by replaying batches.
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    suite: Suite
    side_effects: SideEffects
    policy: RecoveryPolicy
    counts: Counts
    snapshots: SnapshotSchedule
    investigation: Investigation

    def state_is_nonfinite(self) -> bool:
        """Scans the training state, with a host synchronization."""
        return bool(trainer_state.state_is_nonfinite(self.trainer, self.side_effects))

    def is_nonfinite_on_any_rank(self) -> bool:
        """Scans the training state of all ranks. Collective."""
        return any_rank(self.state_is_nonfinite(), self.pl_module.device)
