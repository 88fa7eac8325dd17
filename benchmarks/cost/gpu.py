"""Times what the suite adds to a hot step on a GPU, by CUDA events around blocks of steps.

The larger network takes some 50 GB of GPU memory: every variant has weights and optimizer state of its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytorch_lightning as pl
import torch

from benchmarks.cost.interleaved import Fit, fits
from benchmarks.cost.networks import GPT, Many
from benchmarks.cost.peers import AGAIN, BARE, CLIP, DEFERRED, EXACT, VARIANTS, Variant, suite
from benchmarks.cost.timings import Spread

#: Steps between two events: the host may run ahead within them, as it does in training.
BLOCK = 10
ROUNDS = 20
NEVER = 10**6
SNAPSHOTS = f"suite, a snapshot every {BLOCK} steps"
#: No step is logged, and none but those of the last variant takes a snapshot.
ARGUMENTS = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "log_every_n_steps": NEVER}
COMPARED = {
    BARE: VARIANTS[BARE],
    AGAIN: VARIANTS[AGAIN],
    CLIP: VARIANTS[CLIP],
    EXACT: replace(VARIANTS[EXACT], callbacks=lambda: suite(snapshot_every_n_steps=NEVER)),
    DEFERRED: replace(
        VARIANTS[DEFERRED], callbacks=lambda: suite(check="deferred", snapshot_every_n_steps=NEVER)
    ),
    SNAPSHOTS: replace(VARIANTS[EXACT], callbacks=lambda: suite(snapshot_every_n_steps=BLOCK)),
}
NETWORKS: dict[str, Callable[[], pl.LightningModule]] = {
    "GPT, 124M": partial(GPT, width=768, heads=12, vocabulary=50_304, batch=(8, 1024)),
    "GPT, 350M": partial(GPT, layers=24, width=1024, heads=16, vocabulary=50_304, batch=(4, 1024)),
    "2,000 small tensors": Many,
}


def on_gpu(variant: Variant) -> Variant:
    """The same variant, trained on the GPU."""
    return replace(variant, arguments={**variant.arguments, **ARGUMENTS})


def on_device(make: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """A network whose batch is on the device already: the transfer is not part of a step."""
    module = make()
    module.batch = module.batch.cuda()
    return module


def milliseconds(act: Callable[[], object]) -> float:
    """Measures the time of the device for a function, from an idle start."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    act()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def block(fit: Fit) -> None:
    """Some steps in a row."""
    for _ in range(BLOCK):
        fit.step()


def time_in_blocks(running: Mapping[str, Fit], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Milliseconds of a step by variant and round; blocks are in an order drawn anew in each round."""
    order, chance = list(running), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in running}
    for i in range(warm_up + rounds):
        chance.shuffle(order)
        for name in order:
            took = milliseconds(partial(block, running[name])) / BLOCK
            if i >= warm_up:
                found[name].append(took)
    return found


def read_floor(size: int) -> float:
    """Milliseconds that reading so many bytes takes at the bandwidth of a copy, which moves twice as many."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    target.copy_(source)
    return Spread.of([milliseconds(partial(target.copy_, source)) for _ in range(20)]).middle / 2


def table(network: str, rounds: int) -> str:
    """Renders the times of all variants of one network."""
    variants = {name: on_gpu(variant) for name, variant in COMPARED.items()}
    modules = {name: on_device(NETWORKS[network]) for name in variants}
    size = sum(p.nbytes for p in modules[BARE].parameters() if p.requires_grad)
    with fits(modules, variants) as running:
        found = time_in_blocks(running, rounds)
    floor = read_floor(size)
    bare = found[BARE]
    lines = [
        f"{network}: {size / 1e6:,.0f} MB of gradients, {Spread.of(bare).middle:.3f} ms a bare step, "
        f"{floor:.3f} ms to read the gradients once",
        "",
        "| variant | of a bare step | ms added | times the one read |",
        "|---|---|---|---|",
    ]
    for name, took in found.items():
        if name != BARE:
            added = Spread.of([mine - base for mine, base in zip(took, bare, strict=True)])
            lines.append(
                f"| {name} | {added.middle / Spread.of(bare).middle:+.2%} "
                f"| {added.middle:.3f} ({added.low:.3f} to {added.high:.3f}) | {added.middle / floor:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(networks: Sequence[str], rounds: int) -> None:
    """Prints a table for each network."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device, and torch sees none.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16-mixed, fused AdamW\n")
    for network in networks:
        print(table(network, rounds), flush=True)
