"""Clipping of each unit relative to the norm of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradguard.core.arguments import positive
from lightning_gradguard.core.clipping.policy import ClippingPolicy
from lightning_gradguard.core.clipping.scalar import EPS
from lightning_gradguard.core.norms import Gradients


class UnitwiseClipping(ClippingPolicy):
    """Clips the gradient of each unit to a fraction of the norm of the unit's weights (AGC).

    A unit is a row of a weight, the incoming weights of one output; a vector is one unit. The authors exclude
    the classifier's head: pass its name to `AdaptiveGradientClipping(exclude=...)`.

    Args:
        clipping: Largest ratio of a unit's gradient norm to its weight norm; positive.
        eps: Lower bound of weight norms, so that zero weights can grow; positive.

    Raises:
        ValueError: If an argument is not positive.

    References:
        Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, arXiv:2102.06171.
    """

    by_unit = True

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        self.clipping = positive("clipping", clipping)
        self.eps = positive("eps", eps)

    def coefficients(self, gradients: Gradients) -> list[Tensor]:
        """Returns one coefficient for each unit."""
        return [self._by_unit(norm, weight) for norm, weight in gradients.unit_norms()]

    def _by_unit(self, norm: Tensor, weight: Tensor) -> Tensor:
        largest = self.clipping * weight.clamp(min=self.eps)
        clipped = torch.where(norm < largest, 1.0, largest / norm.clamp(min=EPS))
        return torch.where(torch.isfinite(norm), clipped, 1.0)
