"""Divergence and collapse are detected among finite numbers, and never in healthy training."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.detectors import (
    DIVERGENCE_RATIO,
    EVIDENCE_STEPS,
    CollapseDetector,
    DivergenceDetector,
)

POSITIVE = st.floats(1e-6, 1e6)


def feed(detector: DivergenceDetector, loss: float, norm: float, steps: int = EVIDENCE_STEPS) -> float:
    return [detector.update(loss, norm) for _ in range(steps)][-1]


def test_exploding_tanh_network_without_nan_diverges() -> None:
    detector = DivergenceDetector()
    feed(detector, 4.55, 1.0)
    assert feed(detector, 9.08, 2e10) > DIVERGENCE_RATIO


def test_losses_of_a_narrow_range_around_zero_rise_by_the_size_of_the_first() -> None:
    detector = DivergenceDetector()
    assert feed(detector, -1.0, 1.0, steps=130) == 0.0
    assert feed(detector, 0.4, 1.0) == 0.0
    assert feed(detector, 1.0, 1.0) == pytest.approx(2.0 * 2.0)


def test_steps_after_a_rollback_fill_a_whole_window() -> None:
    detector = DivergenceDetector()
    feed(detector, 1.0, 1.0, steps=16)
    detector.forget()
    feed(detector, 1.0, 1.0, steps=4)
    assert detector.state_dict()["recent"] == [(1.0, 1.0)]
    feed(detector, 2.0, 1.0, steps=6)
    assert detector.state_dict()["recent"] == [(1.0, 1.0), (2.0, 1.0)]


def test_saturated_network_diverges_by_its_loss_alone() -> None:
    detector = DivergenceDetector()
    feed(detector, 1.4, 4.6)
    assert feed(detector, 30.0, 0.1) > DIVERGENCE_RATIO


def test_second_step_is_compared_with_the_first() -> None:
    detector = DivergenceDetector()
    detector.update(1.4, 1.0)
    assert feed(detector, 170.0, 20.0) > DIVERGENCE_RATIO


@pytest.mark.parametrize(("loss", "norm"), [(1.0, 1e12), (0.5, 1e12), (2.0, 100.0), (10.0, 10.0)])
def test_exploding_norms_alone_or_a_small_rise_of_the_loss_are_no_divergence(
    loss: float, norm: float
) -> None:
    detector = DivergenceDetector()
    feed(detector, 1.0, 1.0)
    assert feed(detector, loss, norm) <= DIVERGENCE_RATIO


def test_losses_below_zero_are_measured_by_the_range_that_was_seen() -> None:
    detector = DivergenceDetector()
    feed(detector, 4.0, 1.0)
    feed(detector, -6.0, 1.0)
    assert feed(detector, 24.0, 1.0) == pytest.approx(9)  # 30 above the lowest, three times the range of 10
    assert feed(detector, 14.0, 50.0) == pytest.approx(100)


def test_slow_growth_raises_what_it_is_compared_with() -> None:
    detector, ratio = DivergenceDetector(), 0.0
    for step in range(3000):
        ratio = max(ratio, detector.update(1e4 ** (step / 3000), 1.0))
    assert ratio < 10


def test_descent_with_heavy_tailed_noise_is_no_divergence() -> None:
    generator, detector = random.Random(0), DivergenceDetector()
    for step in range(5000):
        level = 0.05 + 2 * math.exp(-step / 500)
        noise = math.exp(0.5 * generator.gauss(0, 1) / max(generator.random(), 0.2))
        assert detector.update(level * noise, level * noise) < DIVERGENCE_RATIO


@given(st.lists(st.tuples(POSITIVE, POSITIVE), max_size=40), st.integers(0, 40))
def test_resumed_detector_gives_the_same_ratios(steps: list[tuple[float, float]], cut: int) -> None:
    whole, first, resumed = DivergenceDetector(), DivergenceDetector(), DivergenceDetector()
    expected = [whole.update(*step) for step in steps]
    for step in steps[:cut]:
        first.update(*step)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.update(*step) for step in steps[cut:]] == expected[cut:]


@given(st.floats(0.01, 100), st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=40))
def test_ratio_is_independent_of_the_unit_of_the_loss(unit: float, steps: list[tuple[float, float]]) -> None:
    one, other = DivergenceDetector(), DivergenceDetector()
    for loss, norm in steps:
        expected = one.update(loss, norm)
        assert other.update(unit * loss, unit * norm) == pytest.approx(expected, rel=1e-6)


def test_ten_steps_without_gradients_are_a_collapse() -> None:
    detector = CollapseDetector()
    assert not any(detector.update(False) for _ in range(20))
    assert [detector.update(True) for _ in range(EVIDENCE_STEPS)] == [False] * (EVIDENCE_STEPS - 1) + [True]


def test_intermittent_gradients_are_no_collapse() -> None:
    detector = CollapseDetector()
    assert not any(detector.update(is_collapsed) for _ in range(50) for is_collapsed in (False, True, True))


def test_network_that_never_had_gradients_does_not_collapse() -> None:
    detector = CollapseDetector()
    assert not any(detector.update(True) for _ in range(50))
