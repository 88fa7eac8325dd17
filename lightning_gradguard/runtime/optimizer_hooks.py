"""Changes one optimizer step: drops its gradients, scales or skips in its kernel, runs code after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core.backoff import ScaledLearningRate

#: Optimizers whose update does not depend on the scale of the gradient.
_SCALE_FREE = ("Ada", "NAdam", "RAdam", "RMSprop", "Rprop", "Lion", "Muon", "Shampoo", "SOAP")
#: Largest usual rates over the default one: of optimizers that divide by the gradient, and of others.
LARGEST = (30.0, 300.0)
#: Share of the largest usual rate below which a rate is no cure, as the loss or its gradient is out of scale.
NO_CURE = 1e-6
#: Modules whose hooks on a step do not write to weights.
_WITHOUT_WRITES = {__name__, ScaledLearningRate.__module__}


def after_step(optimizer: Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Runs `act`, without recording gradients, right after each update, until the handle is removed."""

    def hook(*_: Any) -> None:
        with torch.no_grad():
            act()

    return optimizer.register_step_post_hook(hook)


def after_next_step(optimizer: Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Runs `act` like `after_step`, but once: an optimizer may step several times in a batch."""
    left = [act]
    return after_step(optimizer, lambda: left.pop()() if left else None)


def drop_gradients(optimizer: Optimizer, *, unscales_itself: bool) -> None:
    """Prevents the optimizer's next update.

    Gradients become `None`, never zero: with zeros, momentum and weight decay would still move weights. An
    optimizer that unscales itself scans its gradients in its own kernel, under a GradScaler that requires
    some; they are made nonfinite for it to find.
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


class FusedStepOverride:
    """Has the optimizer's own kernel scale gradients, or skip its update, in its next step alone.

    A GradScaler does the same to fused optimizers: no pass over the gradients, no host synchronization.

    Args:
        optimizer: One that `supports_fused_override`, about to step.
        grad_scale: Gradients are divided by it; shape `()`, float32.
        found_inf: 1 if the update is to be skipped, bit for bit, else 0; shape `()`, float32.
    """

    def __init__(
        self, optimizer: Optimizer, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        self._attributes = {
            name: value
            for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf))
            if value is not None
        }
        self._of = vars(optimizer)
        self._of.update(self._attributes)
        self._handle = after_step(optimizer, self._restore)

    def end(self) -> None:
        """Restores the optimizer's attributes, also if it did not step."""
        self._restore()
        self._handle.remove()

    def _restore(self) -> None:
        for name in self._attributes:
            self._of.pop(name, None)


def supports_fused_override(optimizer: Optimizer) -> bool:
    """True if the optimizer's kernel can scale and skip: fused Adam, AdamW, SGD and Adagrad."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and all(group.get("fused") for group in optimizer.param_groups)


def skip_is_exact(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """True if a step that the optimizer's kernel skips changes nothing.

    It does where state is created, as the kernel leaves that uninitialized, and where other code writes to
    the weights as well: a subclass of the optimizer, or hooks on it.
    """
    hooks = {getattr(hook, "__module__", "") for hook in optimizer._optimizer_step_post_hooks.values()}
    if not type(optimizer).__module__.startswith("torch.optim") or not hooks <= _WITHOUT_WRITES:
        return False
    stateless = all(group.get("momentum", 1) == 0 for group in optimizer.param_groups)
    states = (optimizer.state.get(parameter) or {"": None} for parameter in parameters)
    return stateless or all(value is not None for state in states for value in state.values())


def is_scale_free(optimizer: Optimizer) -> bool:
    """True if the update of an optimizer does not depend on the scale of the gradient, as far as is known."""
    return type(optimizer).__name__.startswith(_SCALE_FREE)


def largest_usual_rate(optimizer: Optimizer) -> float:
    """Returns about the largest learning rate that is in use for an optimizer, by the default of its class.

    Example:
        >>> weights = [torch.zeros(1, requires_grad=True)]
        >>> f"{largest_usual_rate(torch.optim.Adam(weights)):g}"
        '0.03'
        >>> f"{largest_usual_rate(torch.optim.Adadelta(weights)):g}"
        '1'
    """
    named = inspect.signature(type(optimizer)).parameters.get("lr")
    default = 1e-3 if named is None or not isinstance(named.default, float) else named.default
    return max(default, min(1.0, default * (LARGEST[0] if is_scale_free(optimizer) else LARGEST[1])))
