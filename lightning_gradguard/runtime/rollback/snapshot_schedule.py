"""When snapshots of a Trainer are taken, which of them are proven, and returning to one."""

from __future__ import annotations

import pytorch_lightning as pl

from lightning_gradguard.core.snapshots import Snapshot, SnapshotRing
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.rollback import trainer_state
from lightning_gradguard.runtime.rollback.side_effects import SideEffects
from lightning_gradguard.runtime.rollback.trainer_state import TrainerState


class SnapshotSchedule:
    """The snapshots of one fit.

    Args:
        keep: Qualified snapshots that are kept.
        every_n_steps: Good steps between snapshots.
        device: See `core.snapshots.Snapshot`.
        rng: Whether random number generators go back too.
        schedules: Whether learning rate schedules go back too.
    """

    def __init__(self, keep: int, every_n_steps: int, device: str, *, rng: bool, schedules: bool) -> None:
        self._ring = SnapshotRing(keep, device=device)
        self._every_n_steps = every_n_steps
        self._rng = rng
        self._schedules = schedules

    def begin(self, trainer: pl.Trainer, traces: SideEffects) -> None:
        """Forget snapshots of another fit."""
        self._ring.clear()
        self._traces = traces
        self._good_since = 0
        self._is_due = False
        self._n_trained = trainer_state.count_trained(trainer)

    @property
    def exists(self) -> bool:
        """Whether there is a snapshot to go back to."""
        return len(self._ring) > 0

    def companions(self, trainer: pl.Trainer) -> TrainerState:
        """What goes back besides tensors, as it is at the start of a step."""
        return TrainerState.of(trainer, self._traces, rng=self._rng, schedules=self._schedules)

    def capture_if_due(self, trainer: pl.Trainer) -> bool:
        """Take a snapshot at the start of a step: by now all callbacks, averages too, have seen the last."""
        due, self._is_due = self._is_due, False
        if due:
            companions = self.companions(trainer)
            self._ring.capture(lambda s: trainer_state.capture(trainer, s, companions, self._traces))
        return due

    def lacks_weights(self, trainer: pl.Trainer) -> bool:
        """Whether fine-tuning trains other weights by now than those in the snapshots."""
        return trainer_state.count_trained(trainer) != self._n_trained

    def start_anew(self, trainer: pl.Trainer) -> None:
        """Forget all snapshots."""
        self._ring.clear()
        self._n_trained = trainer_state.count_trained(trainer)

    def capture_first(self, trainer: pl.Trainer, companions: TrainerState) -> None:
        """Take the state that training starts from, ahead of the first step: proven by definition."""
        self._ring.capture(
            lambda s: trainer_state.capture(trainer, s, companions, self._traces), qualified=True
        )

    def wait(self) -> None:
        """Let the device write weights only after they have been copied."""
        self._ring.wait()

    def good_step(self, step: int) -> None:
        """Count the good step that was made at `trainer.global_step == step`."""
        pending = self._ring.pending()
        if pending is not None and pending.extra_state.step <= step:
            self._ring.good_step()
        self._good_since += 1
        if self._good_since >= self._every_n_steps and not self._ring.is_pending:
            self._good_since = 0
            self._is_due = True

    def distrust(self, step: int) -> None:
        """The step after `trainer.global_step == step` was sick: no snapshot that holds it can be proven."""
        self._is_due = False
        pending = self._ring.pending()
        if pending is not None and pending.extra_state.step > step:
            self._ring.discard_pending()

    def roll_back(self, trainer: pl.Trainer) -> int:
        """Return to the newest proven snapshot, or further if that was tried; returns its `global_step`."""
        return self._restore(trainer, self._ring.roll_back())

    def return_to_newest(self, trainer: pl.Trainer) -> int:
        """Return to the newest proven snapshot, without counting it as tried; returns its `global_step`."""
        return self._restore(trainer, self._ring.newest())

    def newest(self) -> Snapshot:
        """The newest proven snapshot."""
        return self._ring.newest()

    def reaches_back_to(self) -> int:
        """`trainer.global_step` of the oldest snapshot."""
        return int(self._ring.oldest().extra_state.step)

    def _restore(self, trainer: pl.Trainer, snapshot: Snapshot) -> int:
        self._good_since = 0
        self._is_due = False
        lightning_api.reshard_parameters(trainer)
        return trainer_state.restore(trainer, snapshot, self._traces).step
