"""Replacements of the `training_step` of an object by the suite, and the step of the user."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from lightning_gradguard.runtime.lightning_api import is_compiled

TrainingStep = Callable[..., Any]

#: The attribute of a replacement with the step before it, and with what the object itself had as its step.
_BEFORE = "_gradguard_before"


def replace_step(pl_module: pl.LightningModule, make: Callable[[TrainingStep], TrainingStep]) -> TrainingStep:
    """Replaces `training_step` by what `make` makes of it, and returns that for `restore_step`."""
    step, own = pl_module.training_step, vars(pl_module)
    replacement = functools.wraps(step)(make(step))
    setattr(replacement, _BEFORE, (step, own.get("training_step")))
    own["training_step"] = replacement
    return replacement


def restore_step(pl_module: pl.LightningModule, replacement: TrainingStep) -> None:
    """Takes a replacement out, also from below a later one; does nothing if it is out already."""
    entry = vars(pl_module).get("training_step")
    step, before = getattr(replacement, _BEFORE)
    if entry is replacement:
        vars(pl_module).pop("training_step")
        if before is not None:
            vars(pl_module)["training_step"] = before
    while _is_replacement(entry):
        _, inner = getattr(entry, _BEFORE)
        if inner is replacement:
            setattr(entry, _BEFORE, (step, before))
        entry = inner


def own_step(pl_module: pl.LightningModule) -> TrainingStep:
    """Returns the `training_step` that the user has written, or put on the object."""
    return _without_replacements(pl_module)[0]


def is_replaced_by_others(pl_module: pl.LightningModule) -> bool:
    """True if neither torch.compile nor the suite has replaced `training_step`, but what may count calls."""
    return _without_replacements(pl_module)[1] is not None and not is_compiled(pl_module)


def _without_replacements(pl_module: pl.LightningModule) -> tuple[TrainingStep, Any]:
    step: TrainingStep = pl_module.training_step
    entry = vars(pl_module).get("training_step")
    while _is_replacement(entry):
        step, entry = getattr(entry, _BEFORE)
    return step, entry


def _is_replacement(entry: Any) -> bool:
    # a mock has every attribute
    return inspect.isfunction(entry) and hasattr(entry, _BEFORE)
