"""Has a fused optimizer's kernel scale gradients, or skip its update."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.backoff import ScaledLearningRate
from lightning_gradguard.runtime.optimizer_hooks import after_step

#: Modules whose hooks on a step do not write to weights.
_WITHOUT_WRITES = {after_step.__module__, ScaledLearningRate.__module__}


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

    Args:
        optimizer: One that `supports_fused_override`.
        parameters: Those that it is about to step.
    """
    hooks = {getattr(hook, "__module__", "") for hook in optimizer._optimizer_step_post_hooks.values()}
    if not type(optimizer).__module__.startswith("torch.optim") or not hooks <= _WITHOUT_WRITES:
        return False
    stateless = all(group.get("momentum", 1) == 0 for group in optimizer.param_groups)
    states = (optimizer.state.get(parameter) or {"": None} for parameter in parameters)
    return stateless or all(value is not None for state in states for value in state.values())
