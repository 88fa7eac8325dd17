"""Averages of weights exclude lost batches, at any position in the list of callbacks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor

from lightning_gradguard import NaNRollback
from tests.tasks import (
    NOT_A_NUMBER,
    Batch,
    Classifier,
    batches,
    exponential_averages,
    fit,
    insert,
    optimizer_state,
    poisoned,
    same,
    weights,
)

WEIGHT_AVERAGING = pytest.mark.lightning("2.6", "before it, there is no WeightAveraging")
CHECKS = pytest.mark.parametrize("check", ["exact", "deferred"])
ORDERS = pytest.mark.parametrize("guard_first", [True, False])


def ordered(average: pl.Callback, rollback: NaNRollback, guard_first: bool) -> list[pl.Callback]:
    return [rollback, average] if guard_first else [average, rollback]


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=2)


@CHECKS
@ORDERS
@pytest.mark.parametrize("norm", [False, True])
def test_stochastic_weight_averaging_beside_a_nan_batch(check: Any, guard_first: bool, norm: bool) -> None:
    """With batch normalization there is one more pass, which makes no step and must stay finite."""
    clean = batches(8)
    bad = insert(clean, 8, NOT_A_NUMBER) if check == "deferred" else insert(clean, 3, NOT_A_NUMBER)
    found = []
    for data in (clean, bad):
        module, rollback = Classifier("sgd", norm=norm), NaNRollback(check=check, max_dossiers=0)
        trainer = fit(module, data, ordered(swa(), rollback, guard_first), max_epochs=4)
        assert all(bool(t.isfinite().all()) for t in (*weights(module), *optimizer_state(trainer)))
        # at the end of the additional pass Lightning makes a step with gradients that were left from before
        # it, if there are any: so that, where the last batch was lost, only the statistics can be compared
        steps_again = norm and check == "deferred"
        everything = [*weights(module), *optimizer_state(trainer)]
        found.append([b.clone() for b in module.buffers()] if steps_again else everything)
    assert rollback.skips == 4 + norm
    assert rollback.rollbacks == 0
    assert same(*found)


@CHECKS
@ORDERS
def test_a_healthy_stochastic_average_is_that_of_a_bare_run(check: Any, guard_first: bool) -> None:
    bare, module = Classifier(norm=True), Classifier(norm=True)
    fit(bare, batches(8), [swa()], max_epochs=4)
    fit(module, batches(8), ordered(swa(), NaNRollback(check=check), guard_first), max_epochs=4)
    assert same(weights(bare), weights(module))


@ORDERS
def test_rollback_across_epochs_restores_a_stochastic_average(guard_first: bool) -> None:
    """Three NaN batches right after an epoch's average was taken: it is restored, with its count."""
    average = swa()
    bad_batches = [8 * 2 + i for i in range(3)]

    class Bad(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            if self.current_epoch * 8 + batch_idx in bad_batches:
                batch = (batch[0] * math.nan, batch[1])
            return super().training_step(batch, batch_idx)

    module, rollback = Bad(), NaNRollback(snapshot_every_n_steps=1000, max_dossiers=0)
    fit(module, batches(8), ordered(average, rollback, guard_first), max_epochs=4)
    assert rollback.rollbacks == 1
    assert average.n_averaged is not None
    # averaged at the start of epochs 1, 2 and 3; the first two were undone
    assert average.n_averaged.item() == 1
    assert all(bool(t.isfinite().all()) for t in weights(module))


@CHECKS
@ORDERS
@WEIGHT_AVERAGING
def test_average_of_the_user_is_unaffected(check: Any, guard_first: bool) -> None:
    class EverySecond(pl.callbacks.WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None or epoch_idx is not None

    clean, found = batches(12), []
    extra = [NOT_A_NUMBER] if check == "exact" else [NOT_A_NUMBER, clean[0]]
    for data in (clean, insert(clean, 5, *extra)):
        average, rollback = EverySecond(), NaNRollback(check=check, max_dossiers=0)
        fit(Classifier(norm=True), data, ordered(average, rollback, guard_first))
        assert average._average_model is not None
        found.append(weights(average._average_model))
    assert rollback.skips == 1
    assert same(*found)


@CHECKS
@ORDERS
@WEIGHT_AVERAGING
@pytest.mark.parametrize("at", [0, 1, 11, 12])
def test_an_exponential_average_beside_a_nan_batch(check: Any, guard_first: bool, at: int) -> None:
    clean, found = batches(12), []
    needs_another = check == "deferred" and at < 12
    extra = [NOT_A_NUMBER, clean[0]] if needs_another else [NOT_A_NUMBER]
    for data in (clean, insert(clean, at, *extra)):
        average, rollback = (
            pl.callbacks.EMAWeightAveraging(decay=0.9),
            NaNRollback(check=check, max_dossiers=0),
        )
        fit(Classifier("adam", norm=True), data, ordered(average, rollback, guard_first))
        assert average._average_model is not None
        assert "should_update" not in vars(average)  # as it was
        found.append(weights(average._average_model))
    assert rollback.skips == 1
    assert same(*found)


class MyEMA(pl.Callback):
    """An average that is not one of Lightning's."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        now = [p.detach().clone() for p in module.parameters()]
        pairs = zip(self.average or now, now, strict=True)
        self.average = [0.9 * old + 0.1 * new for old, new in pairs]


@CHECKS
@ORDERS
def test_unknown_average_is_warned_of_where_it_sees_bad_weights(
    capsys: pytest.CaptureFixture[str], check: Any, guard_first: bool
) -> None:
    callbacks = ordered(MyEMA(), NaNRollback(check=check), guard_first)
    fit(Classifier(), batches(2), callbacks, enable_progress_bar=True)
    printed = capsys.readouterr()
    text = printed.out + printed.err
    is_fine = guard_first and check == "exact"
    assert text.count("MyEMA seems to average weights in a way that NaNRollback cannot undo") == 1 - is_fine
    assert ("use check='exact' and put NaNRollback before it" in text) == (check == "deferred")


def test_known_averages_and_other_callbacks_are_not_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class EMAReader(pl.Callback):
        """Averages nothing at batches."""

    class Timer(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            """Not an average."""

    callbacks = [*exponential_averages(), EMAReader(), Timer(), NaNRollback()]
    fit(Classifier(), batches(2), callbacks, enable_progress_bar=True)
    fit(Classifier(), batches(2), [swa(), NaNRollback()], max_epochs=2, enable_progress_bar=True)
    printed = capsys.readouterr()
    assert "seems to average" not in printed.out + printed.err


def test_unknown_average_after_the_guard_never_sees_nonfinite_weights() -> None:
    average, rollback = MyEMA(), NaNRollback(snapshot_every_n_steps=5)

    class Overshoots(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                with torch.no_grad():
                    module.net[0].weight.fill_(math.nan)

    fit(Classifier(norm=True), poisoned(batches(30), nan=[5, 9, 29]), [rollback, average])
    assert rollback.skips == 3
    assert all(bool(t.isfinite().all()) for t in average.average)


def test_pass_that_only_updates_statistics_reports_lost_batches(tmp_path: Path) -> None:
    data = insert(batches(6), 2, NOT_A_NUMBER)
    fit(Classifier(norm=True), data, [swa(), NaNRollback()], tmp_path, max_epochs=3)
    lines = (tmp_path / "incidents.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["nonfinite_loss"] * 3 + ["nonfinite_buffers"]
    lost = [json.loads(line) for line in (tmp_path / "lost_batches.rank0.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["batch_idx"]) for r in lost] == [(0, 2), (1, 2), (2, 2), (3, 2)]
