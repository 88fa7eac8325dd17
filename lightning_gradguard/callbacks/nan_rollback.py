"""The callback that skips a sick step, and goes back when skipping is not enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from lightning_gradguard.core.diagnosis import advice
from lightning_gradguard.core.recovery import Decision, Recovery
from lightning_gradguard.core.snapshots import Snapshot, SnapshotRing, all_finite
from lightning_gradguard.runtime import lightning_api, training_state
from lightning_gradguard.runtime.distributed import any_rank
from lightning_gradguard.runtime.incidents import (
    TrainingDivergedError,
    incident_now,
    incidents_file,
    open_journal,
    publish,
)
from lightning_gradguard.runtime.optimizer import drop_gradients
from lightning_gradguard.runtime.step import (
    Measurement,
    Step,
    StepCallback,
    Verdict,
    is_logging_step,
    suite_of,
)
from lightning_gradguard.runtime.traces import Traces
from lightning_gradguard.runtime.training_state import Companions


@dataclass
class _Batch:
    """What the running batch came to."""

    accepted: bool = False
    skipped: bool = False
    decision: Decision = "go on"
    first_closure: Step | None = None


class NaNRollback(StepCallback):
    """Skips a step whose loss or gradients are nonfinite; goes back when skipping is not enough.

    A skipped step leaves no trace: weights, optimizer state, buffers, weight averages, torchmetrics states
    and logged epoch means are as if the batch had never been served. (`trainer.global_step` and learning
    rate schedules move on.) After `patience` skips in a row, nonfinite weights, or a spike of loss and
    gradient norm that does not clear within 10 steps, training state goes back in place to the last
    *qualified* snapshot: finite on all ranks and followed by 10 good steps. A rollback before another
    snapshot is qualified goes one further back. Under a GradScaler, an overflow (finite loss, nonfinite
    gradients) is left to the scaler and counted, until it repeats `patience` times at a scale of 1 or less.
    Under LBFGS a batch is the unit: it is put back if it began, or left anything, nonfinite.

    Any callback may go back along with the weights: if it has `snapshot_state_dict()` and
    `load_snapshot_state_dict(state)`, these are called when a snapshot is taken and restored.

    | tag | value |
    |---|---|
    | `rollback/skips` | steps skipped so far |
    | `rollback/rollbacks` | times gone back so far |
    | `rollback/amp_overflows` | overflows left to the GradScaler so far |

    Args:
        patience: Skipped steps in a row (of one optimizer) after which training goes back; at least 1.
        snapshot_every_n_steps: A snapshot is taken after this many accepted steps; at least 1.
        keep_snapshots: Qualified snapshots kept in memory; one that is not yet qualified comes on top. Each
            takes the memory of the trained weights, the buffers and the optimizer's state.
        max_rollbacks: After so many, the next one stops the run; 0 or more.
        snapshot_device: `"cpu"` keeps snapshots in host memory, `"same"` beside the weights.
        restore_rng: Whether a rollback also puts random number generators back.
        rewind_schedulers: Whether a rollback also puts learning rate schedules back.
        max_skip_fraction: If more than this share of the last 100 steps was skipped, the run stops; in
            (0, 1].
        incident_dir: Folder of `incidents.jsonl`; the run's own folder if `None`.

    Raises:
        ValueError: If an argument is out of range.
        TrainingDivergedError: From `fit`, when a budget is used up. Weights are then those of the newest
            qualified snapshot.

    Example:
        >>> from lightning_gradguard import NaNRollback
        >>> rollback = NaNRollback(patience=5, snapshot_every_n_steps=100)
    """

    def __init__(
        self,
        patience: int = 3,
        snapshot_every_n_steps: int = 50,
        keep_snapshots: int = 2,
        max_rollbacks: int = 10,
        snapshot_device: Literal["cpu", "same"] = "cpu",
        restore_rng: bool = False,
        rewind_schedulers: bool = False,
        max_skip_fraction: float = 0.5,
        incident_dir: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("patience", patience, 1),
            ("snapshot_every_n_steps", snapshot_every_n_steps, 1),
            ("keep_snapshots", keep_snapshots, 1),
            ("max_rollbacks", max_rollbacks, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
        if snapshot_device not in ("cpu", "same"):
            raise ValueError(f"snapshot_device={snapshot_device!r} must be 'cpu' or 'same'.")
        if not 0 < max_skip_fraction <= 1:
            raise ValueError(f"max_skip_fraction={max_skip_fraction!r} must be in (0, 1].")
        self.patience = patience
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.max_rollbacks = max_rollbacks
        self.restore_rng = restore_rng
        self.rewind_schedulers = rewind_schedulers
        self.max_skip_fraction = max_skip_fraction
        self.incident_dir = incident_dir
        self.state_arguments = {"patience": patience}
        self.skips = 0
        self.amp_overflows = 0
        self._overflows_at_floor = 0
        self._accepted_since_snapshot = 0
        self._recovery = Recovery(patience, max_rollbacks, max_skip_fraction)
        self._ring = SnapshotRing(keep_snapshots, device=snapshot_device)
        self._batch = _Batch()

    @property
    def rollbacks(self) -> int:
        """How often training went back."""
        return self._recovery.rollbacks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the suite and choose where incidents are written."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            open_journal(trainer, self.incident_dir)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget snapshots of another fit."""
        self._ring.clear()
        self._accepted_since_snapshot = 0
        self._snapshot_is_due = False
        self._n_trained = training_state.count_trained(trainer)
        self._traces = Traces(trainer, pl_module)
        self._window_is_open = False
        repeats = any(map(lightning_api.calls_closure_repeatedly, trainer.optimizers))
        self._before_batch = Snapshot("same") if repeats else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the forward passes of a step are about to change."""
        self._batch = _Batch()
        self._batch_idx = batch_idx
        if self._snapshot_is_due:
            # only now have all callbacks, averages among them, seen the step before
            self._snapshot_is_due = False
            companions = self._companions_of(trainer)
            self._ring.capture(lambda s: training_state.capture(trainer, s, companions))
            self._look_at_weights(trainer)
        if not self._window_is_open:
            self._window_is_open = True
            self._traces.keep()
        n_trained = training_state.count_trained(trainer)
        if n_trained != self._n_trained and not suite_of(trainer).weights_are_nonfinite:
            # fine-tuning has unfrozen weights that no snapshot holds: start anew from here
            self._ring.clear()
            self._n_trained = n_trained
        if len(self._ring) == 0 or self._before_batch is not None:
            self._companions = self._companions_of(trainer)
        if self._before_batch is not None:
            training_state.capture(trainer, self._before_batch, self._companions)

    def judge(self, trainer: pl.Trainer, measurement: Measurement) -> Verdict:
        """A nonfinite step is never accepted."""
        if measurement.nonfinite_losses or measurement.nonfinite_weights:
            return "drop"
        if measurement.nonfinite_gradients == 0 and math.isfinite(measurement.total_norm):
            return "accept"
        scaler = lightning_api.gradient_scaler(trainer)
        return "drop" if scaler is None or self._overflows_at_floor >= self.patience else "ignore"

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Drop a sick step, and decide whether that is enough."""
        if len(self._ring) == 0:
            # by now every callback has had its chance to repair the weights that training starts from
            buffers = self._traces.buffers
            self._ring.capture(
                lambda s: training_state.capture(trainer, s, self._companions, buffers),
                qualified=True,
            )
        if step.inside_closure:
            self._batch.first_closure = self._batch.first_closure or step
            return
        self._window_is_open = False
        if step.verdict == "drop":
            drop_gradients(
                step.optimizer,
                unscales_itself=lightning_api.gradients_are_scaled(trainer, step.optimizer),
            )
            self._traces.undo()
            self._reject(trainer, pl_module, step)
        elif step.verdict == "ignore":
            self._leave_to_scaler(trainer)
        else:
            self._accept(trainer, pl_module, step)

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Go back if that is due; else see whether the next snapshot is."""
        if self._batch.first_closure is not None:
            self._settle_closures(trainer, pl_module, self._batch.first_closure)
        if self._batch.decision == "give up":
            self._give_up(trainer, pl_module)
        if self._batch.decision == "go back":
            self._go_back(trainer, pl_module)
        elif self._batch.skipped:
            self._look_at_weights(trainer)
        elif self._batch.accepted and not self._recovery.is_spiking:
            self._ring.good_step()
            self._accepted_since_snapshot += 1
            if self._accepted_since_snapshot >= self.snapshot_every_n_steps and not self._ring.is_pending:
                self._accepted_since_snapshot = 0
                self._snapshot_is_due = True
        stepped = suite_of(trainer).has_stepped
        if (stepped and is_logging_step(trainer)) or trainer.is_last_batch:
            self._report(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave other callbacks as they were."""
        lightning_api.resume_weight_averages(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave other callbacks as they were."""
        lightning_api.resume_weight_averages(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Counters and detectors; snapshots are not part of it."""
        return {
            "skips": self.skips,
            "amp_overflows": self.amp_overflows,
            "overflows_at_floor": self._overflows_at_floor,
            "recovery": self._recovery.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved counters and detectors."""
        self.skips = state_dict["skips"]
        self.amp_overflows = state_dict["amp_overflows"]
        self._overflows_at_floor = state_dict["overflows_at_floor"]
        self._recovery.load_state_dict(state_dict["recovery"])

    def snapshot_state_dict(self) -> dict[str, Any]:
        """The detectors' windows, which go back with the weights."""
        return self._recovery.windows()

    def load_snapshot_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the detectors' windows back."""
        self._recovery.load_windows(state_dict)

    def _accept(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        measurement = _measured(step)
        self._batch.accepted = True
        self._overflows_at_floor = 0
        self._traces.accept()
        if len(trainer.optimizers) > 1:
            self._traces.keep()  # a later step of the same batch may be dropped, this one stays
        index = step.optimizer_index
        self._decide(self._recovery.stepped(index, measurement.loss, measurement.total_norm))
        if self._recovery.spike_began(index):
            self._publish(trainer, pl_module, "loss_spike", value=measurement.loss)

    def _reject(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        measurement = _measured(step)
        self._batch.skipped = True
        self.skips += 1
        self._decide(self._recovery.skipped(step.optimizer_index))
        if measurement.nonfinite_weights:
            self._decide(self._recovery.fall())
            self._publish(trainer, pl_module, "nonfinite_weights", action="skipped")
        elif measurement.nonfinite_losses:
            self._publish(trainer, pl_module, "nonfinite_loss", action="skipped")
        elif lightning_api.gradient_scaler(trainer) is not None:
            self._publish(trainer, pl_module, "amp_overflow", action="skipped")
        else:
            finite = torch.isfinite(step.gradients.norms).tolist()
            self._publish(
                trainer,
                pl_module,
                "nonfinite_gradient",
                where=tuple(n for n, ok in zip(step.gradients.names, finite, strict=True) if not ok),
                value=measurement.nonfinite_gradients / len(finite),
                action="skipped",
            )

    def _leave_to_scaler(self, trainer: pl.Trainer) -> None:
        """An overflow: the scaler skips the step and lowers its scale, as long as it can."""
        self.amp_overflows += 1
        lightning_api.pause_weight_averages(trainer)
        scaler = lightning_api.gradient_scaler(trainer)
        at_floor = scaler is not None and scaler.get_scale() <= 1
        self._overflows_at_floor = self._overflows_at_floor + 1 if at_floor else 0

    def _settle_closures(self, trainer: pl.Trainer, pl_module: pl.LightningModule, first: Step) -> None:
        """Accept or take back a batch in which an optimizer stepped between evaluations."""
        self._window_is_open = False
        sick = not all_finite(training_state.trained_tensors(trainer))
        if any_rank(sick, pl_module.device) or first.verdict == "drop":
            assert self._before_batch is not None
            training_state.restore(trainer, self._before_batch)
            self._traces.undo()
            self._reject(trainer, pl_module, first)
        else:
            self._accept(trainer, pl_module, first)

    def _decide(self, decision: Decision) -> None:
        if self._batch.decision != "give up" and decision != "go on":
            self._batch.decision = decision

    def _go_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        snapshot = self._ring.go_back()
        training_state.restore(trainer, snapshot)
        self._recovery.went_back()
        self._accepted_since_snapshot = 0
        suite_of(trainer).weights_are_nonfinite = False
        self._publish(trainer, pl_module, "rollback", value=snapshot.companions.step, action="rolled back")

    def _give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        snapshot = self._ring.newest()
        training_state.restore(trainer, snapshot)
        self._publish(trainer, pl_module, "training_diverged", action="stopped")
        self._report(trainer)
        suite_of(trainer).report.send(trainer, pl_module)
        file = incidents_file(trainer)
        raise TrainingDivergedError(
            f"Training was stopped at step {trainer.global_step} after {self.rollbacks} rollbacks "
            f"(max_rollbacks={self.max_rollbacks}) and {self.skips} skipped steps "
            f"(max_skip_fraction={self.max_skip_fraction:g}); weights are those of step "
            f"{snapshot.companions.step}, the last that were proven good. "
            f"{advice('training_diverged')}" + (f" What happened: {file}" if file else "")
        )

    def _companions_of(self, trainer: pl.Trainer) -> Companions:
        return Companions.of(trainer, rng=self.restore_rng, schedules=self.rewind_schedulers)

    def _look_at_weights(self, trainer: pl.Trainer) -> None:
        """Read the weights; what is found rides in the reduction of the next step."""
        sick = not all_finite(training_state.trained_tensors(trainer))
        suite_of(trainer).weights_are_nonfinite = sick

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: str, **facts: Any) -> None:
        where = facts.get("where", ())
        publish(
            trainer,
            pl_module,
            incident_now(trainer, kind, batch_idx=self._batch_idx, advice=advice(kind, where), **facts),
        )

    def _report(self, trainer: pl.Trainer) -> None:
        counts = {
            "rollback/skips": float(self.skips),
            "rollback/rollbacks": float(self.rollbacks),
            "rollback/amp_overflows": float(self.amp_overflows),
        }
        report = suite_of(trainer).report
        report.add_scalars(counts)
        report.publish_total("rollback/skips", counts["rollback/skips"])
        report.publish_total("rollback/rollbacks", counts["rollback/rollbacks"])


def _measured(step: Step) -> Measurement:
    assert step.measurement is not None  # a suite with a judge measures on the host
    return step.measurement
