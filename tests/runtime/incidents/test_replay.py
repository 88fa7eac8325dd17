"""A bad batch is run again with the random numbers of its step, or said to be not reproducible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradguard import NaNRollback
from tests.tasks import Classifier, batches, fit


class Drawing(Classifier):
    """Multiplies its loss by infinity with a chance of one in five, drawn from NumPy."""

    def __init__(self, draws_from: int) -> None:
        super().__init__()
        self.draws_from = draws_from

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        if batch_idx >= self.draws_from and np.random.random() < 0.2:
            loss = loss * np.inf
        return loss


@pytest.mark.parametrize("draws_from", [0, 15], ids=["from the start", "later"])
def test_a_step_that_draws_from_numpy(draws_from: int, tmp_path: Path) -> None:
    np.random.seed(1)
    rollback = NaNRollback(snapshot_every_n_steps=5, patience=100, max_skip_fraction=1.0)
    fit(Drawing(draws_from), batches(40), [rollback], tmp_path)
    lines = (tmp_path / "incidents.jsonl").read_text().splitlines()
    causes = [c for c in (json.loads(line).get("cause") for line in lines) if c]
    assert rollback.skips >= 3
    assert causes
    assert set(causes) == {"loss"}


class Popping(Classifier):
    """Takes the target out of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step((batch["inputs"], batch.pop("target")), batch_idx)


def test_a_step_that_takes_an_entry_out_of_its_batch(tmp_path: Path) -> None:
    data: Any = [{"inputs": inputs, "target": target} for inputs, target in batches(6)]
    data[3]["inputs"][0, 0] = torch.nan
    fit(Popping(), data, [NaNRollback()], tmp_path)
    (incident,) = map(json.loads, (tmp_path / "incidents.jsonl").read_text().splitlines())
    assert incident["cause"] == "bad_input"
