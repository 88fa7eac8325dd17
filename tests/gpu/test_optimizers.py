"""Optimizers with state on the device: a skip leaves it bit for bit, and rates and clipping act."""

from __future__ import annotations

import pytest
import torch

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    LearningRateBackoff,
    NaNRollback,
    default_callbacks,
)
from tests.gpu.tasks import OPTIMIZERS, Network, everything, finite, fit_there
from tests.tasks import NOT_A_NUMBER, RateSpy, batches, insert, same

RATES_ON_THE_DEVICE = [name for name in OPTIMIZERS if "rate" in name]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(optimizer: str) -> None:
    clean, rollback = batches(20), NaNRollback()
    trainer = fit_there(Network(optimizer), insert(clean, 9, NOT_A_NUMBER), [rollback])
    twin = fit_there(Network(optimizer), clean)
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(everything(trainer), everything(twin))
    assert finite(trainer)
    states = [state for o in trainer.optimizers for state in o.state.values()]
    assert {int(state["step"]) for state in states if "step" in state} <= {20}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_suite_leaves_a_healthy_run_as_it_is(optimizer: str) -> None:
    suite = default_callbacks(adaptive_gradient_clipping=None)
    trainer = fit_there(Network(optimizer, dropout=0.3), batches(20), suite)
    bare = fit_there(Network(optimizer, dropout=0.3), batches(20))
    assert same(everything(trainer), everything(bare))


@pytest.mark.parametrize("optimizer", RATES_ON_THE_DEVICE)
def test_rate_on_the_device_is_scaled_and_restored_bit_for_bit(optimizer: str) -> None:
    backoff = LearningRateBackoff(factor=0.3, rewarm_steps=5)
    spy = RateSpy(backoff)
    suite = [NaNRollback(patience=1, max_dossiers=0), backoff, spy]
    fit_there(Network(optimizer), insert(batches(30), 15, NOT_A_NUMBER), suite)
    assert len(spy.used) == len(spy.scheduled) == 31
    assert spy.scales[:16] == [1.0] * 16
    assert spy.scales[-1] == 0.3
    assert all(torch.equal(rate, spy.scheduled[0]) for rate in spy.scheduled)
    for rate, scale in zip(spy.used, spy.scales, strict=True):
        assert torch.equal(rate, spy.scheduled[0] * scale)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_is_that_of_the_trainer(optimizer: str) -> None:
    # ahead of normalization, a bias has a gradient of rounding errors, from which Adam makes full steps
    clipping = AdaptiveGradientClipping(GlobalNormClipping(0.1))
    ours = fit_there(Network(optimizer, norm=False), batches(20), [clipping])
    theirs = fit_there(Network(optimizer, norm=False), batches(20), gradient_clip_val=0.1)
    free = fit_there(Network(optimizer, norm=False), batches(20))
    for one, two in zip(everything(ours), everything(theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert not same(everything(ours), everything(free))
