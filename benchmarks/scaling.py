"""What the suite costs on many GPUs: lengths of its one vector, measured; times and memory, computed.

`python -m benchmarks.scaling` writes docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
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

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
WORLD_SIZES = (8, 64, 1024)
#: Assumed, not measured: GPUs of a node, and what NCCL is given to work with on H100 nodes.
NODE = 8
NVLINK = 450e9
INFINIBAND = 50e9
#: Seconds that a small all-reduce takes within a node, and that each doubling of nodes adds.
WITHIN_NODE = 20e-6
PER_DOUBLING = 10e-6
#: Bytes of a parameter with its state in a snapshot: float32 weights, and two moments of Adam.
SNAPSHOT_BYTES = 12
#: `NaNRollback(keep_snapshots=2)`, and one that waits to prove itself.
SNAPSHOTS = 3
#: Of `NaNRollback(max_dossiers=10, max_dossier_megabytes=100)`.
DOSSIERS, MEGABYTES = 10, 100


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


def _request(**wanted: Any) -> StepRequest:
    return StepRequest([torch.zeros(())], (None, None, False), **wanted)


MODELS = {"GPT-2, 124M": gpt(12, 768, 50257), "Llama, 6.7B": llama(32, 4096, 11008, 32000)}
VARIANTS = {
    "default": _request(),
    "a logged step": _request(weights=True),
    "`UnitwiseClipping`": _request(units=True),
    "`norm_type=inf`": _request(norm_types=(2.0, math.inf)),
}


@contextmanager
def group(world_size: int) -> Iterator[None]:
    """A process group that exists in name only."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def lengths(shapes: Sequence[tuple[int, ...]], request: StepRequest, *, sharded: bool) -> list[int]:
    """Bytes that each collective of one step receives on a rank, as the suite calls them."""
    seen: list[int] = []

    def all_reduce(vector: Tensor, **_: Any) -> None:
        seen.append(vector.numel() * vector.element_size())

    def all_gather(rows: list[Tensor], vector: Tensor) -> None:
        seen.append(len(rows) * vector.numel() * vector.element_size())

    selection = ParameterLayout({}).select(
        (str(i), parameter(s, sharded=sharded)) for i, s in enumerate(shapes)
    )
    pending = torch.zeros(len(shapes), dtype=torch.float64) if request.weights and sharded else None
    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather):
        measure(selection, replace(request, pending=pending))
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


def seconds(size: int, world_size: int) -> float:
    """An all-reduce of so many bytes, by the assumptions above."""
    nodes = world_size // NODE
    latency = WITHIN_NODE + PER_DOUBLING * math.log2(nodes)
    return latency + 2 * size / (NVLINK if nodes == 1 else INFINIBAND)


def size(amount: float) -> str:
    """Bytes, for people."""
    exponent = min(int(math.log10(amount)) // 3, 4)
    return f"{amount / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def vector_table() -> str:
    """The one vector, by model, strategy and what is asked for."""
    lines = [
        "| model | strategy | asked for | " + " | ".join(f"{n:,} GPUs" for n in WORLD_SIZES) + " |",
        "|---|---|---|" + "---|" * len(WORLD_SIZES),
    ]
    for model, shapes in MODELS.items():
        for sharded in (False, True):
            for variant, wanted in VARIANTS.items():
                if not sharded and variant != "default":
                    continue  # nothing of these crosses ranks there
                told = []
                for world_size in WORLD_SIZES:
                    with group(world_size):
                        (received,) = lengths(shapes, wanted, sharded=sharded)
                    took = 1e6 * seconds(received, world_size)
                    told.append(f"{size(received)}, {took:.0f} us")
                strategy = "FSDP2" if sharded else "DDP"
                lines.append(f"| {model} | {strategy} | {variant} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def memory_table() -> str:
    """Snapshots of one rank, and of the eight that share a host."""
    lines = [
        "| model | strategy | " + " | ".join(f"{n:,} GPUs" for n in WORLD_SIZES) + " |",
        "|---|---|" + "---|" * len(WORLD_SIZES),
    ]
    for model, shapes in MODELS.items():
        total = sum(math.prod(shape) for shape in shapes) * SNAPSHOT_BYTES * SNAPSHOTS
        for strategy in ("DDP", "FSDP2"):
            told = []
            for world_size in WORLD_SIZES:
                each = total / (world_size if strategy == "FSDP2" else 1)
                told.append(f"{size(each)} a rank, {size(NODE * each)} a host")
            lines.append(f"| {model} | {strategy} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    gradients = 2 * sum(math.prod(shape) for shape in MODELS["Llama, 6.7B"])
    return f"""# What the suite costs on many GPUs

Written by `python -m benchmarks.scaling`. The lengths of the vector are measured: the suite's own code packs
it, in a process group that exists in name only, from parameters with the rows of the two models. That there
is one collective a step is counted by `tests/runtime/test_strategies.py`. Times are computed, from bandwidths
and latencies that are **assumed**: {NVLINK / 1e9:.0f} GB/s within a node of {NODE} GPUs,
{INFINIBAND / 1e9:.0f} GB/s between nodes,
{WITHIN_NODE * 1e6:.0f} us for a small all-reduce within a node and {PER_DOUBLING * 1e6:.0f} us
more for each doubling of nodes. No such machine was at hand.

## The one collective

Bytes that a rank receives in the collective of an optimizer step, and how long it takes. Under DDP that is a
head of 7 numbers and one for each rank; under FSDP2 the head and one for each tensor. Each has 8 bytes.

{vector_table()}

For comparison: the gradients of Llama, 6.7B in bfloat16 are {size(gradients)}, which ranks exchange in every
step anyway. The suite's collective is bound by latency, and stands between the backward pass and the
optimizer, where nothing hides it. With `check="exact"` the host waits for its result as well.

* `UnitwiseClipping` adds up the squares of all units, of gradients and of weights. Where that is too much,
  `PerTensorClipping` needs no more than the default.
* `GradientNormMonitor(norm_type="inf")` has every rank hear of every other, since one collective cannot add
  up and find the largest at once: its bytes grow with the number of ranks. On a thousand GPUs, leave it at 2.

## Memory of snapshots

float32 weights and two moments of Adam, {SNAPSHOT_BYTES} bytes a parameter; `keep_snapshots=2`, and one that
has not proven itself yet. Under FSDP2 each rank keeps its own shards, under DDP each keeps everything.

{memory_table()}

* Under DDP, `keep_snapshots=1` takes a third off. Eight ranks on a host keep eight copies.
* `snapshot_device="same"` keeps them on the GPU, which is for small models.
* `check="deferred"` needs one copy more, and that on the GPU: {SNAPSHOT_BYTES} bytes for each
  parameter of a rank's own shard.

## Files

* `incidents.jsonl` is written by rank 0 only, `lost_batches.rank<r>.jsonl` by each rank that loses a batch:
  at most as many files as ranks. Point `incident_dir` at a file system that takes that.
* A dossier is written by one rank, on which all agree: at most {DOSSIERS} (`max_dossiers`) of {MEGABYTES} MB
  (`max_dossier_megabytes`), together {size(DOSSIERS * MEGABYTES * 1e6)}, whatever the number of GPUs.
  Where weights are sharded a batch is not run again, and there is no dossier.

## Settings for large runs

| setting | 8 GPUs | 64 | 1,024 |
|---|---|---|---|
| `NaNRollback(check=...)` | `"exact"` | `"deferred"`, if a step takes less than some 20 ms | `"deferred"` |
| `NaNRollback(keep_snapshots=...)` | 2 | 1 under DDP, 2 under FSDP2 | the same |
| `NaNRollback(snapshot_every_n_steps=...)` | 50 | 50 | 20: going back loses steps of all GPUs |
| `GradientNormMonitor(level=...)` | `"auto"` | `"module"` | `"module"` |
| `GradientNormMonitor(norm_type=...)` | any | any | 2 |
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
