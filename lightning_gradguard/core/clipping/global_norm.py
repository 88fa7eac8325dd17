"""Clipping by a fixed total norm."""

from __future__ import annotations

import math

from lightning_gradguard.core.arguments import positive
from lightning_gradguard.core.clipping.policy import ClippingPolicy
from lightning_gradguard.core.clipping.scalar import Scalar, clip_coefficient, total_norm
from lightning_gradguard.core.norms import Gradients


class GlobalNormClipping(ClippingPolicy):
    """Scales all gradients so that their total norm is at most `max_norm`.

    Args:
        max_norm: The bound; positive.

    Raises:
        ValueError: If `max_norm` is not positive.

    Example:
        >>> import torch
        >>> from lightning_gradguard.core.norms import measure_gradients, scale_gradients_
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = measure_gradients([("weight", weight)])
        >>> scale_gradients_(gradients, GlobalNormClipping(1.0).coefficients(gradients))
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
        arXiv:1211.5063.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = positive("max_norm", max_norm)

    def coefficients(self, gradients: Gradients) -> Scalar:
        """Returns one coefficient: `min(1, max_norm / total_norm)`."""
        self.threshold = self.max_norm
        norm = total_norm(gradients)
        return clip_coefficient(self.max_norm, norm, norm < math.inf)
