"""Layout of tensors that are sharded over ranks: arithmetic only, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class FlatShard:
    """Layout of a parameter that FSDP1 flattened and sharded: number of shards, and original dimensions."""

    pieces: int
    ndim: int


def has_dtensors(tensors: Sequence[Tensor]) -> bool:
    """Returns True if any of the tensors is a DTensor."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a sharded tensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replica_factor(tensor: Tensor, world_size: int) -> float:
    """Returns the factor for a sum over the local shard with which all ranks count each element once.

    Each of the ranks that hold the same shard adds its fraction, so that a nonfinite value on one of them
    reaches the sum.

    Args:
        tensor: Held by every rank, whole or in part.
        world_size: Number of ranks in the sum.
    """
    shards = 1
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            shards *= size if _splits(placement) else 1
    return shards / world_size


def unit_places(tensor: Tensor) -> tuple[int, int]:
    """Returns the places of the units of the local shard among the units of all shards.

    A unit is a row of a weight; a vector is one unit, however it is sharded. Ranks that hold parts of the
    same rows have the same places. Shards are in the order of ranks, which may differ from that of rows.

    Args:
        tensor: A weight, or the gradient of one.

    Returns:
        Number of places, and the place of the first local unit.
    """
    if tensor.ndim < 2:
        return 1, 0
    splits: list[tuple[int, int, bool]] = []
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for size, position, placement in zip(
            mesh.shape, mesh.get_coordinate() or (), tensor.placements, strict=True
        ):
            if _splits(placement) and placement.dim == 0:  # type: ignore[attr-defined]
                splits.append((size, position, not placement.is_shard()))
    return tensor.shape[0], _rows_before(tensor.shape[0], tuple(splits))


@cache
def _rows_before(rows: int, splits: tuple[tuple[int, int, bool], ...]) -> int:
    """Counts the rows on the ranks before this one; a split has a size, a position, and may be strided."""
    here = tuple(position for _, position, _ in splits)
    before = 0
    for positions in product(*(range(size) for size, _, _ in splits)):
        if positions >= here:
            break
        length = rows
        # a strided split divides the pieces of the other splits
        for index in sorted(range(len(splits)), key=lambda i: splits[i][2]):
            piece = -(-length // splits[index][0])
            length = max(0, min(piece, length - positions[index] * piece))
        before += length
    return before


def _splits(placement: Placement) -> bool:
    # `is_shard` is false for the strided shards that FSDP2 makes of those of tensor parallelism
    return not placement.is_replicate() and not placement.is_partial()
