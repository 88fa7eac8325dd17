"""The part of a Trainer's state that goes into a snapshot, and its restoration."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from lightning_gradguard.core.snapshots import Snapshot, any_nonfinite, rng_state, set_rng_state
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.steps.side_effects import ForwardState, SideEffects


@dataclass(frozen=True)
class TrainerState:
    """State of a Trainer that is restored along with the weights.

    Args:
        step: `trainer.global_step` at the time.
        callbacks: Every callback that has `snapshot_state_dict`, with its state.
        rng: Random number generators, or `None` if they are not restored.
        schedules: State of every learning rate scheduler with its optimizers' hyperparameters, or `None`
            if they are not restored.
        forward: Metrics, epoch means and hidden states.
        average_counts: Number of models in each weight average.
    """

    step: int
    callbacks: list[tuple[Any, Any]]
    rng: dict[str, Any] | None
    schedules: list[Any] | None
    forward: ForwardState
    average_counts: list[Tensor]

    @classmethod
    def of(
        cls, trainer: pl.Trainer, side_effects: SideEffects, *, rng: bool, schedules: bool
    ) -> TrainerState:
        """Returns the present state of the Trainer; metrics are those from the start of the step."""
        return cls(
            step=trainer.global_step,
            callbacks=[
                (callback, callback.snapshot_state_dict())
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if hasattr(callback, "snapshot_state_dict")
            ],
            rng=rng_state() if rng else None,
            schedules=_schedules(trainer) if schedules else None,
            forward=side_effects.forward_state,
            average_counts=[count.clone() for count in lightning_api.average_counts(trainer)],
        )

    def restore(self, trainer: pl.Trainer, side_effects: SideEffects) -> None:
        """Restores the state."""
        for callback, state in self.callbacks:  # of which one may have another place by now
            callback.load_snapshot_state_dict(state)
        for index, count in enumerate(lightning_api.average_counts(trainer)):
            if index < len(self.average_counts):
                count.copy_(self.average_counts[index])
            else:
                count.zero_()  # the average has begun since
        side_effects.restore_forward_state(self.forward)
        self.rewind(trainer)

    def rewind(self, trainer: pl.Trainer) -> None:
        """Restores generators and schedules, which advance without a step, where that was asked for."""
        if self.rng is not None:
            set_rng_state(self.rng)
        if self.schedules is not None:
            _restore_schedules(trainer, self.schedules)


def capture(
    trainer: pl.Trainer,
    snapshot: Snapshot,
    state: TrainerState,
    side_effects: SideEffects,
    *,
    stepped: bool = True,
) -> None:
    """Copies the Trainer's state into a snapshot, with what optimizers write if it is `stepped`.

    `side_effects` hold buffers and frozen weights from the start of the step: the forward pass may write them
    while a snapshot is still being copied.
    """
    buffers = side_effects.buffers
    written, saved = buffers.written(), buffers.saved()
    snapshot.capture(_modules(trainer), trainer.optimizers, written, saved, stepped=stepped)
    snapshot.extra_state = state


def restore(trainer: pl.Trainer, snapshot: Snapshot, side_effects: SideEffects) -> TrainerState:
    """Restores a snapshot and drops all gradients; returns the state that was restored with it."""
    state: TrainerState = snapshot.extra_state
    snapshot.restore(_modules(trainer), trainer.optimizers)
    state.restore(trainer, side_effects)
    for parameter in trainer.lightning_module.parameters():
        parameter.grad = None
    return state


def state_is_nonfinite(trainer: pl.Trainer, side_effects: SideEffects) -> Tensor:
    """Scans weights, averages, buffers that began finite, and optimizer state; returns a flag, on the device.

    Optimizer state and variances of normalization are squares, and so have a bound of their own.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    weights = [weight for group in groups for weight in group["params"]]
    averages = [
        weight for average in lightning_api.weight_averages(trainer) for weight in average.parameters()
    ]
    states = [s for optimizer in trainer.optimizers for s in optimizer.state.values()]
    own = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    written = [*averages, *side_effects.buffers.written()]
    return any_nonfinite([*weights, *written], squares=[*own, *side_effects.finite_buffers])


def _modules(trainer: pl.Trainer) -> list[nn.Module]:
    return [trainer.lightning_module, *lightning_api.weight_averages(trainer)]


def _by_epoch(trainer: pl.Trainer) -> list[bool]:
    """True for schedules that advance once an epoch, which are not restored."""
    automatic = trainer.lightning_module.automatic_optimization
    return [automatic and config.interval == "epoch" for config in trainer.lr_scheduler_configs]


def _schedules(trainer: pl.Trainer) -> list[Any]:
    hyperparameters = [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedulers = {id(c.scheduler): c.scheduler.state_dict() for c in trainer.lr_scheduler_configs}
    scaler = lightning_api.gradient_scaler(trainer)
    return copy.deepcopy([hyperparameters, schedulers, scaler.state_dict() if scaler else None])


def _restore_schedules(trainer: pl.Trainer, schedules: list[Any]) -> None:
    hyperparameters, schedulers, scaler = copy.deepcopy(schedules)
    by_epoch = _by_epoch(trainer)
    configs = trainer.lr_scheduler_configs
    stays = [c.scheduler.optimizer for c, by in zip(configs, by_epoch, strict=True) if by]
    for optimizer, groups in zip(trainer.optimizers, hyperparameters, strict=True):
        if any(optimizer is other for other in stays):
            continue
        for group, saved in zip(optimizer.param_groups, groups, strict=False):
            for key, value in saved.items():
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
    for config, by in zip(configs, by_epoch, strict=True):
        if not by and (state := schedulers.get(id(config.scheduler))) is not None:
            config.scheduler.load_state_dict(state)
    lightning_api.set_scaler_state(trainer, scaler)
