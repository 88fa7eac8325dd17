"""Scales learning rates, drops gradients and runs code around one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class ScaledLearningRate:
    """Multiplies the learning rates of an optimizer by `scale`, only while it steps.

    Schedulers, `LearningRateMonitor` and checkpoints see the scheduled rates. Learning rates that are tensors
    are scaled in place and restored bit for bit.

    Args:
        optimizer: Any torch optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rate = ScaledLearningRate(optimizer)
        >>> rate.scale = 0.25
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (-0.25, 1.0)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.scale = 1.0
        self._optimizer = optimizer
        self._scheduled: list[tuple[float | Tensor, float | None]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._apply),
            optimizer.register_step_post_hook(self._undo),
        ]

    def scheduled(self) -> list[float | Tensor]:
        """The learning rate of each parameter group, as a schedule or the user has set it.

        One that is a tensor is copied, without a host synchronization.
        """
        # Lightning's closure runs within the step, while rates are scaled
        rates = [scheduled for scheduled, _ in self._scheduled] or [
            group["lr"] for group in self._optimizer.param_groups
        ]
        return [rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates]

    def remove(self) -> None:
        """Restores the rates and removes the hooks."""
        self._undo()
        for handle in self._handles:
            handle.remove()

    def _apply(self, *_: Any) -> None:
        # a closure that raised in the step before has skipped the post-hook
        self._undo()
        if self.scale == 1.0:
            return
        for group in self._optimizer.param_groups:
            scheduled = group["lr"]
            if isinstance(scheduled, Tensor):
                self._scheduled.append((scheduled.clone(), None))
                scheduled.mul_(self.scale)
            else:
                group["lr"] = scheduled * self.scale
                self._scheduled.append((scheduled, group["lr"]))

    def _undo(self, *_: Any) -> None:
        for group, (scheduled, scaled) in zip(self._optimizer.param_groups, self._scheduled, strict=False):
            if isinstance(scheduled, Tensor):
                group["lr"].copy_(scheduled)
            elif group["lr"] == scaled:  # else the closure has set a rate of its own
                group["lr"] = scheduled
        self._scheduled = []


def after_step(optimizer: Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Runs `act` right after each update of the optimizer, until the handle is removed.

    Args:
        optimizer: The optimizer about to step, possibly already inside of `step`.
        act: Called, without recording gradients, with weights as the update left them.
    """

    def hook(*_: Any) -> None:
        with torch.no_grad():
            act()

    return optimizer.register_step_post_hook(hook)


def drop_gradients(optimizer: Optimizer, *, unscales_itself: bool) -> None:
    """Prevents the optimizer's next update.

    Gradients become `None`, never zero: with zeros, momentum and weight decay would still move weights.

    Args:
        optimizer: The optimizer about to step.
        unscales_itself: Whether the optimizer looks for nonfinite gradients in its own kernel, under a
            GradScaler that demands gradients to look at; then one is made nonfinite for it to find.
    """
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if unscales_itself and parameter.grad is not None:
                gradients.append(parameter.grad)
            else:
                parameter.grad = None
    if gradients:
        torch._foreach_mul_(gradients, torch.nan)
        # fused SGD allocates its momentum uninitialized, and leaves it so when it finds NaN
        if optimizer not in _known_state:
            # permanently: a hook that removes itself makes the optimizer fail
            optimizer.register_step_post_hook(_remove_new_state)
        _known_state[optimizer] = {parameter: dict(state) for parameter, state in optimizer.state.items()}


#: Optimizer state from before a skipped step, until that step is over.
_known_state: WeakKeyDictionary[Optimizer, dict[Any, dict[str, Any]] | None] = WeakKeyDictionary()


def _remove_new_state(optimizer: Optimizer, *_: Any) -> None:
    known, _known_state[optimizer] = _known_state[optimizer], None
    if known is not None:
        optimizer.state.clear()
        optimizer.state.update(known)
