"""One fit of `NaNRollback`: from steps to commits, skips, rollbacks and their incidents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from lightning_gradguard.core.detectors.optimizer_health import FIRST_STEPS
from lightning_gradguard.core.incidents import OF_OPTIMIZER, label
from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.core.snapshots import StepRandomness
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import gather_objects, largest_of_ranks
from lightning_gradguard.runtime.incidents.dataset_indices import DatasetIndices
from lightning_gradguard.runtime.incidents.journal import run_folder
from lightning_gradguard.runtime.incidents.lost_batches import LostBatches, Reason
from lightning_gradguard.runtime.incidents.replay import SeenBatch, rises_with_data, versions_of
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.rollback.fit_context import FitContext
from lightning_gradguard.runtime.rollback.outcome import BatchOutcome
from lightning_gradguard.runtime.rollback.reporter import IncidentReporter
from lightning_gradguard.runtime.rollback.restoration import Restoration
from lightning_gradguard.runtime.rollback.step_exception import report_step_exception
from lightning_gradguard.runtime.steps import trainer_state
from lightning_gradguard.runtime.steps.check_modes import CheckMode, ClosureCheck, DeferredCheck, ExactCheck
from lightning_gradguard.runtime.steps.step import Step, StepFlags, StepVerdict
from lightning_gradguard.runtime.steps.transaction import StepTransaction, Window

#: Loss and batches of that of the first steps with the highest loss, before there is one.
NO_STEP: tuple[float, Sequence[SeenBatch]] = -math.inf, ()


class RollbackSession:
    """One fit of `NaNRollback`.

    Attributes:
        lost_batches: The log of lost batches.
    """

    def __init__(
        self,
        fit: FitContext,
        *,
        earlier_logs: Sequence[str],
        defers_check: bool,
        kernel_may_skip: bool,
        keeps_batches: bool,
    ) -> None:
        self._fit = fit
        trainer, side_effects = fit.trainer, fit.side_effects
        self._randomness = StepRandomness()
        self._indices = DatasetIndices(trainer) if keeps_batches else None
        self._is_sharded = lightning_api.shards_parameters(trainer)
        self._takes_iterator = lightning_api.takes_iterator(fit.pl_module)
        fit.snapshots.begin(trainer, side_effects)
        fit.policy.is_adversarial = len(trainer.optimizers) > 1
        fit.policy.compares_batches = keeps_batches and fit.pl_module.automatic_optimization
        self._mode: CheckMode = ExactCheck(trainer, side_effects)
        if defers_check:
            self._mode = DeferredCheck(trainer, side_effects, fit.suite, kernel_may_skip=kernel_may_skip)
        self._closure = ClosureCheck(trainer, side_effects)
        has_closure = any(isinstance(o, lightning_api.REPEATS_CLOSURE) for o in trainer.optimizers)
        has_scaler = lightning_api.gradient_scaler(trainer) is not None
        self._around_steps: list[CheckMode] = [self._mode] * has_scaler + [self._closure] * has_closure
        self._reporter = IncidentReporter(fit)
        self.lost_batches = LostBatches(run_folder(trainer), trainer.global_rank, earlier_logs)
        self._restoration = Restoration(fit, self.lost_batches, self._reporter)
        self._keeps_state = fit.snapshots.restores_more_than_tensors or defers_check or has_closure
        self._transaction = StepTransaction(Window(trainer.global_step), state="discarded")
        self._outcome = BatchOutcome()
        self._skipped: list[StepTransaction] = []
        self._first_step = trainer.global_step
        self._highest = NO_STEP
        self._flags = StepFlags()
        self._batch_idx_offset = {trainer.current_epoch: lightning_api.resumed_batch_idx_offset(trainer)}
        self._lost_earlier: dict[tuple[int, int], Reason] = {}
        for earlier in gather_objects(self.lost_batches.earlier()):
            self._lost_earlier.update(earlier)

    def on_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Saves what the forward passes of a step are about to change."""
        trainer = self._fit.trainer
        step, epoch = trainer.global_step, trainer.current_epoch
        if self._takes_iterator:  # what the hook got is of the step before
            batch, batch_idx = None, lightning_api.step_idx(trainer)
        if self._is_sharded:
            lightning_api.reshard_parameters(trainer)
        self._outcome = BatchOutcome()
        batch_in_epoch = batch_idx + self._batch_idx_offset.get(epoch, 0)
        self._reporter.step, self._reporter.batch_idx = step, batch_in_epoch
        if self._transaction.state != "open" or lightning_api.is_swa_bn_update(trainer):
            self._open_transaction(step)
        self._transaction.batch_idx = batch_in_epoch
        window = self._transaction.window
        window.n_batches += 1
        tensors = self.lost_batches.record(step, epoch, batch_in_epoch, batch)
        if self._indices is not None:
            indices, rng = self._indices.next_batch(), self._randomness.before_step()
            seen = SeenBatch(batch, batch_idx, rng, step, indices, tensors, versions_of(tensors))
            window.batches.append(seen)
        if (reason := self._lost_earlier.get((epoch, batch_in_epoch))) is not None:
            window.repeats_skipped_batch |= reason == "skipped"
            self._flags.check_now = True
            self._flags.repeats_lost_batch |= self.lost_batches.repeats_lost_batch()

    def end(self) -> None:
        """Leaves the data loader as it was."""
        if self._indices is not None:
            self._indices.restore()

    def take_flags(self) -> StepFlags:
        """Returns the flags for the next step's reduction; scans count once, the rest holds until a step."""
        flags, side_effects = self._flags, self._fit.side_effects
        if side_effects.has_statistics:  # which may be nonfinite where the loss is finite
            batches = [seen.tensors for seen in self._transaction.window.batches]
            flags.nonfinite_buffers = side_effects.corrupted_statistics(batches)
        if flags.nonfinite_buffers is not None or flags.nonfinite_weights is not None:
            self._flags = StepFlags(repeats_lost_batch=flags.repeats_lost_batch, check_now=flags.check_now)
        return flags

    def on_step(self, step: Step) -> None:
        """Commits or skips a step, or defers that."""
        if self._fit.snapshots.is_empty:
            # by now every callback had its chance to repair the weights that training starts from
            assert self._transaction.window.before is not None
            self._fit.snapshots.capture_first(self._fit.trainer, self._transaction.window.before)
        if self._fit.snapshots.is_copying:
            self._fit.snapshots.wait()
        mode = self._closure if step.inside_closure else self._mode
        closed = mode.on_step(step, self._transaction)
        if closed is not None:
            self._transaction = closed
            self._record(closed)

    def on_deferred_verdict(self, measurement: Measurement, verdict: StepVerdict) -> None:
        """Commits the deferred step, or undoes it along with the batches of the running one."""
        if verdict == "skip":  # what was scanned since is about to be restored
            self._flags.nonfinite_weights = None
        deferred, self._mode.deferred = self._mode.deferred, None
        if deferred is None:
            return
        deferred.measurement = measurement
        if verdict == "accept":
            deferred.state = "committed"
            self._record(deferred)
            return
        deferred.state = "skipped"
        detectors = self._fit.policy.detector_state()  # which include every step before the bad one
        state = self._mode.undo()
        self._fit.policy.load_detector_state(detectors)
        self._fit.snapshots.discard_after(state.step)
        n_following = 0
        if self._transaction.window is not deferred.window:
            n_following = self._transaction.window.n_batches
            self._transaction.state = "discarded"
            self._transaction.window.before = state
        self._record(deferred, n_following)

    def on_batch_end(self, batch_idx: int) -> None:
        """Concludes the batch; resolves a deferred check ahead of validation and the end of an epoch."""
        trainer = self._fit.trainer
        if self._randomness.is_probing:
            self._randomness.after_step()
        if self._takes_iterator:
            batch_idx = lightning_api.step_idx(trainer)
        if not self._fit.suite.has_stepped and lightning_api.is_swa_bn_update(trainer):
            self._check_buffers()
        for mode in self._around_steps:
            closed = mode.on_batch_end(self._transaction)
            if closed is not None:
                self._transaction = closed
                self._record(closed)
        if self._mode.deferred is not None:
            is_last = (
                trainer.is_last_batch or trainer.should_stop or -1 < trainer.max_steps == trainer.global_step
            )
            if is_last or lightning_api.validates_next(trainer, batch_idx):
                self._fit.suite.resolve(trainer, self._fit.pl_module)
        self._conclude()
        if self._fit.suite.has_stepped:
            self._flags.check_now = self._flags.repeats_lost_batch = False
        elif self._fit.pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1:
            self._transaction.state = "discarded"  # `training_step` returned nothing
        if (self._fit.suite.has_stepped and self._fit.suite.is_logged) or trainer.is_last_batch:
            self._fit.counts.log(self._fit.suite.metrics, self._fit.policy.rollbacks)

    def flush(self) -> None:
        """Resolves a deferred check and acts on it."""
        self._fit.suite.resolve(self._fit.trainer, self._fit.pl_module)
        self._conclude()

    def before_checkpoint(self) -> None:
        """Keeps nonfinite weights out of checkpoints: resolves, scans, and rolls back if necessary."""
        if self._fit.snapshots.is_empty or self._fit.counts.has_stopped:
            return
        if self._fit.trainer.interrupted:
            # no collective, as other ranks may be elsewhere, and no error on top of the first
            self._fit.suite.resolve(self._fit.trainer, self._fit.pl_module)
            if self._fit.state_is_nonfinite():
                self._fit.snapshots.restore_newest(self._fit.trainer)
            return
        self.flush()
        if self._fit.is_nonfinite_on_any_rank():
            self._reporter.publish("nonfinite_weights")
            self._outcome.decide(self._fit.policy.escalate())
            self._conclude()

    def report_without_ranks(self) -> None:
        """Publishes skipped steps after an exception, when no other rank can be asked."""
        self._fit.suite.resolve(self._fit.trainer, self._fit.pl_module)
        skipped, self._skipped = self._skipped, []
        for transaction in skipped:
            self._reporter.report_skip(transaction, examine=False)

    def report_exception(self, error: BaseException) -> None:
        """Examines the batch of the running step, if that has raised."""
        if self._transaction.state == "open":
            try:
                report_step_exception(error, self._transaction.window, self._fit, self._reporter)
            except Exception as failed:  # that of the step is the one to raise
                message = f"The step that raised was not examined: {type(failed).__name__}"
                console.print_message(self._fit.trainer, message)

    def _open_transaction(self, step: int) -> None:
        trainer, snapshots = self._fit.trainer, self._fit.snapshots
        if snapshots.is_copying:  # the batch before may have made no step
            snapshots.wait()
        self._fit.side_effects.save()
        if snapshots.is_due:
            snapshots.capture(trainer)
            self._scan_weights()
            self._randomness.probe_next_step()
            self.lost_batches.forget_before(snapshots.oldest_step())
        elif snapshots.misses_parameters(trainer) and self._flags.nonfinite_weights is None:
            self.flush()  # while there is a snapshot to restore
            snapshots.reset(trainer)
        needs_state = self._keeps_state or snapshots.is_empty
        window = Window(step, before=snapshots.state(trainer) if needs_state else None)
        self._transaction = StepTransaction(window)
        for mode in self._around_steps:
            mode.on_window_start(window)

    def _record(self, transaction: StepTransaction, n_following: int = 0) -> None:
        """Counts a closed transaction, and takes the policy's decision on it."""
        if transaction.state == "overflowed":
            scaler = lightning_api.gradient_scaler(self._fit.trainer)
            at_floor = scaler is not None and scaler.get_scale() <= 1
            self._fit.counts.amp_overflows += 1
            self._fit.counts.overflows_at_floor = self._fit.counts.overflows_at_floor + 1 if at_floor else 0
        elif transaction.state == "committed":
            self._on_commit(transaction)
        elif transaction.state == "skipped":
            self._on_skip(transaction, n_following)

    def _on_commit(self, transaction: StepTransaction) -> None:
        measurement = transaction.measurement
        assert measurement is not None
        self._outcome.committed_step = transaction.window.step
        self._fit.counts.overflows_at_floor = 0
        investigation = self._fit.investigation
        investigation.largest_norm = max(investigation.largest_norm, measurement.total_norm)
        if investigation.in_episode:
            investigation.end_episode()
        self._outcome.loss = None if self._fit.policy.is_adversarial else measurement.loss
        if self._fit.suite.rises_with_data:
            self._fit.suite.rises_with_data.clear()
            self._fit.policy.accept_rise(measurement.optimizer_index)
        decision, anomaly = self._fit.policy.on_good_step(
            measurement.optimizer_index,
            measurement.loss,
            measurement.total_norm,
            measurement.is_collapsed,
            distance=self._distance,
            clipped=self._fit.suite.clipped.get(measurement.optimizer_index, 0.0),
        )
        risen: tuple[float, Sequence[SeenBatch]] = measurement.loss, transaction.window.batches
        if transaction.window.step < self._first_step + FIRST_STEPS:
            risen = self._highest = max(risen, self._highest, key=itemgetter(0))
        else:
            self._highest = NO_STEP
        if decision != "continue" and self._fit.policy.risen_loss < math.inf:
            snapshot = self._fit.snapshots.trusted()
            if rises_with_data(self._fit.trainer, self._fit.pl_module, *risen, snapshot):
                self._fit.policy.accept_rise(measurement.optimizer_index)
                decision, anomaly = "continue", ""
            self._highest = NO_STEP
        self._outcome.has_diverged |= decision != "continue"
        self._outcome.decide(decision)
        if anomaly and not self._fit.trainer.interrupted:  # other ranks may be elsewhere then
            loss = self._fit.policy.risen_loss if anomaly == "divergence" else measurement.loss
            self._reporter.report_anomaly(anomaly, loss, transaction.window.batches)

    def _on_skip(self, transaction: StepTransaction, n_following: int) -> None:
        measurement, window = transaction.measurement, transaction.window
        assert measurement is not None
        self._outcome.has_skipped = True
        self._outcome.before = window.before
        self._skipped.append(transaction)
        self.lost_batches.mark_skipped(window.n_batches, n_following)
        if measurement.repeats_lost_batch:
            self._fit.counts.skips += window.repeats_skipped_batch
            return
        self._fit.counts.skips += 1
        self._outcome.decide(
            self._fit.policy.on_skip(measurement.optimizer_index, not measurement.rejected_by)
        )
        if measurement.nonfinite_weights:
            self._outcome.decide(self._fit.policy.escalate())

    def _check_buffers(self) -> None:
        self._transaction.state = "discarded"
        if self._fit.is_nonfinite_on_any_rank():
            self._fit.side_effects.restore()
            self.lost_batches.mark_skipped(1)
            self._fit.counts.skips += 1
            self._reporter.publish("nonfinite_buffers", action="skipped")

    def _conclude(self) -> None:
        """Publishes skipped steps, and carries out the decision."""
        skipped, self._skipped = self._skipped, []
        outcome = self._outcome
        for transaction in skipped:
            self._reporter.report_skip(transaction, ends_run=outcome.decision == "stop")
            # a deferred check finds it in the next batch
            self._reporter.step, self._reporter.batch_idx = transaction.window.step, transaction.batch_idx
        decision, outcome.decision = outcome.decision, "continue"
        policy, cause = self._fit.policy, self._fit.investigation.cause
        if decision == "roll_back" and policy.is_useless and cause in OF_OPTIMIZER:
            decision = policy.stop_for(f"a rollback does not help against its cause ({label(cause)})")
        if decision != "continue":
            self._fit.suite.discard_deferred()
            self._mode.deferred = None
        if decision == "stop":
            self._restoration.stop()
        if decision == "roll_back":
            outcome.committed_step = None
            self._restoration.roll_back(has_diverged=outcome.has_diverged)
            self._flags.nonfinite_weights = None
        elif skipped:
            if outcome.before is not None and outcome.committed_step is None:
                outcome.before.rewind(self._fit.trainer)
            self._scan_weights()
        if outcome.committed_step is not None and not outcome.has_skipped and not policy.is_spiking:
            self._fit.snapshots.on_good_step(outcome.committed_step, outcome.loss)
        outcome.committed_step = None  # it is counted once, also if a checkpoint resolves it early

    def _distance(self) -> float:
        """Returns the distance of the weights from the last trusted snapshot, the same on every rank."""
        if self._fit.snapshots.is_empty or self._fit.trainer.interrupted:  # other ranks may be elsewhere
            return 0.0
        return largest_of_ranks(self._fit.snapshots.distance(self._fit.trainer), self._fit.pl_module.device)

    def _scan_weights(self) -> None:
        """Scans the weights without a synchronization; the next step's reduction includes the flag."""
        self._flags.nonfinite_weights = trainer_state.state_is_nonfinite(
            self._fit.trainer, self._fit.side_effects
        )
