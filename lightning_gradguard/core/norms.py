"""Norms of gradients, weights and units, and scaling gradients by what was decided from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_gradguard.core.sharding import is_sharded, local_shard, unit_places

#: Of the units of a gradient, and of the weights of the same units.
UnitNorms = tuple[Tensor, Tensor]
#: Elements whose squares are summed in float32 on a CPU before float64 takes over: one float32 sum over
#: 1e7 elements is off by 4e-4, sums of this length combined in float64 by less than 1e-6.
CHUNK = 65_536


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
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    norms: Tensor
    total_norm: Tensor
    units: tuple[UnitNorms, ...] | None = None

    def unit_norms(self) -> tuple[UnitNorms, ...]:
        """L2 norms of each unit of each gradient, and of the weights of the same units; see `unitwise_norm`.

        The shards of a sharded tensor stand one after the other, as `core.sharding.unit_places` says.

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


@lru_cache(maxsize=256)
def positions(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices on a device. They are kept: each copy to a GPU would wait for it."""
    return torch.tensor(indices, dtype=torch.long, device=device)


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
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        values = _plain_values(tensor, norm_type)
        for chunk in _chunks(values) if values.device.type == "cpu" else (values,):
            if chunk.numel():
                groups[values.device, values.dtype].append((index, chunk))
    result = torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].device)
    for (_, dtype), members in groups.items():
        chunks = [chunk for _, chunk in members]
        norms = torch.stack(torch._foreach_norm(chunks, norm_type, dtype=_accumulator(dtype, norm_type)))
        norms = norms.to(result.device, torch.float64)
        owners = positions(tuple(index for index, _ in members), result.device)
        if norm_type == math.inf:
            result.scatter_reduce_(0, owners, norms, "amax")
        else:
            result.index_add_(0, owners, norms**norm_type)
    return result


def norms_from_power_sums(sums: Tensor, norm_type: float = 2.0) -> Tensor:
    """Norms from what `power_sums` returned, added up over shards."""
    return sums if norm_type == math.inf else sums.pow(1 / norm_type)


def total_norm_from_norms(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors together from the norm of each; 0 if there is none."""
    if norms.numel() == 0:
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of each tensor, shape `(n,)`, float64, accurate to 1e-6 at any size.

    Args:
        tensors: See `power_sums`.
        norm_type: See `power_sums`.
    """
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
def scale_gradients_(gradients: Gradients, coefficients: Tensor | Sequence[Tensor]) -> None:
    """Multiply gradients in place.

    Args:
        gradients: The gradients.
        coefficients: One scalar for all, or one tensor for each gradient that broadcasts to it; for a
            sharded one a scalar, or one number for each of its units.

    Raises:
        ValueError: If a coefficient does not fit to a sharded gradient.
    """
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for index, gradient in enumerate(gradients.tensors):
        shared = isinstance(coefficients, Tensor)
        coefficient = coefficients if isinstance(coefficients, Tensor) else coefficients[index]
        if gradient.is_sparse:
            rows = gradient._indices()[0]
            values = gradient._values()
            by_row = coefficient if coefficient.ndim == 0 else coefficient[rows]
            values.mul_(by_row.to(values.device, _real(values.dtype)))
            continue
        local = local_shard(gradient)
        if is_sharded([gradient]) and coefficient.ndim:
            places, start = unit_places(gradient)
            if coefficient.shape != (places, *(1,) * (gradient.ndim - 1)):
                raise ValueError(
                    f"A coefficient of shape {tuple(coefficient.shape)} does not fit to the sharded gradient "
                    f"of {gradients.names[index]}, of shape {tuple(gradient.shape)}: return one of shape (), "
                    "or like its `unit_norms()`."
                )
            coefficient = coefficient[start : start + len(local)]
        scaled, factors = groups.setdefault((local.device, local.dtype), ([], []))
        scaled.append(local)
        if not shared or not factors:
            factors.append(coefficient.to(local.device, _real(local.dtype)))
    for scaled, factors in groups.values():
        if isinstance(coefficients, Tensor):
            torch._foreach_mul_(scaled, factors[0])
        else:
            torch._foreach_mul_(scaled, factors)


def _plain_values(tensor: Tensor, norm_type: float) -> Tensor:
    """Dense real numbers with the same norm."""
    tensor = local_shard(tensor.detach())
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        return torch.view_as_real(tensor) if norm_type == 2 else tensor.abs()
    return tensor


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Views of at most `CHUNK` elements; the order of elements does not matter to a norm."""
    if tensor.numel() <= CHUNK:
        return (tensor,)
    if not tensor.is_contiguous():
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
        tensor = tensor.permute(order).contiguous()
    return torch.split(tensor.view(-1), CHUNK)


def _accumulator(dtype: torch.dtype, norm_type: float) -> torch.dtype | None:
    """What to sum in; only the kernels of the two usual norms are accurate in float32."""
    if norm_type not in (2.0, math.inf):
        return torch.float64
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


def _real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coefficients: half precision would round them, and the norm could pass its bound."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
