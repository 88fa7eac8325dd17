"""Every element of a sharded tensor is counted once, and every unit has its own place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_gradguard.core.norms import (
    Gradients,
    local_shard,
    replica_factor,
    scale_gradients_,
    unit_places,
    unit_power_sums,
    unitwise_norm,
)

MESH = (2, 3)
WORLD_SIZE = 6
placements = st.sampled_from([Shard(0), Shard(1), Replicate()])
layouts = st.tuples(placements, placements)
shapes = st.tuples(st.integers(1, 13), st.integers(1, 7))


@pytest.fixture(autouse=True)
def _no_group_stays() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def shards(tensor: Tensor, layout: Sequence[Shard | Replicate]) -> Iterator[DTensor]:
    """Yields the shard of each rank, one after the other, in a fake process group."""
    for rank in range(WORLD_SIZE):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=FakeStore())
        mesh = init_device_mesh("cpu", MESH)
        yield distribute_tensor(tensor, mesh, list(layout), src_data_rank=None)


@given(shape=shapes, layout=layouts)
def test_replica_factors_count_every_element_once(
    shape: tuple[int, int], layout: Sequence[Shard | Replicate]
) -> None:
    tensor = torch.rand(shape, dtype=torch.float64)
    total = sum(float(local_shard(s).sum()) * replica_factor(s, WORLD_SIZE) for s in shards(tensor, layout))
    assert total == pytest.approx(float(tensor.sum()))


@given(shape=shapes, layout=layouts)
def test_power_sums_of_sharded_units_add_up_at_their_places(
    shape: tuple[int, int], layout: Sequence[Shard | Replicate]
) -> None:
    tensor = torch.rand(shape, dtype=torch.float64) + 0.1
    sums: Tensor = sum(unit_power_sums(s) * replica_factor(s, WORLD_SIZE) for s in shards(tensor, layout))  # type: ignore[assignment]
    expected = unitwise_norm(tensor).view(-1)
    torch.testing.assert_close(sums.sqrt().sort().values, expected.sort().values)


@given(shape=shapes, layout=layouts)
def test_unit_is_scaled_by_the_coefficient_at_its_place(
    shape: tuple[int, int], layout: Sequence[Shard | Replicate]
) -> None:
    rows = torch.arange(1.0, shape[0] + 1).view(-1, 1).expand(shape).contiguous()
    for shard in shards(rows, layout):
        places, start = unit_places(shard)
        here = local_shard(shard)
        # the values of the row at each place identify the row
        coefficient = torch.zeros(places, 1)
        coefficient[start : start + len(here)] = here[:, :1] if here.shape[1] else 0.0
        gradients = Gradients(("w",), (shard,), (shard,), torch.ones(1), torch.ones(()))
        expected = here**2
        scale_gradients_(gradients, [coefficient])
        torch.testing.assert_close(local_shard(shard), expected)


def strided_shards(tensor: Tensor) -> Iterator[DTensor]:
    """Yields shards of FSDP2 over tensor parallelism: the right dimension of the mesh splits first."""
    layout = (_StridedShard(0, split_factor=MESH[1]), Shard(0))
    for rank in range(WORLD_SIZE):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=FakeStore())
        mesh = init_device_mesh("cpu", MESH)
        local = piece(piece(tensor, MESH[1], rank % MESH[1]), MESH[0], rank // MESH[1])
        shape, stride = tensor.shape, tensor.stride()
        yield DTensor.from_local(local, mesh, layout, run_check=False, shape=shape, stride=stride)


def piece(tensor: Tensor, pieces: int, index: int) -> Tensor:
    chunks = tensor.chunk(pieces)
    return chunks[index] if index < len(chunks) else tensor[:0]


@given(shape=shapes)
def test_strided_shards_count_like_other_shards(shape: tuple[int, int]) -> None:
    tensor = torch.rand(shape, dtype=torch.float64) + 0.1
    total = sum(float(local_shard(s).sum()) * replica_factor(s, WORLD_SIZE) for s in strided_shards(tensor))
    assert total == pytest.approx(float(tensor.sum()))
    sums: Tensor = sum(unit_power_sums(s) * replica_factor(s, WORLD_SIZE) for s in strided_shards(tensor))  # type: ignore[assignment]
    torch.testing.assert_close(sums.sqrt().sort().values, unitwise_norm(tensor).view(-1).sort().values)


def test_coefficient_of_a_wrong_shape_is_rejected_on_every_rank() -> None:
    for shard in shards(torch.ones(3, 4), (Shard(0), Replicate())):
        gradients = Gradients(("w",), (shard,), (shard,), torch.ones(1), torch.ones(()))
        with pytest.raises(ValueError, match=r"of shape \(3, 4\) does not fit .* of w"):
            scale_gradients_(gradients, [torch.ones(3, 4)])
        with pytest.raises(ValueError, match="by_unit = True"):
            gradients.unit_norms()


def test_without_excludes_units_with_their_gradient() -> None:
    one, two = torch.ones(2, 3), torch.ones(4)
    units = ((torch.ones(2, 1), torch.ones(2, 1)), (torch.tensor(2.0), torch.tensor(3.0)))
    gradients = Gradients(("w", "b"), (one, two), (one, two), torch.ones(2), torch.ones(()), units)
    assert gradients.without({"w"}).unit_norms() == units[1:]


def test_sharded_vector_is_one_unit() -> None:
    vector = torch.rand(5, dtype=torch.float64)
    sums = [
        unit_power_sums(s) * replica_factor(s, WORLD_SIZE) for s in shards(vector, (Shard(0), Replicate()))
    ]
    torch.testing.assert_close(sum(sums), vector.square().sum().view(1))
