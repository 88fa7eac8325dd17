"""Measures the peak memory of a run, and time and memory along a long one."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace
from statistics import median

import torch

from benchmarks.cost.interleaved import fits
from benchmarks.cost.networks import GPT, Boring
from benchmarks.cost.peers import VARIANTS

#: Steps of the long run between two looks at it.
LOOK_EVERY = 1000


@dataclass(frozen=True)
class Look:
    """A thousand steps of a long run.

    Args:
        milliseconds: Of the median step.
        mean: Milliseconds of the mean step, with logging and snapshots.
        megabytes: The most memory that the process has had by now.
    """

    milliseconds: float
    mean: float
    megabytes: float


def peak() -> float:
    """Returns the peak memory of this process, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def peak_of_five_steps(variant: str) -> float:
    """Returns the peak memory of training the GPT, in MB. Call it in a process of its own."""
    with fits({variant: GPT()}, VARIANTS) as running:
        for _ in range(5):
            running[variant].step()
        return peak()


def long_run(variant: str, steps: int) -> list[Look]:
    """Trains the BoringModel, with Lightning's default logging. Call it in a process of its own."""
    torch.set_num_threads(1)  # as in `timings.whole`
    usual = {variant: replace(VARIANTS[variant], arguments={"log_every_n_steps": 50})}
    looks = []
    with fits({variant: Boring()}, usual) as running:
        running[variant].step()
        for _ in range(steps // LOOK_EVERY):
            seconds = []
            for _ in range(LOOK_EVERY):
                start = time.perf_counter()
                running[variant].step()
                seconds.append(time.perf_counter() - start)
            looks.append(Look(1e3 * median(seconds), sum(seconds), peak()))
    return looks
