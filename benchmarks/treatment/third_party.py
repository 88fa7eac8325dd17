"""AUTOTRAINER's archive, as far as it can be rebuilt, as cases of the treatment benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.evidence.programs import Program
from benchmarks.third_party import at51
from benchmarks.treatment.casebook import Case

#: Healthy networks of the archive that stand for those that fail, by data set.
_TWINS = {"Circle": "Circle simplednn", "Blob": "Blob simplednn_blob"}


def cases() -> Iterator[Case]:
    """Yields the failing networks, each with a healthy one on the same data."""
    archive = {case.name: case for case in at51.cases()}
    for name, one in archive.items():
        if one.kinds:
            case = _case(one)
            case.twin = _case(archive[_TWINS[name.partition(" ")[0]]])
            yield case


def _case(one: Any) -> Case:
    made: dict[int, Program] = {}

    def make() -> pl.LightningModule:
        program = one.make(torch.initial_seed() % 1000)
        made[id(program.module)] = program
        module: pl.LightningModule = program.module
        return module

    batches = one.make(0).batches
    return Case(
        f"at51: {one.name}, {one.title}",
        make,
        lambda: _Batches(batches),
        {"max_steps": len(batches)},
        lambda module: made[id(module)].score(),
    )


class _Batches(pl.LightningDataModule):
    """Batches of training, of which some are held out by the treatment itself."""

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)
