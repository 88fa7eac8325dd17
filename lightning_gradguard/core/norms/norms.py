"""Norms of gradients: measured, combined, and scaled by coefficients."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_gradguard.core.norms.buckets import (
    Buckets,
    _by_kind,
    _real,
    norms_from_power_sums,
    positions,
)
from lightning_gradguard.core.norms.sharding import is_sharded, local_shard, unit_places

#: Of the units of a gradient, and of the weights of the same units.
UnitNorms = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one optimizer step, measured: what a clipping policy decides from.

    Args:
        names: Name of each parameter.
        parameters: The parameters.
        tensors: Their gradients.
        norms: L2 norm of each gradient, shape `(n,)`, float64.
        total_norm: L2 norm of all of them together, a scalar, float64.
        units: What `unit_norms` returns, where it was added up over shards.
        known_norm: The total norm as a number, where the host has read it: what is decided from it then costs
            the device nothing.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    norms: Tensor
    total_norm: Tensor
    units: tuple[UnitNorms, ...] | None = None
    known_norm: float | None = None

    def unit_norms(self) -> tuple[UnitNorms, ...]:
        """L2 norms of each unit of each gradient, and of the weights of the same units; see `unitwise_norm`.

        The shards of a sharded tensor stand one after the other, as `core.norms.unit_places` says.

        Raises:
            ValueError: If units are cut, and nobody has added them up.
        """
        if self.units is not None:
            return self.units
        if is_sharded(self.tensors):
            raise ValueError(
                "The units of sharded gradients were not added up: a policy that calls `unit_norms()` needs "
                "`by_unit = True` in its class."
            )
        pairs = zip(self.tensors, self.parameters, strict=True)
        return tuple((unitwise_norm(tensor), unitwise_norm(weight.detach())) for tensor, weight in pairs)

    def without(self, names: Collection[str]) -> Gradients:
        """The same gradients, some left out.

        Args:
            names: Those left out; ones that are not there are ignored.
        """
        kept = [i for i, name in enumerate(self.names) if name not in names]
        if len(kept) == len(self.names):
            return self
        norms = self.norms[positions(tuple(kept), self.norms.device)]
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            parameters=tuple(self.parameters[i] for i in kept),
            tensors=tuple(self.tensors[i] for i in kept),
            norms=norms,
            total_norm=total_norm_from_norms(norms),
            units=None if self.units is None else tuple(self.units[i] for i in kept),
            known_norm=None,
        )


def with_gradient(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> list[tuple[str, nn.Parameter]]:
    """Those parameters that have a gradient: frozen, unused and empty ones are left out."""
    return [
        (name, parameter)
        for name, parameter in named_parameters
        if parameter.grad is not None and parameter.requires_grad and parameter.numel() > 0
    ]


def measure_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Gradients:
    """Measure the gradients of a module on one device or under DistributedDataParallel.

    Args:
        named_parameters: As from `module.named_parameters()`, after `backward`.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> measure_gradients(layer.named_parameters()).total_norm
        tensor(5., dtype=torch.float64)
    """
    named = with_gradient(named_parameters)
    tensors = tuple(p.grad for _, p in named if p.grad is not None)
    norms = tensor_norms(tensors)
    return Gradients(
        names=tuple(name for name, _ in named),
        parameters=tuple(parameter for _, parameter in named),
        tensors=tensors,
        norms=norms,
        total_norm=total_norm_from_norms(norms),
    )


@torch.no_grad()
def power_sums(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Sum of `|x| ** norm_type` over each tensor, or the largest `|x|` for an infinite `norm_type`.

    For a sharded tensor it is the sum over the local shard: shards add up. Sparse tensors count by their
    coalesced values, complex ones by the modulus. A norm that overflows float32 is infinite.

    Args:
        tensors: Of any shapes, devices and floating or complex dtypes.
        norm_type: Any number of at least 1, or `inf`.

    Returns:
        Shape `(n,)`, float64, on the device of the first tensor.

    Example:
        >>> power_sums([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        tensor([25.,  0.], dtype=torch.float64)
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    values = [_plain_values(tensor, norm_type) for tensor in tensors]
    return Buckets(values).power_sums(values, norm_type)


def total_norm_from_norms(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors together from the norm of each; 0 if there is none."""
    if norms.numel() == 0:
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0, buckets: Buckets | None = None) -> Tensor:
    """Norm of each tensor, shape `(n,)`, float64.

    On a CPU, norms of random numbers are accurate to 1e-6 at any size; those of equal ones to 1e-4.

    Args:
        tensors: See `power_sums`.
        norm_type: See `power_sums`.
        buckets: Of tensors like these, where they are all dense, real and whole.
    """
    if buckets is not None and tensors:
        return buckets.norms(tensors, norm_type)
    return norms_from_power_sums(power_sums(tensors, norm_type), norm_type)


def unitwise_norm(tensor: Tensor) -> Tensor:
    """L2 norm of each output unit: over all dimensions but the first; of the whole, for a vector.

    Args:
        tensor: A weight, or the gradient of one.

    Returns:
        Shape `(units, 1, ...)`, or `()` for a vector or scalar: it broadcasts to the tensor.

    Example:
        >>> unitwise_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[5.],
                [1.]])

    References:
        Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, arXiv:2102.06171.
    """
    local = local_shard(tensor)
    if local.is_sparse:
        rows = local.coalesce()
        norms = unitwise_norm(rows.values())
        everywhere = norms.new_zeros(local.shape[0], *norms.shape[1:])
        return everywhere.index_copy(0, rows.indices()[0], norms)
    wide = torch.float32 if local.dtype in (torch.float16, torch.bfloat16) else None
    dims = tuple(range(1, local.ndim)) or None
    norm: Tensor = torch.linalg.vector_norm(local, dim=dims, keepdim=dims is not None, dtype=wide)
    return norm


def unit_power_sums(tensor: Tensor) -> Tensor:
    """Squares of `unitwise_norm`, each at the place of its unit: shards add up.

    Args:
        tensor: A weight, or the gradient of one.

    Returns:
        Shape `(places,)`, float64.
    """
    places, start = unit_places(tensor)
    squares = unitwise_norm(tensor).double().square().view(-1)
    return nn.functional.pad(squares, (start, places - start - len(squares)))


@torch.no_grad()
def scale_gradients_(gradients: Gradients, coefficients: float | Tensor | Sequence[Tensor]) -> None:
    """Multiply gradients in place.

    Args:
        gradients: The gradients.
        coefficients: One scalar for all, as a number or a tensor, or one tensor for each gradient that
            broadcasts to it; for a sharded one a scalar, or one number for each of its units. A number of 1
            costs nothing.

    Raises:
        ValueError: If a coefficient does not fit to a sharded gradient.
    """
    if isinstance(coefficients, (float, int)):
        if coefficients != 1:
            for alike in _by_kind([_values(gradient) for gradient in gradients.tensors]):
                torch._foreach_mul_(alike, coefficients)
        return
    if isinstance(coefficients, Tensor):
        for alike in _by_kind([_values(gradient) for gradient in gradients.tensors]):
            torch._foreach_mul_(alike, coefficients.to(alike[0].device, _real(alike[0].dtype)))
        return
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for name, gradient, coefficient in zip(gradients.names, gradients.tensors, coefficients, strict=True):
        values = _values(gradient)
        scaled, factors = groups.setdefault((values.device, values.dtype), ([], []))
        scaled.append(values)
        factors.append(_fitting(name, gradient, coefficient))
    for (device, dtype), (scaled, factors) in groups.items():
        if all(factor.ndim == 0 for factor in factors):
            factors = list(torch.stack(factors).to(device, _real(dtype)).unbind())
        else:
            factors = [factor.to(device, _real(dtype)) for factor in factors]
        torch._foreach_mul_(scaled, factors)


def _values(gradient: Tensor) -> Tensor:
    """What is multiplied: a local shard, the values of a sparse gradient."""
    local = local_shard(gradient)
    return local._values() if local.is_sparse else local


def _fitting(name: str, gradient: Tensor, coefficient: Tensor) -> Tensor:
    """A coefficient as it broadcasts to the values of its gradient that this rank has."""
    if coefficient.ndim == 0:
        return coefficient
    if gradient.is_sparse:
        return coefficient[gradient._indices()[0]]
    if not is_sharded([gradient]):
        return coefficient
    places, start = unit_places(gradient)
    if coefficient.shape != (places, *(1,) * (gradient.ndim - 1)):
        raise ValueError(
            f"A coefficient of shape {tuple(coefficient.shape)} does not fit to the sharded gradient "
            f"of {name}, of shape {tuple(gradient.shape)}: return one of shape (), "
            "or like its `unit_norms()`."
        )
    return coefficient[start : start + len(local_shard(gradient))]


def _plain_values(tensor: Tensor, norm_type: float) -> Tensor:
    """Dense real numbers with the same norm."""
    tensor = local_shard(tensor)
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        return torch.view_as_real(tensor) if norm_type == 2 else tensor.abs()
    return tensor
