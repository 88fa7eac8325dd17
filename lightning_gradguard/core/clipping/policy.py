"""The interface of clipping policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sized
from typing import Any, Generic, TypeVar

from torch import Tensor

from lightning_gradguard.core.clipping.scalars import Scalar
from lightning_gradguard.core.norms import Gradients

History = TypeVar("History")


def reject_other_size(argument: str, size: int, saved: Sized) -> None:
    """Raises if a saved window has another size than the argument.

    Raises:
        ValueError: With both sizes.
    """
    if len(saved) != size:
        raise ValueError(f"{argument}={size} does not fit the saved window of {len(saved)} norms.")


class ClippingPolicy(ABC):
    """Decides by how much each gradient is scaled; subclass it for your own policy.

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
    #: True if the next step's `gradients.context` should have the norm of the weights; it is on the way of a
    #: measurement that reads them all, so it should rarely be.
    wants_weight_norm: bool = False

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


class HistoryPolicy(ClippingPolicy, Generic[History]):
    """A policy with a history: `coefficients` sets `_pending`, the history if the step is taken."""

    _state: History
    _pending: History

    def commit(self) -> None:
        """Makes the history with the step that `coefficients` saw last the history."""
        self._state = self._pending
