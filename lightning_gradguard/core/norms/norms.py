"""Norms of tensors: dense, sparse, complex or sharded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_gradguard.core.norms.buckets import Buckets, norms_from_power_sums
from lightning_gradguard.core.norms.sharding import local_shard, unit_places


def default_norm(weights: Iterable[Tensor]) -> float:
    """Returns the norm that torch's default initialization gives matrices of these shapes; others count 0.

    The variance of a layer's weight is 1 / (3 x fan-in), so that its squared norm is a third of its rows.

    Example:
        >>> layer = nn.Linear(300, 1200)
        >>> round(default_norm(layer.parameters())), round(float(layer.weight.norm().detach()))
        (20, 20)
    """
    return math.sqrt(sum(len(weight) for weight in weights if weight.ndim > 1) / 3)


@torch.no_grad()
def power_sums(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Returns the sum of `|x| ** norm_type` over each tensor, the largest `|x|` for an infinite `norm_type`.

    For a sharded tensor it is the sum over the local shard: the sums of all shards are to be added up. Sparse
    tensors count by their coalesced values, complex ones by the modulus. A norm that overflows float32 is
    infinite.

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
    """Returns the norm of all tensors together from the norm of each; 0 without tensors."""
    if norms.numel() == 0:
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Returns the norm of each tensor, shape `(n,)`, float64.

    On a CPU, norms of random numbers are accurate to 1e-6 at any size, of equal numbers to 1e-4.

    Args:
        tensors: As `power_sums` takes them.
        norm_type: Any number of at least 1, or `inf`.
    """
    return norms_from_power_sums(power_sums(tensors, norm_type), norm_type)


def unitwise_norm(tensor: Tensor) -> Tensor:
    """Returns the L2 norm of each output unit: over all dimensions but the first, or of a whole vector.

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


@torch.no_grad()
def project_units_(weight: Tensor, max_norm: float, dim: int = 0) -> None:
    """Scales down, in place, the slices along a dimension whose L2 norm exceeds a bound.

    The others keep every bit, also in a second projection: a norm counts as larger from the rounding of its
    dtype on.

    Args:
        weight: Of two dimensions or more, not sharded.
        max_norm: The bound.
        dim: Dimension whose slices are measured.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> project_units_(weight, 2.0)
        >>> weight
        tensor([[1.2000, 1.6000],
                [0.0000, 1.0000]])
    """
    others = [d for d in range(weight.ndim) if d != dim]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=wide)
    # rounding moves each element, and so the norm, by at most half of eps
    bound = max_norm * (1 + max(torch.finfo(weight.dtype).eps, 1e-6))
    weight.mul_(torch.where((norms > bound) & norms.isfinite(), max_norm / norms, 1.0))


def unit_power_sums(tensor: Tensor) -> Tensor:
    """Returns squares of `unitwise_norm`, each at the place of its unit, so that shards add up.

    The shape is `(places,)`, the dtype float64; see `unit_places`.
    """
    places, start = unit_places(tensor)
    squares = unitwise_norm(tensor).double().square().view(-1)
    return nn.functional.pad(squares, (start, places - start - len(squares)))


def _plain_values(tensor: Tensor, norm_type: float) -> Tensor:
    """Returns dense real numbers with the same norm."""
    tensor = local_shard(tensor)
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        return torch.view_as_real(tensor) if norm_type == 2 else tensor.abs()
    return tensor
