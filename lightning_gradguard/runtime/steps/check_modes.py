"""The ways in which a step is checked, and committed or skipped."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from lightning_gradguard.core.snapshots import Snapshot
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import any_rank
from lightning_gradguard.runtime.optimizer_hooks import drop_gradients, skip_is_exact
from lightning_gradguard.runtime.steps import trainer_state
from lightning_gradguard.runtime.steps.side_effects import SideEffects
from lightning_gradguard.runtime.steps.skipped_hooks import suppress_errors_of_hooks
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.suite import Suite
from lightning_gradguard.runtime.steps.trainer_state import TrainerState
from lightning_gradguard.runtime.steps.transaction import StepTransaction, Window


class CheckMode:
    """A way in which steps are checked, and committed or skipped.

    Attributes:
        deferred: A step that took place, and whose check is due.
    """

    def __init__(self, trainer: pl.Trainer, side_effects: SideEffects) -> None:
        self._trainer = trainer
        self._side_effects = side_effects
        self._has_several = len(trainer.optimizers) > 1
        self.deferred: StepTransaction | None = None

    def on_window_start(self, window: Window) -> None:
        """Called before the first forward pass of a window."""

    def on_step(self, step: Step, transaction: StepTransaction) -> StepTransaction | None:
        """Called for each step of an optimizer; returns its transaction unless it stays open."""
        raise NotImplementedError

    def on_batch_end(self, transaction: StepTransaction) -> StepTransaction | None:
        """Called after the optimizers have stepped; returns the transaction if it is closed by that."""
        return None

    def undo(self) -> TrainerState:
        """Undoes the deferred step; returns the state from before it that is not tensors."""
        raise NotImplementedError

    def _commit(self) -> None:
        if self._side_effects.has_averages:
            lightning_api.resume_weight_averages(self._trainer)
        if self._has_several:
            # a later step of the same batch may be skipped, this one stays
            self._side_effects.save(within_step=True)


class ExactCheck(CheckMode):
    """Checks each step before it takes place: one host synchronization a step."""

    _scaler_state: dict[str, Any] | None = None

    def on_step(self, step: Step, transaction: StepTransaction) -> StepTransaction:
        """Commits the step, skips it, or leaves it to the GradScaler."""
        if step.verdict == "skip":
            if (scaler := lightning_api.gradient_scaler(self._trainer)) is not None:
                self._scaler_state = scaler.state_dict()
            unscales_itself = lightning_api.gradients_are_scaled(self._trainer, step.optimizer)
            drop_gradients(step.optimizer, unscales_itself=unscales_itself)
            suppress_errors_of_hooks(self._trainer.lightning_module)
            self._side_effects.restore()
            return transaction.close("skipped", step)
        if step.verdict == "ignore":
            self._leave_to_scaler(step.optimizer)
            return transaction.close("overflowed", step)
        self._commit()
        return transaction.close("committed", step)

    def on_batch_end(self, transaction: StepTransaction) -> StepTransaction | None:
        """Restores the GradScaler, which takes a skipped step for an overflow that a smaller scale cures."""
        state, self._scaler_state = self._scaler_state, None
        lightning_api.set_scaler_state(self._trainer, state)
        return None

    def _leave_to_scaler(self, optimizer: Optimizer) -> None:
        self._scaler_state = None
        if not lightning_api.gradients_are_scaled(self._trainer, optimizer):
            # the scaler does not know of what was written to gradients after it had unscaled them
            drop_gradients(optimizer, unscales_itself=False)
            suppress_errors_of_hooks(self._trainer.lightning_module)
        lightning_api.pause_weight_averages(self._trainer)


class DeferredCheck(ExactCheck):
    """Checks each step when the next one is about to be made: no host synchronization.

    `kernel_may_skip` is true if the verdict follows the rule by which a fused optimizer's kernel skips.
    """

    def __init__(
        self, trainer: pl.Trainer, side_effects: SideEffects, suite: Suite, *, kernel_may_skip: bool
    ) -> None:
        super().__init__(trainer, side_effects)
        self._suite = suite
        self._kernel_may_skip = kernel_may_skip
        self._before = Snapshot("same")

    def on_step(self, step: Step, transaction: StepTransaction) -> StepTransaction:
        """Keeps what is needed to undo the step, unless the host knows already that it is good.

        It is less if the optimizer's kernel skips a bad one by itself.
        """
        if not step.is_deferred:
            return super().on_step(step, transaction)
        has_one_rule = self._kernel_may_skip and self._suite.has_one_checker
        if not has_one_rule or step.measurement is None or step.measurement.must_skip:
            self._prepare_undo(step, transaction.window, has_one_rule=has_one_rule)
        self.deferred = transaction.close("deferred", step)
        self._commit()
        return self.deferred

    def _prepare_undo(self, step: Step, window: Window, *, has_one_rule: bool) -> None:
        assert window.before is not None
        kernel_skips = (
            has_one_rule
            and step.supports_fused_override
            and not lightning_api.writes_after_step(self._trainer.lightning_module)
            and skip_is_exact(step.optimizer, step.gradients.parameters)
        )
        trainer_state.capture(
            self._trainer, self._before, window.before, self._side_effects, stepped=not kernel_skips
        )
        if kernel_skips:
            self._suite.override_fused_step(step, found_inf=step.packed.must_skip())

    def undo(self) -> TrainerState:
        """Restores the state from before the deferred step."""
        state = trainer_state.restore(self._trainer, self._before, self._side_effects)
        self._side_effects.save(within_step=True)
        return state


class ClosureCheck(CheckMode):
    """Checks a batch in which the optimizer evaluates its closure and updates repeatedly (LBFGS)."""

    def __init__(self, trainer: pl.Trainer, side_effects: SideEffects) -> None:
        super().__init__(trainer, side_effects)
        self._before = Snapshot("same")
        self._first: Step | None = None

    def on_window_start(self, window: Window) -> None:
        """Copies the training state, as the updates in between cannot be prevented."""
        self._first = None
        assert window.before is not None
        trainer_state.capture(self._trainer, self._before, window.before, self._side_effects)

    def on_step(self, step: Step, transaction: StepTransaction) -> None:
        """Keeps the first evaluation."""
        self._first = self._first or step

    def on_batch_end(self, transaction: StepTransaction) -> StepTransaction | None:
        """Commits the batch, or restores the state from before it; `None` if no optimizer stepped."""
        first, self._first = self._first, None
        if first is None:
            return None
        nonfinite = bool(trainer_state.state_is_nonfinite(self._trainer, self._side_effects))
        if any_rank(nonfinite, self._trainer.lightning_module.device) or first.verdict == "skip":
            trainer_state.restore(self._trainer, self._before, self._side_effects)
            return transaction.close("skipped", first)
        self._commit()
        return transaction.close("committed", first)
