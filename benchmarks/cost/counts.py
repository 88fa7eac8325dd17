"""Counts what each variant adds to a step: operations, synchronizations and bytes, by number of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch

from benchmarks.cost.interleaved import fits
from benchmarks.cost.meter import Meter
from benchmarks.cost.networks import ELEMENTS, Counted
from benchmarks.cost.peers import BARE, LOG_EVERY, VARIANTS
from lightning_gradguard.core.norms import PackedMeasurement

TENSORS = (2, 20, 200, 2000)
#: Steps by the time of which everything has warmed up, and nothing is due but logging.
WARM = 2 * LOG_EVERY + 2

Kind = Literal["hot", "logged"]


@dataclass(frozen=True)
class Count:
    """Counts that a variant adds to a bare step.

    Args:
        variant: Its name.
        tensors: Their number.
        fused: True if AdamW is.
        kind: Of step.
        ops: Operations.
        launches: Kernels on CUDA, by the meter's model.
        syncs: Synchronizations of the host.
        late: Reads of copies that began in the step before.
        read: Bytes, in those of all gradients.
        write: Bytes, in the same.
    """

    variant: str
    tensors: int
    fused: bool
    kind: Kind
    ops: int
    launches: int
    syncs: int
    late: int
    read: float
    write: float


def metered(variant: str, tensors: int, *, fused: bool) -> dict[Kind, Meter]:
    """A hot step and a logged one of a real fit, on a host that reads as from a device."""
    on_device = patch.object(PackedMeasurement, "is_on_host", False)
    with on_device, fits({variant: Counted(tensors, fused=fused)}, VARIANTS) as running:
        for _ in range(WARM):
            running[variant].step()
        with Meter() as hot:
            running[variant].step()
        while (running[variant].steps + 1) % LOG_EVERY:
            running[variant].step()
        with Meter() as logged:
            running[variant].step()
    return {"hot": hot, "logged": logged}


def count(variants: Iterable[str], numbers: Iterable[int], *, fused: bool) -> list[Count]:
    """Counts for the variants and these numbers of tensors. Call it in a process of its own."""
    torch.set_num_threads(1)  # counts are the same, and small operations need no second core
    found = []
    for tensors in numbers:
        bare = metered(BARE, tensors, fused=fused)
        gradients = 4 * ELEMENTS * tensors
        for variant in variants:
            for kind, meter in metered(variant, tensors, fused=fused).items():
                added = {name: value - bare[kind].row()[name] for name, value in meter.row().items()}
                found.append(
                    Count(
                        variant=variant,
                        tensors=tensors,
                        fused=fused,
                        kind=kind,
                        ops=added["ops"],
                        launches=added["launches"],
                        syncs=added["syncs"],
                        late=added["late"],
                        read=added["read"] / gradients,
                        write=added["write"] / gradients,
                    )
                )
    return found
