"""Decides when snapshots of a Trainer are taken, which of them are qualified, and restores one."""

from __future__ import annotations

from functools import partial

import pytorch_lightning as pl

from lightning_gradguard.core.snapshots import Snapshot, SnapshotRing
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.steps import trainer_state
from lightning_gradguard.runtime.steps.side_effects import SideEffects
from lightning_gradguard.runtime.steps.trainer_state import TrainerState


class SnapshotSchedule:
    """The snapshots of one fit.

    Attributes:
        is_empty: True if there is no qualified snapshot.
        is_copying: True while the weights must not be written before `wait`.
        is_due: True if a snapshot is to be taken at the start of the next step.
    """

    def __init__(self, keep: int, every_n_steps: int, device: str, *, rng: bool, schedules: bool) -> None:
        self._new_ring = partial(SnapshotRing, keep, device=device)
        self._ring = self._new_ring()
        self._side_effects: SideEffects = None  # type: ignore[assignment]  # until training starts
        self._every_n_steps = every_n_steps
        self._rng = rng
        self._schedules = schedules
        self.is_empty = True
        self.is_copying = False
        self.is_due = False

    def begin(self, trainer: pl.Trainer, side_effects: SideEffects) -> None:
        """Discards snapshots of another fit."""
        self._side_effects = side_effects
        self._good_steps = 0
        self.is_due = False
        self.reset(trainer)

    def end(self) -> None:
        """Frees the memory of all snapshots, and the Trainer: nothing is rolled back after the fit."""
        self._ring = self._new_ring()
        self._side_effects = None  # type: ignore[assignment]
        self.is_empty = True
        self.is_copying = False

    def reset(self, trainer: pl.Trainer) -> None:
        """Discards all snapshots."""
        self._ring.clear()
        self.is_empty = True
        self._n_trained = _count_trained(trainer)

    @property
    def restores_more_than_tensors(self) -> bool:
        """True if a skip restores generators or schedules as well."""
        return self._rng or self._schedules

    def state(self, trainer: pl.Trainer) -> TrainerState:
        """Returns the state besides tensors that is restored along with them, at the start of a step."""
        return TrainerState.of(trainer, self._side_effects, rng=self._rng, schedules=self._schedules)

    def capture(self, trainer: pl.Trainer) -> None:
        """Takes a snapshot at the start of a step, when all callbacks have processed the step before."""
        self.is_due = False
        self._capture(trainer, self.state(trainer))

    def capture_first(self, trainer: pl.Trainer, state: TrainerState) -> None:
        """Takes the state that training starts from, ahead of the first step: qualified by definition."""
        self.is_empty = False
        self._capture(trainer, state, qualified=True)

    def misses_parameters(self, trainer: pl.Trainer) -> bool:
        """True if fine-tuning trains other parameters by now than those in the snapshots."""
        return _count_trained(trainer) != self._n_trained

    def wait(self) -> None:
        """Orders copies on the device ahead of the next write to the weights."""
        self._ring.wait()
        self.is_copying = False

    def on_good_step(self, step: int, loss: float | None) -> None:
        """Counts the good step that was made at `trainer.global_step == step`.

        Its loss is `None` if losses of one step and another cannot be compared.
        """
        pending = self._ring.pending
        if pending is None or pending.extra_state.step <= step:
            self._ring.good_step(loss)
        self._good_steps += 1
        if self._good_steps >= self._every_n_steps and self._ring.pending is None:
            self._good_steps = 0
            self.is_due = True

    def discard_after(self, step: int) -> None:
        """Discards a pending snapshot from after the bad step at `trainer.global_step == step`."""
        self.is_due = False
        pending = self._ring.pending
        if pending is not None and pending.extra_state.step > step:
            self._ring.discard_pending()

    def roll_back(self, trainer: pl.Trainer, *, again: bool, trusted: bool, learned: bool) -> int:
        """Restores the newest qualified snapshot, or the one before if that was tried; returns its step.

        `again` restores the newest even if it was tried; see `SnapshotRing.roll_back` for the others.
        """
        if again:
            return self.restore_newest(trainer)
        return self._restore(trainer, self._ring.roll_back(trusted=trusted, learned=learned))

    def distance(self, trainer: pl.Trainer) -> float:
        """Measures how far the weights are from the newest trusted snapshot, in units of its norm."""
        return self.trusted().distance(trainer.optimizers)

    def restore_newest(self, trainer: pl.Trainer) -> int:
        """Restores the newest qualified snapshot, without counting it as tried; returns its step."""
        return self._restore(trainer, self._ring.newest())

    def newest(self) -> Snapshot:
        """Returns the newest qualified snapshot."""
        return self._ring.newest()

    def trusted(self) -> Snapshot:
        """Returns the newest trusted snapshot."""
        return self._ring.trusted()

    def oldest_step(self) -> int:
        """Returns `trainer.global_step` of the oldest snapshot."""
        return int(self._ring.oldest().extra_state.step)

    def _capture(self, trainer: pl.Trainer, state: TrainerState, *, qualified: bool = False) -> None:
        self._ring.capture(
            lambda snapshot: trainer_state.capture(trainer, snapshot, state, self._side_effects),
            qualified=qualified,
        )
        self.is_copying = True

    def _restore(self, trainer: pl.Trainer, snapshot: Snapshot) -> int:
        self._good_steps = 0
        self.is_due = False
        lightning_api.reshard_parameters(trainer)
        return trainer_state.restore(trainer, snapshot, self._side_effects).step


def _count_trained(trainer: pl.Trainer) -> int:
    n = 0
    for optimizer in trainer.strategy.optimizers:
        for group in optimizer.param_groups:
            n += len(group["params"])
    return n
