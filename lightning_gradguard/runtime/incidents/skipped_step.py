"""A step that was lost: its batches, and what an incident says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.core.remedies import advice, advice_for_cause
from lightning_gradguard.runtime.incidents.replay import SeenBatch
from lightning_gradguard.runtime.rollback.trainer_state import TrainerState


@dataclass
class Window:
    """The batches of one optimizer step, and what goes back if it does not take place.

    Args:
        step: `trainer.global_step` when it began.
        batches: As `training_step` got them; empty where nobody is going to examine them.
        companions: What goes back besides tensors; `None` where nothing does.
        n_served: How many batches there were.
        was_skipped: Whether a run that is resumed had skipped one of them.
    """

    step: int
    batches: list[SeenBatch]
    companions: TrainerState | None
    n_served: int = 0
    was_skipped: bool = False


@dataclass(frozen=True)
class SkippedStep:
    """A step that was lost, until people are told.

    Args:
        measurement: Its numbers; `None` until they are read.
        window: Its batches.
        batch_idx: The last of them.
        names: Of the parameters with a gradient.
        norms: Of these gradients, shape `(n,)`.
    """

    measurement: Measurement | None
    window: Window
    batch_idx: int
    names: tuple[str, ...]
    norms: Tensor

    def describe(self, *, has_scaler: bool) -> tuple[str, dict[str, Any]]:
        """The kind of incident it is, and its facts.

        Args:
            has_scaler: Whether there is a GradScaler, which scales gradients to the edge of overflow.
        """
        measurement = self.measurement
        assert measurement is not None
        facts: dict[str, Any] = {"step": self.window.step, "batch_idx": self.batch_idx, "action": "skipped"}
        if measurement.was_lost:
            return "lost_batch", facts
        if measurement.nonfinite_weights:
            return "nonfinite_weights", facts
        if measurement.nonfinite_losses:
            return "nonfinite_loss", facts
        if measurement.nonfinite_buffers:
            return "nonfinite_buffers", facts
        if measurement.ranks_disagree:
            return "corrupted_gradient", {**facts, "value": measurement.total_norm}
        if has_scaler:
            return "amp_overflow", facts
        sick = (~torch.isfinite(self.norms)).tolist()
        where = tuple(name for name, is_sick in zip(self.names, sick, strict=True) if is_sick)
        return "nonfinite_gradient", {**facts, "where": where, "value": len(where) / max(len(sick), 1)}


def origin_facts(origin: Origin, kind: str, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """What an incident says of what was found out.

    Args:
        origin: What was found out.
        kind: Of the incident.
        where: What is known to be at fault without it.
    """
    return {
        "cause": origin.cause,
        "detail": origin.detail,
        "where": origin.where or where,
        "advice": advice_for_cause(origin.cause, origin.where) or advice(kind, where),
    }
