"""A `training_step(self, dataloader_iter)` takes its batches itself: the suite takes none of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard import Incident, InitializationCheck, NaNRollback, default_callbacks
from tests.tasks import Classifier, batches, fit, poisoned, same, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
]


class Iterating(Classifier):
    """Takes `n` batches a step, and trains on the last of them."""

    def __init__(self, n: int = 1) -> None:
        super().__init__()
        self.n = n
        self.taken = 0
        self.incidents: list[Incident] = []

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor | None:  # type: ignore[override]
        for _ in range(self.n):
            (inputs, target), *_ = next(dataloader_iter)
            self.taken += 1
        loss = nn.functional.cross_entropy(self.net(inputs), target)
        self.log("loss", loss, batch_size=len(inputs))
        return loss

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        self.incidents.append(incident)


@pytest.mark.parametrize("n", [1, 2])
def test_no_batch_is_lost(n: int) -> None:
    """Each batch is trained on, and the weights are those without the suite."""
    bare, module = Iterating(n), Iterating(n)
    bare_trainer = fit(bare, batches(10))
    check = InitializationCheck()
    trainer = fit(
        module, batches(10), default_callbacks(adaptive_gradient_clipping=None, initialization_check=check)
    )
    assert module.taken == bare.taken == 10
    assert trainer.global_step == bare_trainer.global_step
    assert check.problem is None
    assert same(weights(module), weights(bare))


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_a_bad_batch_is_skipped_and_not_run_again(check: Any) -> None:
    module = Iterating()
    rollback = NaNRollback(check=check)
    fit(module, poisoned(batches(12), nan=[5]), [rollback])
    assert module.taken == 12
    assert rollback.skips == 1
    (incident,) = module.incidents
    assert (incident.kind, incident.step, incident.batch_idx) == ("nonfinite_loss", 5, 5)
    assert "not run again: training_step takes it from the iterator" in incident.detail
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_weights_and_first_gradients_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    module, check = Iterating(), InitializationCheck()
    torch.nn.init.constant_(module.net[4].weight, math.nan)  # type: ignore[arg-type]
    fit(module, batches(3), [check], enable_progress_bar=True)
    assert "training_step(dataloader_iter) takes its batches itself" in capsys.readouterr().out
    assert check.findings
