"""The only collectives: every one of them runs on all ranks or on none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(vector: Tensor) -> Tensor:
    """The sum of `vector` over all ranks; `vector` itself where there is one rank.

    Args:
        vector: Shape `(n,)`, the same `n` on every rank.
    """
    if world_size() == 1:
        return vector
    dist.all_reduce(vector, op=dist.ReduceOp.SUM)
    return vector


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank. Waits for the answer."""
    return bool(sum_over_ranks(torch.tensor([float(flag)], device=device)).item())


def gather_objects(value: Any) -> list[Any]:
    """What every rank has to say, by rank. Waits for all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors in place with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors is spread over ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def counts_here(tensor: Tensor) -> bool:
    """Whether this rank adds its part of a tensor to a sum over all ranks.

    A part that several ranks hold alike is counted by the first of them only.
    """
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and all(
        placement.is_shard() or position == 0
        for placement, position in zip(tensor.placements, coordinate, strict=True)
    )
