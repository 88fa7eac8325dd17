"""The hooks with which a callback takes part in the shared step."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl

from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.runtime.steps.step import Step, StepFlags, StepVerdict


class StepMember:
    """Declares what is measured in a step, and acts on the measurement.

    Attributes:
        norm_types: Norm types to measure in addition to 2.
        wants_units: True if norms of single units (rows) are to be measured.
        defers_check: True if `check_step` may be called one step late, without a host synchronization.
        skips_steps: True if the callback carries out the verdict to skip a step, as `NaNRollback` does.
    """

    norm_types: tuple[float, ...] = ()
    wants_units: bool = False
    defers_check: bool = False
    skips_steps: bool = False

    def on_begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: checkpoints are restored and parameters sharded by now."""

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Called when a step was measured and checked, and the optimizer has not stepped.

        Args:
            trainer: The Trainer that runs.
            pl_module: The module in training.
            step: The step; `step.gradients` has names, tensors, norms, and the total norm.
        """

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Called after the optimizers stepped, before checkpoints and validation."""

    def check_step(self, trainer: pl.Trainer, measurement: Measurement) -> StepVerdict:
        """Returns the callback's verdict on a step; called only if overridden, and has no side effect.

        A finite step that is rejected is published as `rejected_step`, with the name of the callback. It
        counts as a skipped step: `patience` of them in a row are a rollback.

        Args:
            trainer: The Trainer that runs.
            measurement: Loss and total norm of the step, on the host, the same on every rank.

        Returns:
            `"accept"`; `"skip"`; or `"ignore"` for a step that a GradScaler skips.
        """
        raise NotImplementedError

    def on_deferred_verdict(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measurement: Measurement,
        verdict: StepVerdict,
    ) -> None:
        """Called with the verdict on the step before, if every check of it was deferred.

        Args:
            trainer: The Trainer that runs.
            pl_module: The module in training.
            measurement: Measurement of the step before.
            verdict: On the step before, which has taken place. If it is `"skip"`, a step that is
                about to be measured does not take place either: its gradients are those of bad weights.
        """

    def step_flags(self) -> StepFlags:
        """Returns flags for the reduction of the next step; called only if overridden."""
        raise NotImplementedError

    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """True if the next step is to be measured for norms of the weights; called only if overridden."""
        raise NotImplementedError

    def final_counts(self) -> Mapping[str, float]:
        """Returns counts of the run, by tag; called at its end, on each rank.

        They are logged to the loggers, once, at the last step.
        """
        return {}

    @property
    def counts_since(self) -> int:
        """Step from which on `final_counts` has counted: above 0 after a resume without its state."""
        return 0

    def overrides(self, hook: str) -> bool:
        """True if the callback implements an optional hook."""
        return getattr(type(self), hook) is not getattr(StepMember, hook)
