"""The callback that skips a sick step, and goes back when skipping is not enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core import tags
from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.core.recovery import OUTCOMES, Decision, RecoveryPolicy
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.core.snapshots import Snapshot
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import any_rank, gather_objects
from lightning_gradguard.runtime.fused_optimizer import skip_is_exact
from lightning_gradguard.runtime.incidents.investigation import Investigation
from lightning_gradguard.runtime.incidents.journal import (
    incident_now,
    open_journal,
    publish,
    run_folder,
)
from lightning_gradguard.runtime.incidents.lost_batches import LostBatches, Reason
from lightning_gradguard.runtime.incidents.replay import SeenBatch
from lightning_gradguard.runtime.incidents.skipped_step import SkippedStep, Window, origin_facts
from lightning_gradguard.runtime.incidents.termination import (
    combined_advice,
    diverged,
    save_last_good,
)
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.optimizer_hooks import drop_gradients
from lightning_gradguard.runtime.rollback import trainer_state
from lightning_gradguard.runtime.rollback.side_effects import SideEffects
from lightning_gradguard.runtime.rollback.snapshot_schedule import SnapshotSchedule
from lightning_gradguard.runtime.rollback.trainer_state import TrainerState
from lightning_gradguard.runtime.steps.step import Step, Verdict
from lightning_gradguard.runtime.steps.suite import StepCallback


@dataclass
class _Batch:
    """What the running batch came to."""

    accepted: bool = False
    accepted_step: int = 0
    skipped: bool = False
    decision: Decision = "continue"
    rewind: TrainerState | None = None
    scaler: dict[str, Any] | None = None
    first_closure: Step | None = None


class NaNRollback(StepCallback):
    """Skips a step whose loss or gradients are nonfinite; goes back when skipping is not enough.

    A skipped step leaves no trace: weights, optimizer state, buffers, weight averages, torchmetrics states
    and logged epoch means are as if the batch had never been served. (`trainer.global_step` and learning
    rate schedules move on.) After `patience` skips in a row, nonfinite weights, a spike of loss and
    gradient norm that does not clear within 10 steps, a divergence, or a collapse (no weight matrix gets a
    gradient any more), training state goes back in place to the last *qualified* snapshot: finite on all
    ranks and followed by 10 good steps. A rollback before another snapshot is qualified goes one further
    back, unless the data was found to be at fault. Under a GradScaler, an overflow (finite loss, nonfinite
    gradients) is left to the scaler and counted, until it repeats `patience` times at a scale of 1 or less.
    Under LBFGS a batch is the unit: it is put back if it began, or left anything, nonfinite.

    The first lost batch of an episode is run once more under watch, and the incident names the operation and
    module that made the first nonfinite value, and the cause. What it takes to see it happen again is left in
    `incidents/<step>/` of the run's folder; `lightning-gradguard replay` reads it.

    No checkpoint that the Trainer writes while it fits holds nonfinite weights. When a budget is used up, the
    last proven state is written to `last_good.ckpt` in the run's folder, from which training can be resumed.
    Batches that were lost are in `lost_batches.rank0.jsonl` there; a resumed run that is served one of them
    again leaves it out.

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
        max_rollbacks: After so many, the next one stops the run; 0 or more. After 500 steps without one, one
            less is counted.
        snapshot_device: `"cpu"` keeps snapshots in host memory (pinned, and written while training goes on),
            `"same"` beside the weights.
        check: `"exact"` waits for the device once a step and never lets a sick step happen. `"deferred"`
            never waits: a step is judged when the next one is about to be made, and both are lost if it was
            sick. A fused optimizer leaves out the sick one by itself; for any other, it takes a copy of the
            training state, beside the weights, at every step. It is judged
            earlier ahead of a checkpoint, validation, the end of an epoch, and on an exception. A GradScaler
            and LBFGS wait for the device anyway, so that under them both are the same.
        restore_rng: Whether a rollback, or a skip, also puts random number generators back.
        rewind_schedulers: Whether a rollback, or a skip, also puts learning rate schedules, and the scale of
            a GradScaler, back; not schedules that move once an epoch, as no epoch is trained again.
        max_skip_fraction: If more than this share of the last 100 steps was skipped, the run stops; in
            (0, 1].
        incident_dir: Folder of `incidents.jsonl`, dossiers and the ledger; the run's own folder if `None`.
        max_dossiers: Episodes that are examined in a run; 0 or more. While it is above 0, references to the
            batches of the running step are kept.
        max_dossier_megabytes: Limit of each dossier; weights are left out first, then the batch.

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
        check: Literal["exact", "deferred"] = "exact",
        restore_rng: bool = False,
        rewind_schedulers: bool = False,
        max_skip_fraction: float = 0.5,
        incident_dir: str | None = None,
        max_dossiers: int = 10,
        max_dossier_megabytes: float = 100.0,
    ) -> None:
        super().__init__()
        self.settings = non_defaults(NaNRollback, locals())
        for name, value, least in (
            ("patience", patience, 1),
            ("snapshot_every_n_steps", snapshot_every_n_steps, 1),
            ("keep_snapshots", keep_snapshots, 1),
            ("max_rollbacks", max_rollbacks, 0),
            ("max_dossiers", max_dossiers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
        if snapshot_device not in ("cpu", "same"):
            raise ValueError(f"snapshot_device={snapshot_device!r} must be 'cpu' or 'same'.")
        if check not in ("exact", "deferred"):
            raise ValueError(f"check={check!r} must be 'exact' or 'deferred'.")
        if not 0 < max_skip_fraction <= 1:
            raise ValueError(f"max_skip_fraction={max_skip_fraction!r} must be in (0, 1].")
        if not max_dossier_megabytes >= 0:
            raise ValueError(f"max_dossier_megabytes={max_dossier_megabytes!r} must be 0 or more.")
        self.max_rollbacks = max_rollbacks
        self.max_skip_fraction = max_skip_fraction
        self.incident_dir = incident_dir
        self.judges_late = check == "deferred"
        self.state_arguments = {"patience": patience}
        self.skips = 0
        self.amp_overflows = 0
        self._patience = patience
        self._rewinds = restore_rng or rewind_schedulers
        self._keeps_batches = max_dossiers > 0
        self._overflows_at_floor = 0
        self._ledger = LostBatches(None, rank=0)
        self._earlier_ledgers: list[str] = []
        self._recovery = RecoveryPolicy(patience, max_rollbacks, max_skip_fraction)
        self._snapshots = SnapshotSchedule(
            keep_snapshots,
            snapshot_every_n_steps,
            snapshot_device,
            rng=restore_rng,
            schedules=rewind_schedulers,
        )
        self._investigation = Investigation(max_dossiers, max_dossier_megabytes)
        self._batch = _Batch()
        self._is_fitting = False
        self._has_given_up = False

    @property
    def rollbacks(self) -> int:
        """How often training went back."""
        return self._recovery.rollbacks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the suite, choose where incidents are written, and stand before every checkpoint."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            open_journal(trainer, self.incident_dir)
            lightning_api.call_before_checkpoints(
                trainer, lambda: self._before_checkpoint(trainer, pl_module)
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with what this fit begins with."""
        super().on_train_start(trainer, pl_module)
        self._is_fitting = True
        self._has_given_up = False
        self._recovery.is_adversarial = len(trainer.optimizers) > 1
        self._traces = SideEffects(trainer, pl_module)
        self._snapshots.begin(trainer, self._traces)
        self._ledger = LostBatches(run_folder(trainer), trainer.global_rank, self._earlier_ledgers)
        self._lost_earlier: dict[tuple[int, int], Reason] = {}
        for earlier in gather_objects(self._ledger.earlier()):
            self._lost_earlier.update(earlier)
        self._told_short = {trainer.current_epoch: lightning_api.resumed_batch_idx_offset(trainer)}
        self._lost: list[SkippedStep] = []
        self._window = Window(trainer.global_step, [], None)
        self._window_is_open = False
        self._unjudged: SkippedStep | None = None
        self._repeats = any(map(lightning_api.calls_closure_repeatedly, trainer.optimizers))
        self._before = Snapshot("same") if self._repeats or self.judges_late else None
        self._unknown_averages = lightning_api.unknown_averages(trainer, None if self.judges_late else self)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the forward passes of a step are about to change."""
        lightning_api.reshard_parameters(trainer)
        self._batch = _Batch()
        self._batch_idx = batch_idx + self._told_short.get(trainer.current_epoch, 0)
        self._warn_of_unknown_averages(trainer)  # ahead of the first batch: a progress bar is there to say it
        if not self._window_is_open or lightning_api.is_swa_bn_update(trainer):
            self._open_window(trainer, pl_module)
        if self._keeps_batches:
            self._window.batches.append(SeenBatch.of(batch, batch_idx))
        self._window.n_served += 1
        self._ledger.serve(trainer.global_step, trainer.current_epoch, self._batch_idx, batch)
        if (reason := self._lost_earlier.get((trainer.current_epoch, self._batch_idx))) is not None:
            self._window.was_skipped |= reason == "skipped"
            self.suite.judges_at_once = True
            self.suite.serves_lost_batch |= self._ledger.was_lost_before()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at what the forward pass has left in buffers: the loss may be finite all the same."""
        super().on_before_backward(trainer, pl_module, loss)
        spoiled = self._traces.spoiled()
        if spoiled is not None:
            earlier = self.suite.nonfinite_buffers
            self.suite.nonfinite_buffers = spoiled if earlier is None else earlier | spoiled

    def judge(self, trainer: pl.Trainer, measurement: Measurement) -> Verdict:
        """A nonfinite step is never accepted."""
        if not measurement.is_sick:
            return "accept"
        scaler = lightning_api.gradient_scaler(trainer)
        if measurement.is_corrupt or scaler is None or self._overflows_at_floor >= self._patience:
            return "drop"
        return "ignore"

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Drop a sick step, and decide whether that is enough."""
        if not self._snapshots.exists:
            # by now every callback has had its chance to repair the weights that training starts from
            assert self._window.companions is not None
            self._snapshots.capture_first(trainer, self._window.companions)
        self._snapshots.wait()
        if step.inside_closure:
            self._batch.first_closure = self._batch.first_closure or step
            return
        self._window_is_open = False
        if step.verdict == "drop":
            if (scaler := lightning_api.gradient_scaler(trainer)) is not None:
                self._batch.scaler = scaler.state_dict()
            drop_gradients(
                step.optimizer,
                unscales_itself=lightning_api.gradients_are_scaled(trainer, step.optimizer),
            )
            self._traces.undo()
            self._reject(self._lost_step(step))
        elif step.verdict == "ignore":
            self._leave_to_scaler(trainer, step.optimizer)
        elif step.measurement is None:
            self._let_happen_unjudged(trainer, pl_module, step)
        else:
            self._let_happen(trainer)
            self._accept(trainer, pl_module, step.measurement, self._window.step)

    def on_late_verdict(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measurement: Measurement,
        verdict: Verdict,
    ) -> None:
        """Undo a sick step after all, along with what the running one has begun."""
        unjudged, self._unjudged = self._unjudged, None
        if unjudged is None:
            return
        if verdict == "accept":
            self._accept(trainer, pl_module, measurement, unjudged.window.step)
            return
        assert self._before is not None
        windows = self.snapshot_state_dict()  # these have taken in every step before the sick one
        companions = trainer_state.restore(trainer, self._before, self._traces)
        self.load_snapshot_state_dict(windows)
        self._traces.keep(within_step=True)
        self._snapshots.distrust(companions.step)
        followed = 0
        if self._window is not unjudged.window:
            followed = self._window.n_served
            self._window_is_open = False
            self._window = dataclasses.replace(self._window, companions=companions)
        self._reject(dataclasses.replace(unjudged, measurement=measurement), followed)

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Go back if that is due; else see whether the next snapshot is."""
        if self._batch.scaler is not None:
            # it takes a dropped step for an overflow, which a smaller scale would help against
            lightning_api.set_scaler_state(trainer, self._batch.scaler)
        if lightning_api.is_swa_bn_update(trainer):
            self._guard_buffers(trainer, pl_module)
        if self._batch.first_closure is not None:
            self._settle_closures(trainer, pl_module, self._batch.first_closure)
        if self._unjudged is not None:
            is_last = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
            if is_last or lightning_api.validates_next(trainer, batch_idx):
                self.suite.settle(trainer, pl_module)
        self._conclude(trainer, pl_module)
        stepped = self.suite.has_stepped
        if not stepped and pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1:
            self._window_is_open = False  # `training_step` returned nothing
        if (stepped and self.suite.is_logged) or trainer.is_last_batch:
            self._report(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge what is not judged yet, so that nothing sick is validated."""
        self._bring_forward(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge what is not judged yet."""
        self._bring_forward(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave sane weights, and other callbacks as they were; tell what was lost, without other ranks."""
        if self._is_fitting:
            self.suite.settle(trainer, pl_module)
            lost, self._lost = self._lost, []
            has_scaler = lightning_api.gradient_scaler(trainer) is not None
            for kind, facts in (step.describe(has_scaler=has_scaler) for step in lost):
                self._publish(trainer, pl_module, kind, **facts)
        lightning_api.resume_weight_averages(trainer)
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave other callbacks as they were."""
        super().on_train_end(trainer, pl_module)
        lightning_api.resume_weight_averages(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._is_fitting = False
            lightning_api.stop_calling_before_checkpoints(trainer)

    def final_counts(self) -> dict[str, float]:
        """Skips, rollbacks and overflows so far."""
        return {
            tags.SKIPS: float(self.skips),
            tags.ROLLBACKS: float(self.rollbacks),
            tags.AMP_OVERFLOWS: float(self.amp_overflows),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counters, detectors and the places of ledgers; snapshots are not part of it."""
        return {
            "skips": self.skips,
            "amp_overflows": self.amp_overflows,
            "overflows_at_floor": self._overflows_at_floor,
            "recovery": self._recovery.state_dict(),
            "has_given_up": self._has_given_up,
            "examined": self._investigation.examined,
            "ledgers": self._ledger.folders() or self._earlier_ledgers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved counters and detectors."""
        self.skips = state_dict["skips"]
        self.amp_overflows = state_dict["amp_overflows"]
        self._overflows_at_floor = state_dict["overflows_at_floor"]
        self._recovery.load_state_dict(state_dict["recovery"])
        if state_dict["has_given_up"]:
            self._recovery.reset_budgets()  # whoever resumes has changed something, and wants it tried
        self._investigation.examined = state_dict["examined"]
        self._earlier_ledgers = state_dict["ledgers"]

    def snapshot_state_dict(self) -> dict[int, Any]:
        """The detectors' windows, which go back with the weights."""
        return self._recovery.detector_state()

    def load_snapshot_state_dict(self, state_dict: dict[int, Any]) -> None:
        """Put the detectors' windows back."""
        self._recovery.load_detector_state(state_dict)

    def _warn_of_unknown_averages(self, trainer: pl.Trainer) -> None:
        names, self._unknown_averages = self._unknown_averages, []
        exact = " use check='exact' and" if self.judges_late else ""
        for name in names:
            console.print_message(
                trainer,
                f"gradguard: {name} seems to average weights in a way that NaNRollback cannot undo;{exact}"
                " put NaNRollback before it in the list of callbacks: it then sees only what was kept.",
            )

    def _open_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window_is_open = True
        self._snapshots.wait()  # the batch before may have made no step
        self._traces.keep()
        if self._snapshots.capture_if_due(trainer):
            self._look_at_weights(trainer)
            self._ledger.forget_before(self._snapshots.reaches_back_to())
        elif self._snapshots.lacks_weights(trainer) and self.suite.nonfinite_weights is None:
            self._bring_forward(trainer, pl_module)  # while there is a snapshot to judge by
            self._snapshots.start_anew(trainer)
        needed = self._rewinds or self._before is not None or not self._snapshots.exists
        companions = self._snapshots.companions(trainer) if needed else None
        self._window = Window(trainer.global_step, [], companions)
        if self._repeats:
            assert self._before is not None
            assert companions is not None
            trainer_state.capture(trainer, self._before, companions, self._traces)

    def _lost_step(self, step: Step) -> SkippedStep:
        return SkippedStep(
            step.measurement, self._window, self._batch_idx, step.gradients.names, step.gradients.norms
        )

    def _let_happen(self, trainer: pl.Trainer) -> None:
        self._traces.accept()
        if len(trainer.optimizers) > 1:
            # a later step of the same batch may be dropped, this one stays
            self._traces.keep(within_step=True)

    def _let_happen_unjudged(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Keep what it takes to undo the step; less if the optimizer leaves out a sick one by itself."""
        assert self._before is not None
        assert self._window.companions is not None
        skips_itself = (
            step.supports_fused_override
            and self.suite.has_one_judge
            and type(self).judge is NaNRollback.judge  # by whose rule the kernel is told to skip
            and not lightning_api.writes_after_step(pl_module)
            and skip_is_exact(step.optimizer, step.gradients.parameters)
        )
        trainer_state.capture(
            trainer, self._before, self._window.companions, self._traces, stepped=not skips_itself
        )
        if skips_itself:
            self.suite.ride(step, found_inf=step.numbers.sick())
        self._unjudged = self._lost_step(step)
        self._let_happen(trainer)

    def _accept(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, measurement: Measurement, step: int
    ) -> None:
        self._batch.accepted = True
        self._batch.accepted_step = step
        self._overflows_at_floor = 0
        self._investigation.well()
        index = measurement.optimizer_index
        decision, anomaly = self._recovery.on_good_step(
            index, measurement.loss, measurement.total_norm, measurement.is_collapsed
        )
        self._decide(decision)
        if anomaly and not trainer.interrupted:  # other ranks may be elsewhere then
            origin = self._investigation.look_at_weights(trainer, self._snapshots.newest())
            facts = origin_facts(origin, anomaly) if origin is not None else {}
            self._publish(trainer, pl_module, anomaly, value=measurement.loss, **facts)

    def _reject(self, lost: SkippedStep, followed: int = 0) -> None:
        assert lost.measurement is not None
        self._batch.skipped = True
        self._batch.rewind = lost.window.companions
        self._lost.append(lost)
        self._ledger.lose_last(lost.window.n_served, followed)
        if lost.measurement.was_lost:
            self.skips += lost.window.was_skipped
            return
        self.skips += 1
        self._decide(self._recovery.on_skip(lost.measurement.optimizer_index))
        if lost.measurement.nonfinite_weights:
            self._decide(self._recovery.escalate())

    def _leave_to_scaler(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """An overflow: the scaler skips the step and lowers its scale, as long as it can."""
        self.amp_overflows += 1
        self._batch.scaler = None
        if not lightning_api.gradients_are_scaled(trainer, optimizer):
            # what was written to the gradients after the scaler had looked, it does not know of
            drop_gradients(optimizer, unscales_itself=False)
        lightning_api.pause_weight_averages(trainer)
        scaler = lightning_api.gradient_scaler(trainer)
        at_floor = scaler is not None and scaler.get_scale() <= 1
        self._overflows_at_floor = self._overflows_at_floor + 1 if at_floor else 0

    def _settle_closures(self, trainer: pl.Trainer, pl_module: pl.LightningModule, first: Step) -> None:
        """Accept or take back a batch in which an optimizer stepped between evaluations."""
        self._window_is_open = False
        assert first.measurement is not None
        sick = bool(trainer_state.state_is_nonfinite(trainer, self._traces))
        if any_rank(sick, pl_module.device) or first.verdict == "drop":
            assert self._before is not None
            trainer_state.restore(trainer, self._before, self._traces)
            self._reject(self._lost_step(first))
        else:
            self._let_happen(trainer)
            self._accept(trainer, pl_module, first.measurement, self._window.step)

    def _guard_buffers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a pass that makes no step but updates statistics, a batch that spoils them is taken back."""
        self._window_is_open = False
        sick = bool(trainer_state.state_is_nonfinite(trainer, self._traces))
        if any_rank(sick, pl_module.device):
            self._traces.undo()
            self._ledger.lose_last(1)
            self.skips += 1
            self._publish(trainer, pl_module, "nonfinite_buffers", action="skipped")

    def _bring_forward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_fitting:
            self.suite.settle(trainer, pl_module)
            self._conclude(trainer, pl_module)

    def _before_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No nonfinite weights on disk: judge what is not judged yet, look, and go back if need be."""
        if not self._is_fitting or not self._snapshots.exists:
            return
        if trainer.interrupted:
            # no collective here, for the other ranks may be elsewhere; and nothing is raised on top
            self.suite.settle(trainer, pl_module)
            if bool(trainer_state.state_is_nonfinite(trainer, self._traces)):
                self._snapshots.return_to_newest(trainer)
            return
        self._bring_forward(trainer, pl_module)
        sick = bool(trainer_state.state_is_nonfinite(trainer, self._traces))
        if any_rank(sick, pl_module.device):
            self._publish(trainer, pl_module, "nonfinite_weights")
            self._decide(self._recovery.escalate())
            self._conclude(trainer, pl_module)

    def _decide(self, decision: Decision) -> None:
        if self._batch.decision != "stop" and decision != "continue":
            self._batch.decision = decision

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell people of lost steps, and do what was decided."""
        lost, self._lost = self._lost, []
        for step in lost:
            self._tell(trainer, pl_module, step)
        decision, self._batch.decision = self._batch.decision, "continue"
        if decision == "stop":
            self._give_up(trainer, pl_module)
        if decision == "roll_back":
            self._batch.accepted = False
            self._go_back(trainer, pl_module)
        elif lost:
            if self._batch.rewind is not None and not self._batch.accepted:
                self._batch.rewind.rewind(trainer)
            self._look_at_weights(trainer)
        if self._batch.accepted and not self._batch.skipped and not self._recovery.is_spiking:
            self._snapshots.good_step(self._batch.accepted_step)
        self._batch.accepted = False  # it is counted once, also if a checkpoint makes it known late

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule, lost: SkippedStep) -> None:
        """Publish a lost step, with its cause if it is the first of an episode."""
        kind, facts = lost.describe(has_scaler=lightning_api.gradient_scaler(trainer) is not None)
        if lost.window.batches and kind != "lost_batch":
            result = self._investigation.examine(
                trainer,
                pl_module,
                lost.window.step,
                lost.window.batches,
                self._snapshots.newest(),
                run_folder(trainer),
                weights_are_sick=kind == "nonfinite_weights",
            )
            self._traces.buffers.restore()  # the step may write to frozen weights each time that it is run
            if result is None:
                facts["detail"] = "Not examined: it follows a lost step, or max_dossiers is used up."
                facts.update(self._investigation.advice())
            else:
                facts.update(
                    origin_facts(result.origin, kind, facts.get("where", ())), dossier=result.dossier
                )
        self._publish(trainer, pl_module, kind, **facts)

    def _go_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.suite.forget()
        self._unjudged = None
        # that the data is bad is no reason to doubt a snapshot
        is_innocent = self._investigation.cause == "bad_input"
        step = (self._snapshots.return_to_newest if is_innocent else self._snapshots.roll_back)(trainer)
        self._recovery.on_rollback()
        self.suite.nonfinite_weights = None
        self._ledger.lose_since(step)
        self._publish(trainer, pl_module, "rollback", value=step, action="rolled_back")

    def _give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.suite.forget()
        self._unjudged = None
        step = self._snapshots.return_to_newest(trainer)
        self._ledger.lose_since(step)
        self._has_given_up = True
        last_good = save_last_good(trainer)
        found = self._investigation.found
        self._publish(
            trainer, pl_module, "training_diverged", action="stopped", advice=combined_advice(found)
        )
        self._report(trainer)
        self.suite.metrics.flush(trainer, pl_module)
        reason = (
            f"more than {self.max_skip_fraction:.0%} of the last {OUTCOMES} steps were skipped "
            f"(max_skip_fraction={self.max_skip_fraction:g})"
            if self._recovery.skips_too_often
            else f"after {self.rollbacks} rollbacks there was reason for another "
            f"(max_rollbacks={self.max_rollbacks})"
        )
        raise diverged(trainer, reason, step, found, last_good)

    def _look_at_weights(self, trainer: pl.Trainer) -> None:
        """Read the weights, without waiting; what is found rides in the reduction of the next step."""
        flag = trainer_state.state_is_nonfinite(trainer, self._traces)
        self.suite.nonfinite_weights = flag

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: str, **facts: Any) -> None:
        facts = {
            "batch_idx": self._batch_idx,
            "advice": advice(kind, facts.get("where", ())),
            **facts,
        }
        publish(trainer, pl_module, incident_now(trainer, kind, **facts))

    def _report(self, trainer: pl.Trainer) -> None:
        counts = self.final_counts()
        report = self.suite.metrics
        report.add_scalars(counts)
        report.publish_total(tags.SKIPS, counts[tags.SKIPS])
        report.publish_total(tags.ROLLBACKS, counts[tags.ROLLBACKS])
