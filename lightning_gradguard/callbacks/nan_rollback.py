"""The callback that skips a bad step, and rolls back when skipping is not enough."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytorch_lightning as pl
from typing_extensions import override

from lightning_gradguard.core import arguments
from lightning_gradguard.core.incidents import Incident
from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.core.recovery import RecoveryPolicy
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.configured_rates import ConfiguredRates
from lightning_gradguard.runtime.incidents.invalid_batches import skip_invalid_batches
from lightning_gradguard.runtime.incidents.investigation import Investigation
from lightning_gradguard.runtime.incidents.journal import open_journal
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.other_clipping import allow_steps_without_gradients, restore_clipping
from lightning_gradguard.runtime.rollback.fit_context import FitContext
from lightning_gradguard.runtime.rollback.outcome import Counts
from lightning_gradguard.runtime.rollback.session import RollbackSession
from lightning_gradguard.runtime.rollback.snapshot_schedule import SnapshotSchedule
from lightning_gradguard.runtime.steps.side_effects import SideEffects
from lightning_gradguard.runtime.steps.step import Step, StepFlags, StepVerdict
from lightning_gradguard.runtime.steps.step_callback import StepCallback
from lightning_gradguard.runtime.training_step import TrainingStep, restore_step


class NaNRollback(StepCallback):
    """Skips a step whose loss or gradients are nonfinite; rolls back when skipping is not enough.

    A skipped step leaves no trace: weights, optimizer state, buffers, weight averages, torchmetrics states
    and logged epoch means are as if the batch had never been seen. (`trainer.global_step` and learning rate
    schedules advance.) Training rolls back, in place, to the last *qualified* snapshot (finite on all ranks
    and followed by 10 good steps) after `patience` skips in a row, nonfinite weights, a divergence (a high
    loss that lasts, with weights that are far from the snapshot, whose loss on the same batch is lower), or
    a collapse (no weight matrix gets a gradient any more). A rollback before another snapshot is qualified
    restores the one before, unless the data was found to be at fault; after a collapse or without progress,
    the state at the start is restored if no snapshot of the next 200 steps has a lower loss. Under a
    GradScaler, an overflow (finite loss, nonfinite gradients) is left to the scaler and counted, until it
    repeats `patience` times at a scale of 1 or less. Under LBFGS a batch is the unit: it is undone if it
    began, or left anything, nonfinite.

    The first skipped batch of an episode is run once more with every operation recorded, and the incident
    names the operation and module that made the first nonfinite value, and the cause. The folder
    `incidents/<step>/` has what is needed to reproduce it; `lightning-gradguard replay` reads it.

    No checkpoint that the Trainer writes while it fits holds nonfinite weights. When a budget is used up, the
    last qualified state is written to `last_good.ckpt` in the run's folder, from which training can be
    resumed: a learning rate that was changed in `configure_optimizers` since then takes the place of that in
    the checkpoint. Lost batches (skipped, or undone by a rollback) are logged to `lost_batches.rank0.jsonl`
    there; a resumed run skips one that it sees again.

    Any callback may be restored along with the weights: if it has `snapshot_state_dict()` and
    `load_snapshot_state_dict(state)`, these are called when a snapshot is taken and restored.

    | tag | value |
    |---|---|
    | `rollback/skips` | steps skipped so far |
    | `rollback/rollbacks` | rollbacks so far |
    | `rollback/amp_overflows` | overflows left to the GradScaler so far |

    Args:
        patience: Skipped steps in a row (of one optimizer) after which training rolls back; at least 1.
        snapshot_every_n_steps: A snapshot is taken after this many good steps; at least 1.
        keep_snapshots: Qualified snapshots kept in memory, in addition to one that is pending. Each takes the
            memory of the trained weights, the buffers and the optimizer's state.
        max_rollbacks: After this many, the next one stops the run; 0 or more. After 500 steps without one,
            one less is counted.
        snapshot_device: `"cpu"` keeps snapshots in host memory (pinned, and written while training goes on),
            `"same"` on the device of the weights.
        check: `"exact"` synchronizes host and device once a step, and no bad step takes place. `"deferred"`
            does not synchronize: a step is checked when the next one is about to be made, and both are undone
            if it was bad. A fused optimizer skips the bad one by itself; for any other, the training state is
            copied, on the device, at every step (on a CPU, which knows the numbers at once, at a bad one).
            The check takes place earlier ahead of a checkpoint, validation and the end of an epoch, and on
            an exception. A GradScaler and LBFGS synchronize anyway, so that under them both are the same.
        restore_rng: True to restore random number generators too, on a rollback and on a skip.
        rewind_schedulers: True to restore learning rate schedules and the scale of a GradScaler too, on a
            rollback and on a skip; not schedules that advance once an epoch, as no epoch is repeated.
        max_skip_fraction: If more than this share of the last 100 steps was skipped, the run stops; in
            (0, 1].
        incident_dir: Folder of `incidents.jsonl`, dossiers and lost batches; the run's own folder if `None`,
            where a Trainer without a logger gets no file before the first intervention.
        max_dossiers: Episodes that are examined in a run; 0 or more. While it is above 0, references to the
            batches of the running step are kept, and in the first steps to those of one before.
        on_nonfinite: `"skip"` goes on after a bad step, within the budgets. `"stop"` ends the run at the
            first one: `fit` raises, and `last_good.ckpt` has weights and optimizer as they were before it.
            To only watch, omit this callback and the others that act:
            `Trainer(callbacks=[InitializationCheck(), GradientNormMonitor(), TrainingDiagnosis()])`.
        max_dossier_megabytes: Limit of each dossier; weights are omitted first, then the batch.
        skip_invalid_batches: True to skip a batch whose step raises because of its values (checks of
            `torch.distributions`, an assert, an index out of range on the CPU), as if its loss were NaN. If
            False, the batch is examined, `last_good.ckpt` is written, and the exception passes. Under manual
            optimization it always passes.

    Raises:
        ValueError: If an argument is out of range.
        TrainingDivergedError: From `fit`, when a budget is used up, with the weights of the newest qualified
            snapshot, or at the first bad step under `on_nonfinite="stop"`.
        MisconfigurationException: From `fit`, beside another `NaNRollback`.

    Example:
        >>> from lightning_gradguard import NaNRollback
        >>> rollback = NaNRollback(patience=5, snapshot_every_n_steps=100)
    """

    skips_steps = True
    is_single = True

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
        on_nonfinite: Literal["skip", "stop"] = "skip",
        skip_invalid_batches: bool = False,
    ) -> None:
        super().__init__()
        self.settings = non_defaults(NaNRollback, locals())
        arguments.whole_number("patience", patience, at_least=1)
        arguments.whole_number("snapshot_every_n_steps", snapshot_every_n_steps, at_least=1)
        arguments.whole_number("keep_snapshots", keep_snapshots, at_least=1)
        arguments.whole_number("max_rollbacks", max_rollbacks, at_least=0)
        arguments.whole_number("max_dossiers", max_dossiers, at_least=0)
        arguments.one_of("snapshot_device", snapshot_device, "cpu", "same")
        arguments.one_of("check", check, "exact", "deferred")
        arguments.one_of("on_nonfinite", on_nonfinite, "skip", "stop")
        arguments.within("max_skip_fraction", max_skip_fraction, "(0, 1]")
        arguments.number("max_dossier_megabytes", max_dossier_megabytes, at_least=0)
        arguments.flag("restore_rng", restore_rng)
        arguments.flag("rewind_schedulers", rewind_schedulers)
        arguments.text("incident_dir", incident_dir)
        self.incident_dir = incident_dir
        self.defers_check = check == "deferred"
        self.state_arguments = {"patience": patience}
        self._patience = patience
        self._skips_invalid_batches = arguments.flag("skip_invalid_batches", skip_invalid_batches)
        self._max_dossiers = max_dossiers
        self._counts = Counts()
        self._policy = RecoveryPolicy(
            patience, max_rollbacks, max_skip_fraction, stops_at_first=on_nonfinite == "stop"
        )
        self._investigation = Investigation(max_dossiers, max_dossier_megabytes)
        self._snapshots = SnapshotSchedule(
            keep_snapshots,
            snapshot_every_n_steps,
            snapshot_device,
            rng=restore_rng,
            schedules=rewind_schedulers,
        )
        self._earlier_logs: list[str] = []
        self._own_logs: list[str] = []
        self._skipping_step: TrainingStep | None = None
        self._session: RollbackSession = None  # type: ignore[assignment]  # until training starts
        self._unknown_averages: list[str] = []
        self._resumes_a_stop = False
        self._configured_rates: ConfiguredRates | None = None
        self._initial_state = self.state_dict()

    @property
    def skips(self) -> int:
        """Steps skipped so far."""
        return self._counts.skips

    @property
    @override
    def counts_since(self) -> int:
        """Step from which on skips and rollbacks are counted."""
        return self._counts.since or 0

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return self._policy.rollbacks

    @property
    def amp_overflows(self) -> int:
        """Overflows left to the GradScaler so far."""
        return self._counts.amp_overflows

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Joins the suite, chooses where incidents are written, and is called ahead of every checkpoint."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self.incident_dir is not None:
                open_journal(trainer, self.incident_dir)
            allow_steps_without_gradients(trainer)
            lightning_api.call_before_checkpoints(
                trainer, lambda: self._session.before_checkpoint() if self._session is not None else None
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the learning rates of the code, ahead of those of a checkpoint."""
        self._configured_rates = ConfiguredRates(trainer) if self._resumes_a_stop else None
        self._resumes_a_stop = False

    @override
    def on_begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._configured_rates is not None and (rates := self._configured_rates.restore(trainer)):
            console.print_message(
                trainer,
                f"Resumed from a run that was stopped: training continues with lr={rates[1]:g}, as"
                f" configure_optimizers sets it, not with lr={rates[0]:g} as in the checkpoint.",
            )
        if trainer.global_step == 0 and self._counts.has_ended:
            self.load_state_dict(copy.deepcopy(self._initial_state))  # the run before was another one
        self._counts.has_stopped = False
        self._counts.since = trainer.global_step if self._counts.since is None else self._counts.since
        side_effects = SideEffects(trainer, pl_module)
        parts = self._policy, self._counts, self._snapshots, self._investigation
        self._session = RollbackSession(
            FitContext(trainer, pl_module, self.suite, side_effects, *parts),
            earlier_logs=self._earlier_logs,
            defers_check=self.defers_check,
            kernel_may_skip=type(self).check_step is NaNRollback.check_step,
            keeps_batches=self._max_dossiers > 0,
        )
        if self._skips_invalid_batches and pl_module.automatic_optimization:
            self._skipping_step = skip_invalid_batches(pl_module)
        before = None if self.defers_check else self
        self._unknown_averages = lightning_api.unknown_averages(trainer, before)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves what the forward passes of a step are about to change."""
        if not self.suite.is_running:
            return
        if self._unknown_averages:  # by the first batch there is a progress bar to print above
            self._warn_of_unknown_averages(trainer)
        self._session.on_batch_start(batch, batch_idx)

    @override
    def step_flags(self) -> StepFlags:
        """Returns the flags found since the last step."""
        return self._session.take_flags()

    @override
    def check_step(self, trainer: pl.Trainer, measurement: Measurement) -> StepVerdict:
        """Returns `"skip"` for a nonfinite step, or `"ignore"` where the GradScaler will deal with it."""
        if not measurement.must_skip:
            return "accept"
        scaler = lightning_api.gradient_scaler(trainer)
        if measurement.is_corrupt or scaler is None or self._counts.overflows_at_floor >= self._patience:
            return "skip"
        return "ignore"

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        self._session.on_step(step)

    @override
    def on_deferred_verdict(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measurement: Measurement,
        verdict: StepVerdict,
    ) -> None:
        """Commits or undoes the step before."""
        self._session.on_deferred_verdict(measurement, verdict)

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Takes note of updates that were too large."""
        self._policy.has_large_updates |= incident.cause == "update_too_large" and incident.action == "none"

    @override
    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Rolls back if that is due, else counts towards the next snapshot."""
        self._session.on_batch_end(batch_idx)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolves a deferred check, so that no bad weights are validated."""
        if self.suite.is_running:
            self._session.flush()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolves a deferred check."""
        if self.suite.is_running:
            self._session.flush()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves finite weights and restores other callbacks; reports skipped steps, without other ranks."""
        if self._session is not None:
            self._session.report_without_ranks()
            self._session.report_exception(exception)
            self._session.end()
        self._restore_step(pl_module)
        lightning_api.resume_weight_averages(trainer)
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        lightning_api.resume_weight_averages(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._restore_step(pl_module)
            self._own_logs = self._log_folders()
            self._counts.has_ended = True
            if self._session is not None:
                self._session.end()
            self._session = None  # type: ignore[assignment]
            self._snapshots.end()
            restore_clipping(trainer)
            lightning_api.stop_calling_before_checkpoints(trainer)

    def _restore_step(self, pl_module: pl.LightningModule) -> None:
        """Lets a step that raises on its values raise again."""
        if self._skipping_step is not None:
            restore_step(pl_module, self._skipping_step)
            self._skipping_step = None

    @override
    def final_counts(self) -> dict[str, float]:
        return self._counts.by_tag(self._policy.rollbacks)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns counts, detectors and the folders of lost batches; snapshots are not part of it."""
        return {
            "skips": self._counts.skips,
            "counted_since": self._counts.since,
            "amp_overflows": self._counts.amp_overflows,
            "overflows_at_floor": self._counts.overflows_at_floor,
            "recovery": self._policy.state_dict(),
            # the names of version 0.5, whose checkpoints this one reads
            "has_given_up": self._counts.has_stopped,
            "examined": self._investigation.examined,
            "last_examined": self._investigation.last,
            "ledgers": self._log_folders(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = (state_dict[name] for name in ("skips", "amp_overflows", "overflows_at_floor"))
        self._counts = Counts(state_dict.get("counted_since", 0), *counts)  # 0.5 has not saved the step
        self._policy.load_state_dict(state_dict["recovery"])
        if state_dict["has_given_up"]:
            self._policy.reset_budgets()  # the user has changed something, and wants it tried
            self._resumes_a_stop = True
        self._investigation.examined = state_dict["examined"]
        self._investigation.last = state_dict.get("last_examined", "")  # 0.5 has not saved it
        self._earlier_logs, self._own_logs = state_dict["ledgers"], []

    def snapshot_state_dict(self) -> dict[int, Any]:
        """Returns the detectors' windows, which are restored along with the weights."""
        return self._policy.detector_state()

    def load_snapshot_state_dict(self, state_dict: dict[int, Any]) -> None:
        """Restores the detectors' windows."""
        self._policy.load_detector_state(state_dict)

    def _log_folders(self) -> list[str]:
        own = self._own_logs if self._session is None else self._session.lost_batches.folders()
        return own or self._earlier_logs

    def _warn_of_unknown_averages(self, trainer: pl.Trainer) -> None:
        names, self._unknown_averages = self._unknown_averages, []
        exact = " use check='exact' and" if self.defers_check else ""
        for name in names:
            console.print_message(
                trainer,
                f"{name} seems to average weights in a way that NaNRollback cannot undo;{exact}"
                " put NaNRollback before it in the list of callbacks: it then sees only committed steps.",
            )
