"""Half precision: overflows are the scaler's, NaN is ours, and norms are those that float64 gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    NaNRollback,
    default_callbacks,
)
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback
from tests.gpu.tasks import OPTIMIZERS, Network, everything, finite, fit_there
from tests.tasks import NOT_A_NUMBER, Batch, batches, insert, same

MIXED: dict[str, Any] = {"precision": "16-mixed"}


def scale_of(trainer: pl.Trainer) -> float:
    return float(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]


class Loud(Network):
    """Its loss is so large that float16 cannot hold the gradients at the scale that a scaler starts with."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return 1024 * loss

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if "sgd" in self.optimizer:
            optimizer.param_groups[0]["lr"] /= 1024
        return optimizer


# no momentum in fused SGD: where its first step overflows, torch continues from uninitialized memory
@pytest.mark.parametrize("optimizer", ["sgd", "plain sgd fused", "adam", "adamw fused"])
def test_an_overflow_is_left_to_the_scaler(optimizer: str) -> None:
    rollback = NaNRollback()
    trainer = fit_there(Loud(optimizer), batches(30), [rollback], **MIXED)
    bare = fit_there(Loud(optimizer), batches(30), **MIXED)
    assert rollback.amp_overflows >= 3
    assert (rollback.skips, rollback.rollbacks) == (0, 0)
    assert scale_of(trainer) == scale_of(bare) == 65536 / 2**rollback.amp_overflows
    assert same(everything(trainer), everything(bare))
    assert finite(trainer)


@pytest.mark.parametrize("check", ["exact", "deferred"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd fused", "adam", "adamw fused"])
def test_a_nan_batch_under_the_scaler_leaves_no_trace(optimizer: str, check: Any) -> None:
    clean, rollback = batches(20), NaNRollback(check=check)
    trainer = fit_there(Network(optimizer), insert(clean, 9, NOT_A_NUMBER), [rollback], **MIXED)
    twin = fit_there(Network(optimizer), clean, **MIXED)
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert scale_of(trainer) == scale_of(twin)
    assert same(everything(trainer), everything(twin))
    assert finite(trainer)


@pytest.mark.parametrize("optimizer", ["sgd fused", "adamw fused"])
def test_gradients_that_still_carry_the_scale_are_clipped(optimizer: str) -> None:
    """Lightning's own `gradient_clip_val` does not support these."""
    norms: list[float] = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            def look(*_: Any) -> None:
                gradients = [p.grad.double() for p in pl_module.parameters()]
                norms.append(float(nn.utils.get_total_norm(gradients)) / scale_of(trainer))

            trainer.optimizers[0].register_step_pre_hook(look)

    clipping = AdaptiveGradientClipping(GlobalNormClipping(0.1))
    fit_there(Network(optimizer), batches(20), [clipping, Spy()], **MIXED)
    assert len(norms) == 20
    assert max(norm for norm in norms if math.isfinite(norm)) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("bf16-mixed", "adamw fused"),
        ("bf16-mixed", "adam"),
        ("bf16-true", "adamw fused"),
        # squares of gradients underflow in float16, and Adam would divide by zero
        ("16-true", "sgd"),
        ("16-true", "sgd fused"),
    ],
)
def test_a_nan_batch_is_skipped_in_any_precision(precision: Any, optimizer: str) -> None:
    clean, rollback = batches(20), NaNRollback()
    suite = default_callbacks(nan_rollback=rollback)
    data = insert(clean, 9, NOT_A_NUMBER)
    trainer = fit_there(Network(optimizer), data, suite, precision=precision)
    twin = fit_there(Network(optimizer), clean, default_callbacks(), precision=precision)
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(everything(trainer), everything(twin))
    assert finite(trainer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nonfinite_weights_are_rolled_back(precision: Any, value: float) -> None:
    """Minus infinity makes a dead unit, which no loss or gradient indicates."""

    class Flips(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                module.net[0].bias.data[0] = value

    rollback = NaNRollback(snapshot_every_n_steps=10)
    network = Network("sgd", norm=False)
    trainer = fit_there(network, batches(60), [Flips(), rollback], precision=precision)
    assert rollback.rollbacks == 1
    assert finite(trainer)


class Wide(Network):
    """With a gradient of four million elements, where float32 sums lose precision."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer, norm=False)
        self.net = nn.Sequential(
            nn.Linear(20, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 4)
        )


class Norms(StepCallback):
    """Compares the measurement of a step with that of the same gradients in float64 on the CPU."""

    norm_types = (1.0, 2.0, 3.0, math.inf)

    def __init__(self, is_scaled: bool) -> None:
        super().__init__()
        self.is_scaled = is_scaled
        self.compared = 0

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        scale = scale_of(trainer) if self.is_scaled else 1.0
        gradients = [gradient.cpu().double() / scale for gradient in step.gradients.tensors]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return
        self.compared += 1
        expected = {p: torch.stack([g.flatten().norm(p) for g in gradients]) for p in self.norm_types}
        for p, norms in step.tensor_norms.items():
            torch.testing.assert_close(norms.cpu(), expected[p], rtol=1e-5, atol=0)
        torch.testing.assert_close(step.gradients.total_norm.cpu(), expected[2.0].norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd fused"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_norms_are_those_of_float64(precision: Any, optimizer: str) -> None:
    norms = Norms(is_scaled=precision == "16-mixed" and "fused" in optimizer)
    fit_there(Wide(optimizer), batches(4), [norms], precision=precision)
    assert norms.compared >= 2
