"""Trains small networks at rates 3 to 100 times too high, with the suite, with and without clipping.

`python -m benchmarks.rates` runs 108 cells for each guard, resumes where it was stopped, and prints the
table of docs/evidence_rates.md. A run is rescued if it ends within .05 of the score at the best rate. One
thread; about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.faults.runs import quietly
from benchmarks.quiet_trainer import QUIET
from benchmarks.rates.tasks import OPTIMIZERS, SIZE, STEPS, TASKS
from benchmarks.records import add_record, read_records
from lightning_gradguard import (
    AdaptiveGradientClipping,
    TrainingDivergedError,
    ZScoreClipping,
    default_callbacks,
)

MULTIPLES = (3, 10, 30, 100)
TOLERANCE = 0.05
Key = tuple[str, str, int, int, str]


class Module(pl.LightningModule):
    """A task at a rate."""

    def __init__(self, task: str, optimizer: str, rate: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.task, self.optimizer, self.rate = TASKS[task], optimizer, rate
        self.network = self.task.network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.task.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.rate)


def callbacks(guard: str) -> list[pl.Callback]:
    """The suite by defaults, with clipping of outliers alone, without clipping, or nothing."""
    if guard == "bare":
        return []
    if guard == "suite":
        return default_callbacks()
    clipping = AdaptiveGradientClipping(ZScoreClipping(max_norm=None)) if guard == "clipping" else None
    return default_callbacks(adaptive_gradient_clipping=clipping)


def train(key: Key) -> dict[str, Any]:
    """Trains once; returns the score and what the suite did."""
    task, optimizer, multiple, seed, guard = key
    module = Module(task, optimizer, TASKS[task].rates[optimizer] * multiple, seed)
    error = ""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=1, default_root_dir=folder, **QUIET, callbacks=callbacks(guard))
        data: Any = TASKS[task].data(STEPS, SIZE, seed)
        try:
            trainer.fit(module, DataLoader(data, batch_size=None))
        except TrainingDivergedError as stopped:
            error = str(stopped)
        incidents = read_records(Path(folder) / "incidents.jsonl") if guard != "bare" else []
    inputs, target = TASKS[task].data(1, 2000, 1000 + seed)[0]
    with torch.no_grad():
        score = TASKS[task].score(module.eval().network(inputs), target)
    cuts = [i["value"] for i in incidents if i["kind"] == "learning_rate_backoff"]
    found = [i["value"] for i in incidents if i["kind"] == "learning_rate_found"]
    rollbacks = [i["step"] for i in incidents if i["kind"] == "rollback"]
    return {"score": score, "cuts": cuts, "found": found, "rollbacks": rollbacks, "error": error}


def table(results: dict[Key, dict[str, Any]]) -> str:
    """Runs within the tolerance of the best rate, by network, optimizer and guard."""
    cells: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for (task, optimizer, multiple, seed, guard), result in results.items():
        best = results.get((task, optimizer, 1, seed, "bare"))
        if multiple > 1 and best is not None:
            good = result["score"] == result["score"] and result["score"] >= best["score"] - TOLERANCE
            for row in ((task, optimizer), ("all", f"x {multiple}"), ("all", "all")):
                cells[row + (guard,)].append(good)
    guards = sorted({key[2] for key in cells})
    lines = ["| network | optimizer | " + " | ".join(guards) + " |", "|---|---|" + "---|" * len(guards)]
    for row in dict.fromkeys(key[:2] for key in sorted(cells, key=lambda key: key[0] == "all")):
        found = [cells[row + (guard,)] for guard in guards]
        shares = [f"{sum(good)} of {len(good)}" for good in found]
        lines.append("| " + " | ".join([*row, *shares]) + " |")
    return "\n".join(lines)


def keys(seeds: Iterable[int], guards: Iterable[str]) -> list[Key]:
    seeds = list(seeds)
    best = itertools.product(TASKS, OPTIMIZERS, [1], seeds, ["bare"])
    return [*best, *itertools.product(TASKS, OPTIMIZERS, MULTIPLES, seeds, guards)]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guards", nargs="+", default=["bare", "suite", "none", "clipping"])
    parser.add_argument("--kept", type=Path, default=Path("runs/rates.jsonl"), help="file of the outcomes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[Key, dict[str, Any]] = {tuple(r.pop("key")): r for r in read_records(options.kept)}
    for key in keys(options.seeds, options.guards):
        if key not in results:
            results[key] = quietly(train, key)
            add_record(options.kept, {"key": key, **results[key]})
    print(table(results))


if __name__ == "__main__":
    main()
