"""Where the parts of a tensor that is spread over ranks lie: arithmetic on its layout, no communication."""

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
    """What is known of a parameter that FSDP1 flattened and cut.

    Args:
        pieces: Into how many.
        ndim: Dimensions that it had.
    """

    pieces: int
    ndim: int


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors is spread over ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, world_size: int) -> float:
    """What to multiply a sum over the local shard by, so that all ranks together count each element once.

    Ranks that hold the same shard share it: each adds its fraction, and if one of them holds something
    nonfinite, all of them hear of it.

    Args:
        tensor: Held by every rank, whole or in part.
        world_size: Number of ranks that add up.
    """
    shards = 1
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            shards *= size if _splits(placement) else 1
    return shards / world_size


def unit_places(tensor: Tensor) -> tuple[int, int]:
    """Where the units of the local shard stand among those of all shards.

    A unit is a row of a weight; a vector is one unit, however it is cut. Ranks that hold parts of the same
    rows have the same places; shards stand in the order of ranks, which need not be that of rows.

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
    """Rows in the shards of ranks before this one; each split has a size, a position, and may be strided."""
    here = tuple(position for _, position, _ in splits)
    before = 0
    for positions in product(*(range(size) for size, _, _ in splits)):
        if positions >= here:
            break
        length = rows
        # what is strided cuts what the others have cut already
        for index in sorted(range(len(splits)), key=lambda i: splits[i][2]):
            piece = -(-length // splits[index][0])
            length = max(0, min(piece, length - positions[index] * piece))
        before += length
    return before


def _splits(placement: Placement) -> bool:
    # `is_shard` says no to the strided shards that FSDP2 makes of what tensor parallelism has cut
    return not placement.is_replicate() and not placement.is_partial()
