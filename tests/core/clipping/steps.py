"""Gradients of given norms, and clipping steps with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_gradguard import ClippingPolicy
from lightning_gradguard.core.norms import Gradients, measure_gradients, scale_gradients_


def gradients_of(*grads: Any, weight: float = 1.0) -> Gradients:
    named = []
    for i, grad in enumerate(grads):
        tensor = torch.as_tensor(grad, dtype=torch.float32)
        parameter = nn.Parameter(torch.full_like(tensor, weight))
        parameter.grad = tensor.clone()
        named.append((f"p{i}", parameter))
    return measure_gradients(named)


def step(policy: ClippingPolicy, gradients: Gradients) -> float:
    scale_gradients_(gradients, policy.coefficients(gradients))
    policy.commit()
    return float(torch.cat([t.flatten() for t in gradients.tensors]).double().norm())


def applied(policy: ClippingPolicy, norms: Sequence[float]) -> list[float]:
    return [step(policy, gradients_of([norm])) for norm in norms]
