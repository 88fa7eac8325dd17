"""Counts and times what `TrainingDiagnosis` adds to a run by the steps that it samples.

`python -m benchmarks.cost.samples --rounds 20` prints the tables of docs/diagnosis.md. Operations do not
depend on the machine; times are of pairs of steps, one sampled and one not, that take turns in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.casebook.parts import Gpt, characters, spell
from benchmarks.cost.interleaved import SAMPLE_EVERY, fits
from benchmarks.cost.meter import Meter
from benchmarks.cost.networks import GPT, ResNet
from benchmarks.cost.peers import OURS, Variant
from lightning_gradguard import TrainingDiagnosis
from lightning_gradguard.callbacks import training_diagnosis
from lightning_gradguard.runtime.diagnosis.schedule import is_sampled

VARIANTS = {
    "without": Variant("", "Lightning"),
    "with": Variant("names symptoms", OURS, lambda: [TrainingDiagnosis()]),
}


class Language(pl.LightningModule):
    """A character model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.batch = Gpt(2), characters(1)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss."""
        return spell(self.net, batch)

    def configure_optimizers(self) -> Any:
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


NETWORKS: dict[str, Callable[[], pl.LightningModule]] = {
    "a GPT of two blocks": Language,
    "GPT": GPT,
    "ResNet-34": ResNet,
}


def counted(network: str, steps: int) -> dict[str, int | str]:
    """Returns what the callback adds over a number of steps.

    Operations of two sampled steps, the second and the third, and of two others are counted.
    """
    modules = {name: NETWORKS[network]() for name in VARIANTS}
    plain: list[int] = []
    added: dict[bool, list[int]] = {True: [], False: []}
    with fits(modules, VARIANTS) as running:
        for step in range(5):
            counts = {}
            for name, fit in running.items():
                with Meter() as meter:
                    fit.step()
                counts[name] = meter.ops
            if step:
                plain.append(counts["without"])
                added[is_sampled(step, SAMPLE_EVERY)].append(counts["with"] - counts["without"])
    n = sum(is_sampled(step, SAMPLE_EVERY) for step in range(steps))
    of_sample, of_other = mean(added[True]), mean(added[False])
    return {
        "operations of a step without it": round(mean(plain)),
        "added to a sampled step": round(of_sample),
        "added to another step": round(of_other),
        f"added by {n} samples in {steps:,} steps": f"{n * (of_sample - of_other) / steps / mean(plain):.2%}",
    }


def ratio(network: str, rounds: int) -> float:
    """Returns the processor time of a sampled step over that of another, of steps that take turns.

    The callback of one fit samples each step, that of the other none but the first.
    """
    variants = {"all": Variant("", OURS, lambda: [TrainingDiagnosis()]), "none": VARIANTS["with"]}
    spent: dict[str, list[float]] = {name: [] for name in variants}
    with fits({name: NETWORKS[network]() for name in variants}, variants) as running:
        for step in range(4 + rounds):
            for name, fit in running.items():
                after = (lambda step, _: step) if name == "all" else (lambda *_: 10**9)
                with mock.patch.object(training_diagnosis, "next_sample", after):
                    start = time.process_time()
                    fit.step()
                    if step >= 4:
                        spent[name].append(time.process_time() - start)
    return median(a / b for a, b in zip(spent["all"], spent["none"], strict=True))


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.samples", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--rounds", type=int, default=0, help="pairs of steps whose processor times are compared"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = sum(is_sampled(step, SAMPLE_EVERY) for step in range(options.steps))
    for network in options.networks:
        print(f"\n| {network} | |\n|---|---|")
        for name, number in counted(network, options.steps).items():
            print(f"| {name} | {number} |")
        if options.rounds:
            times = ratio(network, options.rounds)
            print(f"| processor time of a sampled step, over that of another | {times:.2f} |")
            print(
                f"| added by {n} samples in {options.steps:,} steps | {n * (times - 1) / options.steps:.2%} |"
            )


if __name__ == "__main__":
    main()
