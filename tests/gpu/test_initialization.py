"""The check's extra pass on a GPU changes no weight, buffer or random number."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_gradguard import InitializationCheck
from lightning_gradguard.core.snapshots import rng_state
from tests.gpu.tasks import Network, everything, fit_there
from tests.tasks import batches, same


class Deep(Network):
    """Too deep for its initialization, so that there is something to report and to repair."""

    def __init__(self) -> None:
        super().__init__("adamw fused")
        layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())]
        self.net = nn.Sequential(
            nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), *layers, nn.Linear(64, 4)
        )


class AtTheFirstStep(pl.Callback):
    """Comes after the check, which acts on the first batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            state = rng_state()
            self.random: list[Tensor] = [state["torch"], *state["cuda"]]
            self.buffers = [buffer.clone() for buffer in module.buffers()]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("on_failure", ["warn", "repair"])
def test_the_check_leaves_nothing_behind(on_failure: Any, precision: Any) -> None:
    torch.manual_seed(0)
    module = Deep()
    torch.manual_seed(0)
    expected = Deep()
    check, looks = InitializationCheck(on_failure), [AtTheFirstStep(), AtTheFirstStep()]
    trainer = fit_there(module, batches(10), [check, looks[0]], precision=precision)
    bare = fit_there(expected, batches(10), [looks[1]], precision=precision)
    assert "gradient_gain" in {finding.criterion for finding in check.findings} or on_failure == "repair"
    assert looks[0].random
    assert same(looks[0].random, looks[1].random)
    assert same(looks[0].buffers, looks[1].buffers)
    assert same(everything(trainer), everything(bare)) == (on_failure == "warn")
    assert all(bool(tensor.isfinite().all()) for tensor in everything(trainer))
