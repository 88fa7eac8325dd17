"""The losses that one training step calls: broken conditions, values, and those of a constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis.signals import loss_calls
from lightning_gradguard.core.detectors.diagnosis.signals.loss_baseline import LossBaselines
from lightning_gradguard.core.detectors.diagnosis.signals.records import LossRecord
from lightning_gradguard.core.detectors.diagnosis.signals.scalars import DeviceScalars, is_measurable
from lightning_gradguard.core.forensics.location import user_location

#: Calls of losses that are recorded.
MAX_CALLS = 32


class LossTrace:
    """Records the calls of losses.

    Args:
        scalars: To which the numbers of each call are added.
        baselines: Sums over the targets, to which those of this step are added.

    Attributes:
        records: One for each call, in order.
    """

    def __init__(self, scalars: DeviceScalars, baselines: LossBaselines) -> None:
        self.records: list[LossRecord] = []
        self._scalars = scalars
        self._baselines = baselines

    def add(
        self,
        name: str,
        answer: Tensor,
        target: Tensor,
        options: dict[str, Any],
        result: Tensor,
        *,
        is_data: bool,
    ) -> None:
        """Adds a call.

        Args:
            name: Of the loss function.
            answer: What the network gives it.
            target: Its targets.
            options: Other arguments.
            result: What it returned.
            is_data: True if the targets are of the batch.
        """
        if not (is_measurable(answer) and answer.requires_grad) or target.requires_grad:
            return
        target = target.detach()
        value, constants = result.detach().float().mean(), None
        if options.get("reduction", "mean") == "sum":
            n = (
                (target != options.get("ignore_index", -100)).sum()
                if name in ("cross_entropy", "nll_loss")
                else answer.numel()
            )
            value = value / n
        if is_data:
            key = f"{len(self.records)}.{name}"
            constants = self._baselines.constant(key, name, answer.detach(), target, options)
        self._add(name, answer, target, options, value, constants)

    def add_difference(self, args: Sequence[Any], is_data: Callable[[Tensor], bool]) -> None:
        """Adds a subtraction of targets, as in a loss that is written by hand, if it breaks a condition."""
        both = [arg for arg in args if isinstance(arg, Tensor)]
        if len(both) != 2 or both[0].requires_grad == both[1].requires_grad:
            return
        answer, target = sorted(both, key=lambda tensor: not tensor.requires_grad)
        if is_measurable(answer) and is_measurable(target) and is_data(target):
            self._add("difference", answer, target, {}, None, None)

    def _add(
        self,
        name: str,
        answer: Tensor,
        target: Tensor,
        options: dict[str, Any],
        value: Tensor | None,
        constants: tuple[Tensor, Tensor] | None,
    ) -> None:
        if len(self.records) >= MAX_CALLS:
            return
        add = self._scalars.add
        flags = {
            cause: add(torch.as_tensor(flag, device=answer.device))
            for cause, flag in loss_calls.broken_conditions(name, answer, target, options)
        }
        if name == "difference" and not flags:
            return
        nothing = torch.full((), torch.nan, device=answer.device)
        index = add(nothing if value is None else value)
        scales = (
            (self._scalars.add_rms(target), self._scalars.add_rms(answer))
            if name in loss_calls.REGRESSION
            else None
        )
        best = (None, None) if constants is None else (add(constants[0]), add(constants[1]))
        # against labels that are made up, as by a generator or between views, a large loss may be usual
        guess = math.nan if constants is None else loss_calls.loss_of_guessing(name, answer, options)
        location = user_location() if flags else None
        self.records.append(LossRecord(name, flags, index, best, scales, guess, location))
