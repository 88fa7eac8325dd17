"""Scales gradients in place, one coefficient for all or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.core.norms.buckets import by_device_and_dtype, coefficient_dtype
from lightning_gradguard.core.norms.gradients import Gradients
from lightning_gradguard.core.norms.sharding import is_sharded, local_shard, unit_places


@torch.no_grad()
def scale_gradients_(gradients: Gradients, coefficients: float | Tensor | Sequence[Tensor]) -> None:
    """Multiplies gradients in place.

    Args:
        gradients: The gradients.
        coefficients: One scalar for all, as a number or a tensor, or one tensor for each gradient that
            broadcasts to it; for a sharded one a scalar, or one number for each of its units. The number 1
            costs nothing.

    Raises:
        ValueError: If a coefficient does not fit a sharded gradient.
    """
    if isinstance(coefficients, (float, int)):
        if coefficients != 1:
            for alike in by_device_and_dtype([_stored_values(gradient) for gradient in gradients.tensors]):
                torch._foreach_mul_(alike, coefficients)
        return
    if isinstance(coefficients, Tensor):
        for alike in by_device_and_dtype([_stored_values(gradient) for gradient in gradients.tensors]):
            torch._foreach_mul_(alike, coefficients.to(alike[0].device, coefficient_dtype(alike[0].dtype)))
        return
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for name, gradient, coefficient in zip(gradients.names, gradients.tensors, coefficients, strict=True):
        values = _stored_values(gradient)
        scaled, factors = groups.setdefault((values.device, values.dtype), ([], []))
        scaled.append(values)
        factors.append(_local_coefficient(name, gradient, coefficient))
    for (device, dtype), (scaled, factors) in groups.items():
        if all(factor.ndim == 0 for factor in factors):
            factors = list(torch.stack(factors).to(device, coefficient_dtype(dtype)).unbind())
        else:
            factors = [factor.to(device, coefficient_dtype(dtype)) for factor in factors]
        torch._foreach_mul_(scaled, factors)


def _stored_values(gradient: Tensor) -> Tensor:
    """Returns the memory to multiply: a local shard, or the values of a sparse gradient."""
    local = local_shard(gradient)
    return local._values() if local.is_sparse else local


def _local_coefficient(name: str, gradient: Tensor, coefficient: Tensor) -> Tensor:
    """Returns the coefficient that broadcasts to the values of the gradient on this rank."""
    if coefficient.ndim == 0:
        return coefficient
    if gradient.is_sparse:
        return coefficient[gradient._indices()[0]]
    if not is_sharded([gradient]):
        return coefficient
    places, start = unit_places(gradient)
    if coefficient.shape != (places, *(1,) * (gradient.ndim - 1)):
        raise ValueError(
            f"A coefficient of shape {tuple(coefficient.shape)} does not fit the sharded gradient "
            f"of {name}, of shape {tuple(gradient.shape)}: return one of shape (), "
            "or like its `unit_norms()`."
        )
    return coefficient[start : start + len(local_shard(gradient))]
