"""Where the parts of a tensor that is spread over ranks lie: arithmetic on its layout, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    A unit is a row of a weight; a vector is one unit, however it is cut. Shards of fewer rows leave places
    free at their end. Ranks that hold parts of the same rows have the same places, in any order of rows.

    Args:
        tensor: A weight, or the gradient of one.

    Returns:
        Number of places, and the place of the first local unit.
    """
    if tensor.ndim < 2:
        return 1, 0
    rows, block, blocks = tensor.shape[0], 0, 1
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate() or ()
        for size, position, placement in zip(mesh.shape, coordinate, tensor.placements, strict=True):
            if _splits(placement) and placement.dim == 0:  # type: ignore[attr-defined]
                rows = -(-rows // size)
                block = block * size + position
                blocks *= size
    return blocks * rows, block * rows


def _splits(placement: Placement) -> bool:
    # `is_shard` says no to the strided shards that FSDP2 makes of what tensor parallelism has cut
    return not placement.is_replicate() and not placement.is_partial()
