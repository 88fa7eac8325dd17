"""Drops gradients, and runs code after one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


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
