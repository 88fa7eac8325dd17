"""The interface of clipping policies, and arithmetic on numbers of the host or of the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.norms import Gradients

#: A number that the host knows, or one on the device that is read without a host synchronization.
Scalar = float | Tensor
#: Added to a norm that divides; the value of `torch.nn.utils.clip_grad_norm_`.
EPS = 1e-6


class ClippingPolicy(ABC):
    """Decides by how much each gradient is scaled; subclass it for a policy of your own.

    `coefficients` is pure and `commit` updates the history, so that only a step that is taken enters it. A
    policy should not synchronize with the device; if the host knows the total norm (`gradients.known_norm`),
    arithmetic on the host is cheapest.

    Example:
        >>> import torch
        >>> class Half(ClippingPolicy):
        ...     def coefficients(self, gradients):
        ...         return torch.full_like(gradients.total_norm, 0.5)
        >>> Half().state_dict()
        {}
    """

    #: Largest total norm allowed for the gradients seen last; `None` without such a number.
    threshold: Scalar | None = None
    #: True if `coefficients` calls `gradients.unit_norms()`, which must be summed over shards.
    by_unit: bool = False

    @abstractmethod
    def coefficients(self, gradients: Gradients) -> Scalar | list[Tensor]:
        """Returns the coefficients of the gradients; changes no history, and a nonfinite norm gives 1.

        Args:
            gradients: Gradients, measured before any callback wrote to them.

        Returns:
            One scalar for all, as a number or a tensor, or one tensor for each gradient that broadcasts to
            it; for a sharded gradient one of shape `()` or like its unit norms.
        """

    def commit(self) -> None:  # noqa: B027 - a policy may have no history
        """Adds what `coefficients` saw last to the history: the step is taken."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the history."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Continues with a saved history."""


def total_norm(gradients: Gradients) -> Scalar:
    """Returns the total norm, as a number if the host knows it."""
    return gradients.total_norm if gradients.known_norm is None else gradients.known_norm


def clip_coefficient(max_norm: Scalar, norm: Scalar, is_finite: Tensor | bool) -> Scalar:
    """Returns the coefficient for gradients of this norm; 1 if the norm is within bounds, or nonfinite."""
    return where((norm > max_norm) & is_finite, max_norm / (norm + EPS), 1.0)


def where(condition: Tensor | bool, one: Scalar, other: Scalar) -> Scalar:
    """Returns one if the condition holds, else the other; on the device of the condition."""
    if isinstance(condition, Tensor):
        return torch.where(condition, one, other)
    return one if condition else other


def fmax(one: Scalar, other: Scalar) -> Scalar:
    """Returns the larger of two numbers of one kind; the other if one is NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.fmax(one, other)
    return one if one > other else other


def clamp_min(value: Scalar, bound: float) -> Scalar:
    """Returns the value, or the bound if that is larger; NaN stays."""
    if isinstance(value, Tensor):
        return value.clamp(min=bound)
    return bound if value < bound else value


def clamp_max(value: Scalar, bound: float) -> Scalar:
    """Returns the value, or the bound if that is smaller; NaN stays."""
    if isinstance(value, Tensor):
        return value.clamp(max=bound)
    return bound if value > bound else value


def lerp(start: Scalar, end: Scalar, weight: float) -> Scalar:
    """Interpolates linearly between two numbers of one kind."""
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)


def as_like(norm: Scalar, value: Scalar) -> Scalar:
    """Returns a value in the form of a norm: a number, or a scalar tensor on its device."""
    if isinstance(norm, Tensor):
        return torch.as_tensor(value, dtype=torch.float64, device=norm.device)
    return float(value)
