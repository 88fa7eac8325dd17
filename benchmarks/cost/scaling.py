"""Measures the bytes that the suite's one collective receives, in process groups of any size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_gradguard.runtime.steps.measuring import StepRequest, measure
from lightning_gradguard.runtime.steps.parameters import ParameterLayout


def request(**wanted: Any) -> StepRequest:
    """A step with one loss and no flags."""
    return StepRequest([torch.zeros(())], (None, None, False), **wanted)


def gpt(layers: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of GPT-2's parameters."""
    block = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    return [(vocabulary, width), (1024, width), *(block * layers), (width,), (width,)]


def llama(layers: int, width: int, hidden: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of Llama's parameters."""
    block = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden), (width,), (width,)]
    return [(vocabulary, width), *(block * layers), (width,), (vocabulary, width)]


MODELS = {"GPT-2, 124M": gpt(12, 768, 50257), "Llama, 6.7B": llama(32, 4096, 11008, 32000)}
VARIANTS = {
    "default": request(),
    "a logged step": request(weights=True),
    "`UnitwiseClipping`": request(units=True),
    "`norm_type=inf`": request(norm_types=(2.0, math.inf)),
}


@contextmanager
def group(world_size: int) -> Iterator[None]:
    """A process group that exists in name only."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def lengths(shapes: Sequence[tuple[int, ...]], wanted: StepRequest, *, sharded: bool) -> list[int]:
    """Bytes that each collective of one step receives on a rank, as the suite calls them."""
    seen: list[int] = []

    def all_reduce(vector: Tensor, **_: Any) -> None:
        seen.append(vector.numel() * vector.element_size())

    def all_gather(rows: list[Tensor], vector: Tensor) -> None:
        seen.append(len(rows) * vector.numel() * vector.element_size())

    selection = ParameterLayout({}).select(
        (str(i), parameter(s, sharded=sharded)) for i, s in enumerate(shapes)
    )
    pending = torch.zeros(len(shapes), dtype=torch.float64) if wanted.weights and sharded else None
    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather):
        measure(selection, replace(wanted, pending=pending))
    return seen


def parameter(shape: tuple[int, ...], *, sharded: bool) -> nn.Parameter:
    """One of the same number of rows; how many columns there are plays no part in the vector."""
    tensor = torch.ones(shape[:1] + (1,) * (len(shape) - 1))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        tensor = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
    result = nn.Parameter(tensor)
    result.grad = torch.ones_like(tensor)
    return result
