"""What a clipping policy is given and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lightning_gradguard.core.norms import Gradients

#: A number that the host knows, or one on the device that it has not waited for.
Scalar = float | Tensor
#: Kept out of divisions by a norm; the value that `torch.nn.utils.clip_grad_norm_` uses.
EPS = 1e-6


class ClippingPolicy(ABC):
    """Decides by how much each gradient is scaled. Subclass it to bring a policy of your own.

    `coefficients` looks, `commit` remembers: only a step that takes place enters the history. Nothing is
    read to the host, so that a policy costs no synchronization; from a norm that the host knows anyway
    (`gradients.known_norm`) it is best to reckon on the host.

    Example:
        >>> class Half(ClippingPolicy):
        ...     def coefficients(self, gradients):
        ...         return torch.full_like(gradients.total_norm, 0.5)
        >>> Half().state_dict()
        {}
    """

    #: The total norm that was allowed for the gradients seen last; `None` without such a number.
    threshold: Scalar | None = None
    #: Whether `coefficients` asks for `gradients.unit_norms()`, which have to be added up over shards.
    by_unit: bool = False

    @abstractmethod
    def coefficients(self, gradients: Gradients) -> Scalar | list[Tensor]:
        """By what to multiply the gradients. Changes no history; a nonfinite norm gives 1.

        Args:
            gradients: Measured before anybody wrote.

        Returns:
            One scalar for all, as a number or a tensor, or one tensor for each gradient that broadcasts to
            it; for a sharded gradient one of shape `()` or like its unit norms.
        """

    def commit(self) -> None:  # noqa: B027 - a policy without a history has nothing to do
        """Take what `coefficients` saw last into the history: the step takes place."""

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Continue with a saved history."""
