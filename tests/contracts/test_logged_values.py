"""Logged values equal those of the optimizer, the gradients and the steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    GradientNormMonitor,
    LearningRateBackoff,
    NaNRollback,
)
from tests.tasks import Batch, Classifier, batches, fit, poisoned


class Memory(DummyLogger):
    """Keeps scalars: tag to step to value."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, dict[int, float]] = defaultdict(dict)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.scalars[tag][step or 0] = value


class TwoGroups(Classifier):
    """With a schedule for each step, and rates that may be tensors."""

    def __init__(self, tensors: bool) -> None:
        super().__init__()
        self.rates: list[Any] = [torch.tensor(0.1), torch.tensor(0.02)] if tensors else [0.1, 0.02]

    def configure_optimizers(self) -> Any:
        first, *others = self.net.parameters()
        groups = [{"params": [first], "lr": self.rates[0]}, {"params": others, "lr": self.rates[1]}]
        optimizer = torch.optim.SGD(groups)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Used(pl.Callback):
    """The rates that the optimizer steps with; comes after the callbacks that scale them."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        (optimizer,) = trainer.optimizers

        def spy(*_: Any) -> None:
            self.rates[trainer.global_step] = [float(group["lr"]) for group in optimizer.param_groups]

        optimizer.register_step_pre_hook(spy)


@pytest.mark.parametrize("tensors", [False, True])
def test_learning_rates_scheduled_and_used(tensors: bool) -> None:
    logger, used = Memory(), Used()
    data = poisoned(batches(40), nan=[20, 21, 22])
    rollback = NaNRollback(max_dossiers=0, snapshot_every_n_steps=5)
    callbacks = [rollback, LearningRateBackoff(rewarm_steps=5), used]
    fit(TwoGroups(tensors), data, callbacks, logger=logger, log_every_n_steps=1)
    assert len({*logger.scalars["lr_backoff/scale"].values()}) > 3, "lowered, and warmed up again"
    for group, first in enumerate((0.1, 0.02)):
        for step, rates in used.rates.items():
            assert logger.scalars[f"lr_backoff/lr/{group}"][step] == pytest.approx(rates[group], rel=1e-5)
            scheduled = logger.scalars[f"lr_backoff/scheduled_lr/{group}"][step]
            assert scheduled == pytest.approx(first * 0.9**step, rel=1e-5)


def test_the_share_of_steps_clipped_is_that_of_all_windows() -> None:
    every, seldom = Memory(), Memory()
    for logger, n in ((every, 1), (seldom, 7)):
        clipping = AdaptiveGradientClipping(GlobalNormClipping(0.9))
        fit(Classifier(), batches(40), [clipping], logger=logger, log_every_n_steps=n)
    share = np.mean(list(every.scalars["clip/fraction"].values()))
    assert 0 < share < 1
    for logger in (every, seldom):
        assert logger.scalars["summary/clipped_fraction"] == {39: pytest.approx(share)}


def test_the_band_is_the_middle_of_the_norms_before() -> None:
    logger = Memory()
    fit(Classifier(), batches(60), [GradientNormMonitor()], logger=logger, log_every_n_steps=1)
    totals = list(logger.scalars["grad_norm/total"].values())
    for step in (2, 30, 59):
        low, high = np.quantile(totals[:step], [0.05, 0.95])
        assert logger.scalars["grad_norm_band/low"][step] == pytest.approx(low)
        assert logger.scalars["grad_norm_band/high"][step] == pytest.approx(high)


def test_the_band_follows_a_level_that_has_changed_for_good() -> None:
    class Louder(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            return loss * (1e4 if batch_idx >= 30 else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    logger = Memory()
    fit(Louder(), batches(160), [GradientNormMonitor()], logger=logger, log_every_n_steps=1)
    assert logger.scalars["grad_norm_band/low"][159] > 100


def test_the_largest_norm_is_that_of_accepted_steps() -> None:
    guarded, watched = Memory(), Memory()
    data = poisoned(batches(40), nan=[20])
    fit(Classifier(), data, [NaNRollback()], logger=guarded, log_every_n_steps=50)
    fit(Classifier(), data[:20], [GradientNormMonitor(every_n_steps=1)], logger=watched)
    ((step, largest),) = guarded.scalars["summary/largest_norm"].items()
    assert (step, math.isfinite(largest)) == (39, True)
    assert watched.scalars["summary/largest_norm"][19] <= largest
    assert max(watched.scalars["grad_norm/total"].values()) == pytest.approx(
        watched.scalars["summary/largest_norm"][19]
    )


@pytest.mark.parametrize("guard", [[], [NaNRollback]])
def test_norms_whose_squares_no_float_holds(guard: list[type[pl.Callback]]) -> None:
    class Huge(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step((batch[0].double(), batch[1]), batch_idx)
            assert loss is not None
            return loss * (1e170 if batch_idx == 3 else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    logger = Memory()
    callbacks = [GradientNormMonitor(level="module"), *(kind() for kind in guard)]
    fit(Huge(), batches(6), callbacks, logger=logger, log_every_n_steps=1, precision="64-true")
    assert len(logger.scalars["grad_norm/net.0"]) == (5 if guard else 6)
    assert guard or logger.scalars["grad_norm/net.0"][3] > 1e160


def test_a_module_called_total_does_not_hide_the_total() -> None:
    class Totals(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.total = nn.Linear(4, 4)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return nn.functional.cross_entropy(self.total(self.net(batch[0])), batch[1])

    logger = Memory()
    fit(Totals(), batches(4), [GradientNormMonitor(level="module")], logger=logger, log_every_n_steps=1)
    assert logger.scalars["grad_norm/total"][3] == logger.scalars["grad_norm_band/total"][3]


def test_charts_stay_when_only_some_parameters_have_a_gradient() -> None:
    class Alternating(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(20, 4) for _ in range(40))

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            used = list(self.heads)[: 40 if batch_idx % 2 else 10]
            outputs = torch.stack([head(batch[0]) for head in used]).mean(0)
            return nn.functional.cross_entropy(outputs, batch[1])

    logger = Memory()
    fit(Alternating(), batches(8), [GradientNormMonitor()], logger=logger, log_every_n_steps=1)
    late = {tag for tag, points in logger.scalars.items() if tag.startswith("grad_norm/") and max(points) > 1}
    assert late == {f"grad_norm/heads.{i}-{i + 1}" for i in range(0, 40, 2)} | {
        "grad_norm/total",
        "grad_norm/nonfinite_fraction",
    }


def test_a_callback_that_is_used_again_draws_the_new_run_alone(tmp_path: Any) -> None:
    monitor = GradientNormMonitor()
    fit(Classifier(), batches(20), [monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert len(monitor._heat_map._history) == 0, "drawn when training ended, and cleared"
    fit(Classifier(), batches(15), [monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
