"""Counts what `TrainingDiagnosis` adds to a run: steps that it samples, operations, hooks off these steps.

`python -m benchmarks.cost.samples` trains a small GPT for 1,000 steps with the callback and without, which
take turns, and prints the table of docs/diagnosis.md. All sampled steps are counted, and every tenth of the
others. Operations do not depend on the machine; `--timed` adds the ratio of processor times of the same pair,
in a run of its own without the counting.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.casebook.parts import Gpt, characters, spell
from benchmarks.cost.interleaved import fits
from benchmarks.cost.meter import Meter
from benchmarks.cost.peers import OURS, Variant
from lightning_gradguard import TrainingDiagnosis
from lightning_gradguard.runtime.sampled_step import is_sampled

#: Of the steps that are not sampled, every how many-th one is counted.
EVERY = 10
VARIANTS = {
    "without": Variant("", "Lightning"),
    "with": Variant("names symptoms", OURS, lambda: [TrainingDiagnosis()]),
}


class Language(pl.LightningModule):
    """A character model that counts the hooks on its modules in each training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.batch, self.hooks = Gpt(2), characters(1)[0], 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss."""
        self.hooks = sum(map(n_hooks, self.modules())) + ("training_step" in vars(self))
        return spell(self.net, batch)

    def configure_optimizers(self) -> Any:
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def n_hooks(module: nn.Module) -> int:
    """Returns the number of hooks on the calls of a module."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


def counted(steps: int) -> dict[str, int | str]:
    """Returns what the callback adds over a number of steps."""
    modules = {name: Language() for name in VARIANTS}
    plain: list[int] = []
    added: dict[bool, list[int]] = {True: [], False: []}
    hooks = 0
    with fits(modules, VARIANTS) as running:
        for step in range(steps):
            sampled = is_sampled(step, 100)
            counts = {}
            for name, fit in running.items():
                if sampled or step % EVERY == 3:
                    with Meter() as meter:
                        fit.step()
                    counts[name] = meter.ops
                else:
                    fit.step()
            if counts:
                plain.append(counts["without"])
                added[sampled].append(counts["with"] - counts["without"])
            hooks += 0 if sampled else modules["with"].hooks
    n = len(added[True])
    total = sum(added[True]) + (steps - n) * mean(added[False])
    return {
        "sampled steps": n,
        "operations of a step without it": round(mean(plain)),
        "added to a sampled step": round(mean(added[True])),
        "added to another step": round(mean(added[False])),
        "added to the run, of its operations": f"{total / steps / mean(plain):.1%}",
        "hooks on other steps": hooks,
    }


def ratio(steps: int) -> float:
    """Returns the processor time with the callback over that without, of steps that take turns."""
    spent = dict.fromkeys(VARIANTS, 0.0)
    with fits({name: Language() for name in VARIANTS}, VARIANTS) as running:
        for _ in range(steps):
            for name, fit in running.items():
                start = time.process_time()
                fit.step()
                spent[name] += time.process_time() - start
    return spent["with"] / spent["without"]


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.samples", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--timed", action="store_true", help="add the ratio of processor times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| over {options.steps:,} steps | |\n|---|---|")
    for name, number in counted(options.steps).items():
        print(f"| {name} | {number} |")
    if options.timed:
        print(f"| processor time, with over without | {ratio(options.steps):.3f} |")


if __name__ == "__main__":
    main()
