"""Counts false alarms: incidents of healthy runs with noisy data and a warm-up of the learning rate.

Five models, four seeds each, 2,000 steps, all six callbacks; about ten minutes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.faults.runs import quietly
from benchmarks.faults.tasks import CLASSES, MODELS, OPTIMIZERS, SIZE, Batch, batches
from benchmarks.quiet_trainer import QUIET
from benchmarks.records import read_records
from lightning_gradguard import NaNRollback, default_callbacks

STEPS = 2000
WARM_UP = 100


def noisy(seed: int) -> list[Batch]:
    """One label of ten is wrong, and the inputs' noise has heavy tails."""
    data = batches(STEPS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tails = torch.distributions.StudentT(3.0)
    torch.manual_seed(seed)
    for batch in data:
        wrong = torch.rand(SIZE, generator=generator) < 0.1
        others = torch.randint(CLASSES, (SIZE,), generator=generator)
        batch["y"] = torch.where(wrong, others, batch["y"])
        batch["x"] = batch["x"] + 0.5 * tails.sample((SIZE, 20))
    return data


class WarmUp(pl.Callback):
    """Warms up learning rates, also under manual optimization."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, (batch_idx + 1) / WARM_UP)


def run(case: tuple[str, int, str]) -> dict[str, int]:
    """Trains once; returns how often each kind of incident was published."""
    model, seed, optimizer = case
    module = MODELS[model](optimizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            default_root_dir=folder,
            **QUIET,
            callbacks=[WarmUp(), *default_callbacks(nan_rollback=NaNRollback(incident_dir=folder))],
        )
        trainer.fit(module, DataLoader(noisy(seed), batch_size=None))  # type: ignore[arg-type]
        return Counter(r["kind"] for r in read_records(Path(folder) / "incidents.jsonl"))


def _run(case: tuple[str, int, str]) -> tuple[tuple[str, int, str], dict[str, int]]:
    return case, quietly(run, case)


def main(processes: int = 2) -> list[tuple[tuple[str, int, str], dict[str, int]]]:
    """Returns model, seed and optimizer of each run, and its incidents."""
    numbered = enumerate(itertools.product(MODELS, range(4)))
    cases = [(model, seed, list(OPTIMIZERS)[n % len(OPTIMIZERS)]) for n, (model, seed) in numbered]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_run, cases, chunksize=1)
