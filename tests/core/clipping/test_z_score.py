"""Z-score clipping reproduces its reference values, and its history stays finite."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest

from lightning_gradguard import ZScoreClipping
from tests.core.clipping.steps import applied, gradients_of


def test_norms_and_history_equal_reference_values() -> None:
    policy = ZScoreClipping(max_norm=None)
    norms = applied(policy, [0.8, 1.2] * 12 + [0.8, 1, 10, 1, 1.5])
    assert norms[-4:] == pytest.approx([1.0, 1.01911950, 1.0, 1.44308031], rel=1e-6)
    assert policy.state_dict()["mean"].item() == pytest.approx(1.0067498108323134, rel=1e-6)
    assert policy.state_dict()["variance"].item() == pytest.approx(0.041088776804108315, rel=1e-5)


def test_warmup_is_not_inflated_by_a_spike() -> None:
    policy = ZScoreClipping(max_norm=None)
    assert applied(policy, [0.8, 1.2] * 10 + [1000] + [0.8, 1.2] * 2)[20] == pytest.approx(1.0, rel=1e-5)
    assert applied(policy, [50.0])[0] < 2


def test_constant_warmup_does_not_lock_the_threshold() -> None:
    policy = ZScoreClipping(max_norm=None)
    assert applied(policy, [1.0] * 25 + [1.2])[-1] == pytest.approx(1.2)


def test_nonfinite_norms_do_not_disable_clipping() -> None:
    with_nan = ZScoreClipping(max_norm=None)
    without = ZScoreClipping(max_norm=None)
    norms = [0.8, 1.2] * 20 + [10.0]
    applied(with_nan, [math.nan, math.inf])  # they leave two places of the warm-up empty
    assert applied(with_nan, norms)[-1] == pytest.approx(applied(without, norms)[-1], rel=1e-3)
    applied(with_nan, [math.nan, math.inf])
    state = copy.deepcopy(with_nan.state_dict())
    applied(with_nan, [math.nan, math.inf])
    assert str(with_nan.state_dict()) == str(state)


def test_warmup_without_a_finite_norm_is_survived() -> None:
    policy = ZScoreClipping(max_norm=None, warmup_steps=2)
    norms = applied(policy, [math.nan, math.inf, *([0.8, 1.2] * 50), 10.0])
    assert norms[2] == pytest.approx(0.8)
    assert norms[-3:-1] == pytest.approx([0.8, 1.2])
    assert norms[-1] < 2


@pytest.mark.parametrize("on_host", [False, True])
def test_nonfinite_norms_never_enter_the_mean(on_host: bool) -> None:
    policy = ZScoreClipping(max_norm=None, warmup_steps=2)
    for norm in [math.inf] * 3 + [1.0] * 30:
        gradients = gradients_of([norm])
        known = gradients.total_norm.item() if on_host else None
        policy.coefficients(dataclasses.replace(gradients, known_norm=known))
        policy.commit()
    assert applied(policy, [1000.0])[0] < 10
    assert math.isfinite(float(policy.state_dict()["variance"]))


def test_empty_history_is_loaded() -> None:
    policy = ZScoreClipping()
    policy.load_state_dict({})
    assert applied(policy, [0.5]) == pytest.approx([0.5])


def test_host_and_device_may_alternate() -> None:
    mixed, plain = (ZScoreClipping(max_norm=None, warmup_steps=5) for _ in range(2))
    for i, norm in enumerate([0.8, 1.2] * 20 + [10.0]):
        gradients = gradients_of([norm])
        known = dataclasses.replace(gradients, known_norm=gradients.total_norm.item())
        found = mixed.coefficients(known if i % 3 else gradients)
        assert float(found) == pytest.approx(float(plain.coefficients(gradients)), rel=1e-12)
        mixed.commit()
        plain.commit()
