"""Programs of the casebook as cases of the treatment benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.casebook import programs
from lightning_gradguard.runtime.incidents.replay import loss_without_trace, without_logging

#: Steps of a run of the casebook, and batches on which its score is measured.
STEPS, HELD_OUT = programs.STEPS, 10


@dataclass
class Case:
    """A program, and how its score is measured.

    Args:
        name: Unique in the benchmark.
        make: Builds the module.
        data: Builds the data module.
        trainer: Arguments of the Trainer, `max_steps` among them.
        score: Returns the score of a trained module; higher is better.
    """

    name: str
    make: Callable[[], pl.LightningModule]
    data: Callable[[], Any]
    trainer: dict[str, Any]
    score: Callable[[pl.LightningModule], float]
    twin: Any = field(default=None)


class Batches(pl.LightningDataModule):
    """Batches of the casebook, those behind the first `STEPS` held out."""

    def __init__(self, one: programs.Case) -> None:
        super().__init__()
        self.batches = one.data(STEPS + HELD_OUT)

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches[:STEPS], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches[STEPS:], batch_size=None)  # type: ignore[arg-type]


def case_of(one: programs.Case, twin: programs.Case) -> Case:
    """Returns a failing program of the casebook, with its cured twin."""
    case = _plain(one)
    case.twin = _plain(twin)
    return case


def _plain(one: programs.Case) -> Case:
    trainer = {"max_steps": STEPS, **one.trainer}
    return Case(f"casebook: {one.name}", one.make, lambda: Batches(one), trainer, lambda m: _score(m, one))


def _score(module: pl.LightningModule, one: programs.Case) -> float:
    """Returns 1 over 1 plus the held-out loss: the casebook has classes, values and tokens."""
    batches = one.data(STEPS + HELD_OUT)[STEPS:]
    module.eval()
    with without_logging(module), torch.no_grad():
        losses = [float(loss_without_trace(module, batch, i)) for i, batch in enumerate(batches)]
    mean = sum(losses) / len(losses)
    return 1 / (1 + max(mean, 0.0)) if math.isfinite(mean) else 0.0
