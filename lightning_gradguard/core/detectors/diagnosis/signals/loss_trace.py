"""The losses that one training step calls: broken conditions, values, and those of a constant."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis.sample import LossSignal
from lightning_gradguard.core.detectors.diagnosis.signals import loss_calls
from lightning_gradguard.core.detectors.diagnosis.signals.loss_baseline import LossBaselines
from lightning_gradguard.core.detectors.diagnosis.signals.records import LossRecord
from lightning_gradguard.core.detectors.diagnosis.signals.scalars import DeviceScalars, is_measurable
from lightning_gradguard.core.forensics.location import Location, user_location

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
        self._scale: int | None = None
        self._variances: list[tuple[int, Location | None]] = []
        self._has_noise, self._is_open = False, True

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
        if record := self._add(name, answer, target, options, value, constants):
            hook = partial(self._on_gradient, record, result.detach().clone(), value)
            result.register_hook(hook)  # type: ignore[no-untyped-call]

    def add_total(self, loss: Tensor) -> None:
        """Adds the loss of the step, to which the calls add."""
        hook = partial(self._on_gradient, None, loss.detach(), loss.detach())
        loss.register_hook(hook)  # type: ignore[no-untyped-call]

    def add_latent(self, name: str, result: Tensor) -> None:
        """Adds an operation by which latents are sampled: the exponential of their log variance, or noise."""
        if name == "exp" and result.requires_grad and result.ndim:
            hook = partial(self._on_variance, user_location())
            result.register_hook(hook)  # type: ignore[no-untyped-call]
        self._has_noise |= name.startswith("randn")

    def divergence(self) -> tuple[float, Location | None]:
        """Returns the weight of the divergence of a VAE within the loss, and its line; NaN if there is none.

        It has the exponential of a log variance, of which the noise of the latents has another one.
        """
        scale = self._scalars[self._scale]
        found = [(self._scalars[index] / scale, location) for index, location in self._variances if scale]
        is_known = self._has_noise and len(found) > 1
        return max(found, key=lambda one: one[0]) if is_known else (math.nan, None)

    def signals(self) -> list[LossSignal]:
        """Returns the calls, whose numbers are on the host."""
        return [record.signal(self._scalars, self._scalars[self._scale]) for record in self.records]

    def close(self) -> None:
        """Stops recording."""
        self._is_open = False

    def _on_variance(self, location: Location | None, gradient: Tensor) -> None:
        if self._is_open and len(self._variances) < MAX_CALLS:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                # the divergence has half of each variance
                index = self._scalars.add(2 * len(gradient) * gradient.float().mean())
            self._variances.append((index, location))

    def _on_gradient(
        self, record: LossRecord | None, result: Tensor, value: Tensor, gradient: Tensor
    ) -> None:
        if not self._is_open:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            index = self._scalars.add((gradient.float() * result.float()).sum() / value.float())
        if record is None:
            self._scale = index
        else:
            record.added = index

    def add_difference(self, args: Sequence[Any], data: Container[Tensor]) -> None:
        """Adds a subtraction of targets, as in a loss that is written by hand, if it breaks a condition."""
        both = [arg for arg in args if isinstance(arg, Tensor)]
        if len(both) != 2 or both[0].requires_grad == both[1].requires_grad:
            return
        answer, target = sorted(both, key=lambda tensor: not tensor.requires_grad)
        if is_measurable(answer) and is_measurable(target) and target in data:
            self._add("difference", answer, target, {}, None, None)

    def _add(
        self,
        name: str,
        answer: Tensor,
        target: Tensor,
        options: dict[str, Any],
        value: Tensor | None,
        constants: tuple[Tensor, Tensor] | None,
    ) -> LossRecord | None:
        if len(self.records) >= MAX_CALLS:
            return None
        add = self._scalars.add
        flags = {
            cause: add(torch.as_tensor(flag, device=answer.device))
            for cause, flag in loss_calls.broken_conditions(name, answer, target, options)
        }
        if name == "difference" and not flags:
            return None
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
        rows = target.numel() / max(len(target), 1)
        self.records.append(LossRecord(name, flags, index, best, scales, guess, user_location(), rows))
        return self.records[-1]
