"""Writes docs/scaling.md, from measured lengths of the one vector and assumed bandwidths."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.cost.scaling import MODELS, VARIANTS, group, lengths

PAGE = Path(__file__).parents[1] / "scaling.md"
WORLD_SIZES = (8, 64, 1024)
#: Assumed, not measured: GPUs of a node, and bandwidths of NCCL on H100 nodes.
NODE = 8
NVLINK = 450e9
INFINIBAND = 50e9
#: Seconds that a small all-reduce takes within a node, and that each doubling of nodes adds.
WITHIN_NODE = 20e-6
PER_DOUBLING = 10e-6
#: Bytes of a parameter with its state in a snapshot: float32 weights, and two moments of Adam.
SNAPSHOT_BYTES = 12
#: `NaNRollback(keep_snapshots=2)`, and one that is not qualified yet.
SNAPSHOTS = 3
#: Of `NaNRollback(max_dossiers=10, max_dossier_megabytes=100)`.
DOSSIERS, MEGABYTES = 10, 100


def seconds(size: int, world_size: int) -> float:
    """Duration of an all-reduce of so many bytes, by the assumptions above."""
    nodes = world_size // NODE
    latency = WITHIN_NODE + PER_DOUBLING * math.log2(nodes)
    return latency + 2 * size / (NVLINK if nodes == 1 else INFINIBAND)


def size(amount: float) -> str:
    """Formats bytes with a unit."""
    exponent = min(int(math.log10(amount)) // 3, 4)
    return f"{amount / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def vector_table() -> str:
    """Renders the lengths of the one vector, by model, strategy and configuration."""
    lines = [
        "| model | strategy | configuration | " + " | ".join(f"{n:,} GPUs" for n in WORLD_SIZES) + " |",
        "|---|---|---|" + "---|" * len(WORLD_SIZES),
    ]
    for model, shapes in MODELS.items():
        for sharded in (False, True):
            for variant, wanted in VARIANTS.items():
                if not sharded and variant != "default":
                    continue  # these need no communication there
                cells = []
                for world_size in WORLD_SIZES:
                    with group(world_size):
                        (received,) = lengths(shapes, wanted, sharded=sharded)
                    took = 1e6 * seconds(received, world_size)
                    cells.append(f"{size(received)}, {took:.0f} us")
                strategy = "FSDP2" if sharded else "DDP"
                lines.append(f"| {model} | {strategy} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table() -> str:
    """Renders the snapshots of one rank, and of the eight that share a host."""
    lines = [
        "| model | strategy | " + " | ".join(f"{n:,} GPUs" for n in WORLD_SIZES) + " |",
        "|---|---|" + "---|" * len(WORLD_SIZES),
    ]
    for model, shapes in MODELS.items():
        total = sum(math.prod(shape) for shape in shapes) * SNAPSHOT_BYTES * SNAPSHOTS
        for strategy in ("DDP", "FSDP2"):
            cells = []
            for world_size in WORLD_SIZES:
                each = total / (world_size if strategy == "FSDP2" else 1)
                cells.append(f"{size(each)} a rank, {size(NODE * each)} a host")
            lines.append(f"| {model} | {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page() -> str:
    """Renders the whole page."""
    gradients = 2 * sum(math.prod(shape) for shape in MODELS["Llama, 6.7B"])
    return f"""# What the suite costs on many GPUs

Written by `make scaling`. The length of the vector is measured: the suite's own code packs it, in a fake
process group, from parameters with the rows of the two models. `tests/contracts/strategies` verifies that a
step has one collective. Times are computed from bandwidths and latencies that are **assumed**:
{NVLINK / 1e9:.0f} GB/s within a node of {NODE} GPUs, {INFINIBAND / 1e9:.0f} GB/s between nodes,
{WITHIN_NODE * 1e6:.0f} us for a small all-reduce within a node and {PER_DOUBLING * 1e6:.0f} us
more for each doubling of nodes. No such machine was available.

## The one collective

Bytes that a rank receives in the collective of an optimizer step, and its duration. Under DDP the vector is a
header of 8 numbers and one number for each rank; under FSDP2 the header and one number for each tensor. Each
number has 8 bytes.

{vector_table()}

For comparison: the gradients of Llama, 6.7B in bfloat16 are {size(gradients)}, which ranks exchange in every
step in any case. The suite's collective is bound by latency, and takes place between the backward pass and
the optimizer, where nothing overlaps with it. With `check="exact"` the host also synchronizes with its
result.

* `UnitwiseClipping` reduces the squared norms of all units, of gradients and of weights. If that is too much,
  use `PerTensorClipping`, which needs no more than the default.
* `GradientNormMonitor(norm_type="inf")` gathers values of all ranks, since one collective cannot compute sums
  and maxima at once: its bytes grow with the number of ranks. On a thousand GPUs, use the default of 2.

## Memory of snapshots

float32 weights and two moments of Adam, {SNAPSHOT_BYTES} bytes a parameter; `keep_snapshots=2`, and one
pending snapshot. Under FSDP2 each rank keeps its own shards, under DDP each keeps everything.

{memory_table()}

* Under DDP, `keep_snapshots=1` saves a third. Eight ranks on a host keep eight copies.
* `snapshot_device="same"` keeps them on the GPU, for small models.
* `check="deferred"` needs one more copy, on the GPU: {SNAPSHOT_BYTES} bytes for each
  parameter of a rank's own shard.

## Files

* `incidents.jsonl` is written by rank 0 only, `lost_batches.rank<r>.jsonl` by each rank that loses a batch:
  at most as many files as ranks. Set `incident_dir` to a file system that supports that.
* A dossier is written by one rank, the same one for all: at most {DOSSIERS} (`max_dossiers`) of
  {MEGABYTES} MB (`max_dossier_megabytes`), together {size(DOSSIERS * MEGABYTES * 1e6)}, whatever the
  number of GPUs. With sharded weights, no batch is replayed, and there is no dossier.

## Settings for large runs

| setting | 8 GPUs | 64 | 1,024 |
|---|---|---|---|
| `NaNRollback(check=...)` | `"exact"` | `"deferred"`, if a step takes less than some 20 ms | `"deferred"` |
| `NaNRollback(keep_snapshots=...)` | 2 | 1 under DDP, 2 under FSDP2 | the same |
| `NaNRollback(snapshot_every_n_steps=...)` | 50 | 50 | 20: a rollback loses steps of all GPUs |
| `GradientNormMonitor(level=...)` | `"auto"` | `"module"` | `"module"` |
| `GradientNormMonitor(norm_type=...)` | any | any | 2 |
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
