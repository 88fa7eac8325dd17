"""The context of a step, from its optimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.backoff import pending_rate_scale
from lightning_gradguard.core.clipping.scalars import Scalar
from lightning_gradguard.core.norms import Gradients, StepContext


def step_context(
    optimizer: Optimizer, gradients: Gradients, *, loss: Scalar, weight_norm: Scalar | None
) -> StepContext:
    """Returns the context of a step with a mean loss, NaN if none was seen, without a synchronization.

    Example:
        >>> from lightning_gradguard.core.norms import measure_gradients
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.ones(2)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> gradients = measure_gradients([("weight", weight)])
        >>> context = step_context(optimizer, gradients, loss=2.0, weight_norm=None)
        >>> context.learning_rate, context.momentum
        (0.1, 0.9)
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return StepContext(loss, weight_norm=weight_norm)
    groups = optimizer.param_groups
    rate: Scalar = groups[0]["lr"]
    if any(isinstance(group["lr"], Tensor) or group["lr"] != rate for group in groups[1:]):
        rate = _mean_rate(optimizer, gradients)
    momentum = max(float(group["momentum"]) for group in groups)
    return StepContext(loss, rate * pending_rate_scale(optimizer), momentum, weight_norm)


def _mean_rate(optimizer: Optimizer, gradients: Gradients) -> Tensor:
    """Returns the mean learning rate of the gradients by squared norm, on their device."""
    places = {id(parameter): i for i, parameter in enumerate(gradients.parameters)}
    total = torch.zeros_like(gradients.total_norm)
    for group in optimizer.param_groups:
        members = [places[id(p)] for p in group["params"] if id(p) in places]
        if members:
            norms = gradients.norms_of(members)
            total += group["lr"] * norms.square().sum()
    return total / gradients.total_norm.square().clamp(min=torch.finfo(torch.float64).tiny)
