"""Measures the cost of the suite beside that of its peers: all that can be counted or timed on a CPU.

`python -m benchmarks.cost` takes a quarter of an hour on two idle cores and writes docs/performance.md. Less
than all of it (`--parts`, `--networks`, `--rounds`, `--variants`) is printed. `--gpu` times steps on a CUDA
device instead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from benchmarks.cost import counts, gpu, memory, timings
from benchmarks.cost.networks import LARGE, NETWORKS
from benchmarks.cost.peers import BARE, DEFERRED, EVERY, EXACT, PEERS
from docs.generators import performance

PARTS = ("counts", "steps", "hooks", "snapshots", "memory", "long run")
#: Rounds that count. Of five steps four are hot.
ROUNDS = {"GPT": 25, "ResNet-34": 30, "2,000 small tensors": 25, "BoringModel": 30}
#: Of steps that consist of hooks and optimizer; and snapshots.
ROUNDS_OF_HOOKS, SNAPSHOTS = 50, 20
STEPS = 10_000

P = ParamSpec("P")
Found = TypeVar("Found")


def apart(function: Callable[P, Found], *args: P.args, **kwargs: P.kwargs) -> Found:
    """Calls a function in a fresh process, with memory and global switches of its own."""
    start = time.perf_counter()
    # not `multiprocessing.Pool`, which ends its processes by a signal that Lightning handles
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(function, *args, **kwargs).result()
    print(f"{function.__name__} {args}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def main(
    parts: Sequence[str], networks: Sequence[str], rounds: int | None, variants: Sequence[str] | None
) -> str:
    """Measures the requested parts; returns the page.

    Args:
        parts: Some of `PARTS`.
        networks: Some of `NETWORKS`.
        rounds: Of each part that is timed; those above if `None`.
        variants: Of the steps that are timed, the bare one among them; all if `None`.
    """
    found = performance.Found(load=os.getloadavg()[0])
    large = [name for name in LARGE if name in networks]
    if "counts" in parts:
        ours = (EXACT, DEFERRED)
        found.counts += apart(counts.count, (*ours, *PEERS), counts.TENSORS, fused=True)
        found.counts += apart(counts.count, ours, counts.TENSORS, fused=False)
    if "steps" in parts:
        for name in networks:
            found.whole[name] = apart(timings.whole, name, rounds or ROUNDS[name], variants)
    if "hooks" in parts:
        for name in large:
            found.prepared[name] = apart(timings.hooks_and_optimizer, name, rounds or ROUNDS_OF_HOOKS)
    if "snapshots" in parts:
        for name in large:
            found.kept[name] = apart(timings.keeping, name, rounds or SNAPSHOTS)
    if "memory" in parts:
        for variant in (BARE, EXACT, DEFERRED):
            found.peaks[variant] = apart(memory.peak_of_five_steps, variant)
    if "long run" in parts:
        for variant in (BARE, EXACT):
            found.long_runs[variant] = apart(memory.long_run, variant, STEPS)
    return performance.page(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--variants", nargs="+", choices=EVERY, help="of timed steps")
    parser.add_argument(
        "--gpu", nargs="*", choices=gpu.NETWORKS, help="time these networks, or all, on a GPU"
    )
    options = parser.parse_args()
    if options.gpu is not None:
        gpu.main(options.gpu or list(gpu.NETWORKS), options.rounds or gpu.ROUNDS)
        sys.exit()
    text = main(options.parts, options.networks, options.rounds, options.variants)
    if options == parser.parse_args([]):
        performance.PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
