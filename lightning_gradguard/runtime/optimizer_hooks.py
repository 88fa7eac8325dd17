"""Learning rates scaled, gradients dropped and code run around one optimizer step."""

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

    Schedulers, `LearningRateMonitor` and checkpoints see the rates that were asked for. Learning rates that
    are tensors are scaled in place and put back bit for bit.

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
        self._asked: list[tuple[float | Tensor, float | None]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._apply),
            optimizer.register_step_post_hook(self._undo),
        ]

    def scheduled(self) -> list[float | Tensor]:
        """The learning rate of each parameter group, as a schedule or the user has set it.

        One that is a tensor is a copy, for which nobody has waited.
        """
        # Lightning's closure runs within the step, while rates are scaled
        rates = [asked for asked, _ in self._asked] or [group["lr"] for group in self._optimizer.param_groups]
        return [rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates]

    def remove(self) -> None:
        """Put the rates back and take the hooks off."""
        self._undo()
        for handle in self._handles:
            handle.remove()

    def _apply(self, *_: Any) -> None:
        # a closure that raised in the step before has skipped the post-hook
        self._undo()
        if self.scale == 1.0:
            return
        for group in self._optimizer.param_groups:
            asked = group["lr"]
            if isinstance(asked, Tensor):
                self._asked.append((asked.clone(), None))
                asked.mul_(self.scale)
            else:
                group["lr"] = asked * self.scale
                self._asked.append((asked, group["lr"]))

    def _undo(self, *_: Any) -> None:
        for group, (asked, scaled) in zip(self._optimizer.param_groups, self._asked, strict=False):
            if isinstance(asked, Tensor):
                group["lr"].copy_(asked)
            elif group["lr"] == scaled:  # else the closure has set a rate of its own
                group["lr"] = asked
        self._asked = []


def after_step(optimizer: Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Run `act` right after each update of the optimizer, until the handle is removed.

    Args:
        optimizer: The optimizer about to step, possibly already inside of `step`.
        act: Called, without recording gradients, with weights as the update left them.
    """

    def hook(*_: Any) -> None:
        with torch.no_grad():
            act()

    return optimizer.register_step_post_hook(hook)


def drop_gradients(optimizer: Optimizer, *, unscales_itself: bool) -> None:
    """Keep the optimizer's next update from taking place.

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
        # fused SGD makes its momentum of unwritten memory, and leaves it unwritten when it finds NaN
        if optimizer not in _known_state:
            # for good: the optimizer does not bear that a hook removes itself
            optimizer.register_step_post_hook(_forget_newborn_state)
        _known_state[optimizer] = {parameter: dict(state) for parameter, state in optimizer.state.items()}


#: What state there was before a step that is dropped, until that is over.
_known_state: WeakKeyDictionary[Optimizer, dict[Any, dict[str, Any]] | None] = WeakKeyDictionary()


def _forget_newborn_state(optimizer: Optimizer, *_: Any) -> None:
    known, _known_state[optimizer] = _known_state[optimizer], None
    if known is not None:
        optimizer.state.clear()
        optimizer.state.update(known)
