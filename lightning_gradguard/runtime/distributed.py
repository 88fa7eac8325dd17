"""The only collectives: every one of them runs on all ranks or on none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Key = TypeVar("Key")


def world_size() -> int:
    """Returns the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the index of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(vector: Tensor) -> Tensor:
    """Returns the sum of `vector` over all ranks; `vector` itself where there is one rank."""
    if world_size() == 1:
        return vector
    dist.all_reduce(vector, op=dist.ReduceOp.SUM)
    return vector


def reduce_together(sums: Mapping[Key, Tensor], largest: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Sums over all ranks, and largest values on any of them, in one collective.

    Args:
        sums: Vectors of shape `(n,)`, one dtype, of the same sizes in the same order on every rank.
        largest: Others, of which the maximum is taken. With any of them the collective is an all-gather,
            which takes more bytes.

    Returns:
        All of them, by key.
    """
    parts = {**sums, **largest}
    if world_size() == 1:
        return parts
    packed = torch.cat(list(parts.values()))
    if largest:
        by_rank = packed.new_empty(world_size(), len(packed))
        dist.all_gather(list(by_rank.unbind()), packed)
        n = sum(map(len, sums.values()))
        packed = torch.cat([by_rank[:, :n].sum(0), by_rank[:, n:].amax(0)])
    else:
        dist.all_reduce(packed)
    return dict(zip(parts, torch.split(packed, [len(part) for part in parts.values()]), strict=True))


def any_rank(flag: bool, device: torch.device) -> bool:
    """True if the flag is set on at least one rank. Synchronizes."""
    return bool(sum_over_ranks(torch.tensor([float(flag)], device=device)).item())


def largest_of_ranks(value: float, device: torch.device) -> float:
    """Returns the largest of the values of all ranks. Synchronizes."""
    vector = torch.tensor([value], dtype=torch.float32, device=device)
    if world_size() > 1:
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
    return float(vector.item())


def gather_objects(value: Any) -> list[Any]:
    """Returns the value of every rank, by rank. Synchronizes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors in place with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor of which ranks hold parts, put together on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def complete_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Redistributes gradients as their weights are, where tensor parallelism leaves them otherwise.

    It leaves partial sums, whose norm is meaningless, or shards of what the weight has whole. The optimizer
    would redistribute them itself at each access.
    """
    for parameter in parameters:
        weight, gradient = parameter.data, parameter.grad
        if (
            isinstance(weight, DTensor)
            and isinstance(gradient, DTensor)
            and gradient.placements != weight.placements
        ):
            parameter.grad = gradient.redistribute(placements=weight.placements)
