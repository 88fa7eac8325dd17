"""Learning rates as the module configures them, before a schedule or a checkpoint changes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

#: Entries of a parameter group that are rates, or bounds that a schedule computes rates from.
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
#: The same among the attributes of schedules.
_SCHEDULE_LISTS = ("base_lrs", "max_lrs", "_last_lr")


class ConfiguredRates:
    """The learning rates that `configure_optimizers` has set in this fit.

    Lightning restores the rates of a checkpoint, so that a rate that was changed in the code has no effect.

    Args:
        trainer: With optimizers that are set up, and not yet restored.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._rates = [[initial_rate(group) for group in o.param_groups] for o in trainer.optimizers]

    def restore(self, trainer: pl.Trainer) -> tuple[float, float] | None:
        """Scales restored rates and schedules to those of the code; where schedules are in time stays.

        Returns the rate of the checkpoint and that of the code for the first parameter group in which they
        differ; `None` if they are the same.
        """
        first = None
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            ratios = []
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                saved = initial_rate(group)
                ratios.append(rate / saved if saved else 1.0)
                if rate != saved:
                    first = first or (saved, rate)
            scale_rates(optimizer, schedules, ratios)
        return first


def scale_rates(optimizer: Optimizer, schedules: Iterable[Any], ratios: Sequence[float]) -> None:
    """Scales the rates of an optimizer and of its schedules, with a ratio for each parameter group."""
    for group, ratio in zip(optimizer.param_groups, ratios, strict=False):
        if ratio != 1.0:
            _scale_group(group, ratio)
    for schedule in _flat(iter(s for s in schedules if s.optimizer is optimizer)):
        _scale_schedule(schedule, ratios)


def initial_rate(group: dict[str, Any]) -> float:
    """Returns the learning rate of a parameter group before any schedule; 0 if it has none."""
    return float(group.get("initial_lr", group.get("lr")) or 0.0)


def _scale_group(group: dict[str, Any], ratio: float) -> None:
    for key in _GROUP_KEYS:
        value = group.get(key)
        if isinstance(value, Tensor):
            value.mul_(ratio)
        elif value is not None:
            group[key] = value * ratio


def _scale_schedule(schedule: Any, ratios: Sequence[float]) -> None:
    for name in _SCHEDULE_LISTS:
        values = getattr(schedule, name, None)
        if isinstance(values, list) and len(values) == len(ratios):
            setattr(schedule, name, [value * ratio for value, ratio in zip(values, ratios, strict=True)])


def _flat(schedules: Iterator[Any]) -> Iterator[Any]:
    """Yields schedules and those that they are made of."""
    for schedule in schedules:
        yield schedule
        yield from _flat(iter(getattr(schedule, "_schedulers", ())))
