"""Divergence and collapse are told where every number is finite, and healthy training is neither."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.detectors import STEPS, CollapseDetector, DivergenceDetector
from lightning_gradguard.core.recovery import FORGIVEN_AFTER, WORSE, RecoveryPolicy

POSITIVE = st.floats(1e-6, 1e6)


def feed(detector: DivergenceDetector, loss: float, norm: float, steps: int = STEPS) -> float:
    return [detector.update(loss, norm) for _ in range(steps)][-1]


def test_the_tanh_network_that_explodes_without_a_nan_diverges() -> None:
    detector = DivergenceDetector()
    feed(detector, 4.55, 1.0)
    assert feed(detector, 9.08, 2e10) > WORSE


def test_a_saturated_network_diverges_by_its_loss_alone() -> None:
    detector = DivergenceDetector()
    feed(detector, 1.4, 4.6)
    assert feed(detector, 30.0, 0.1) > WORSE


def test_what_goes_wrong_in_the_second_step_is_measured_by_the_first() -> None:
    detector = DivergenceDetector()
    detector.update(1.4, 1.0)
    assert feed(detector, 170.0, 20.0) > WORSE


@pytest.mark.parametrize(("loss", "norm"), [(1.0, 1e12), (0.5, 1e12), (2.0, 100.0), (10.0, 10.0)])
def test_exploding_norms_alone_or_a_loss_that_rises_a_little_are_none(loss: float, norm: float) -> None:
    detector = DivergenceDetector()
    feed(detector, 1.0, 1.0)
    assert feed(detector, loss, norm) <= WORSE


def test_losses_that_are_not_positive_are_no_measure() -> None:
    detector = DivergenceDetector()
    feed(detector, -1.0, 1.0)
    assert feed(detector, 1e9, 1e9) == 0


def test_a_descent_with_noise_of_heavy_tails_is_none() -> None:
    generator, detector = random.Random(0), DivergenceDetector()
    for step in range(5000):
        level = 0.05 + 2 * math.exp(-step / 500)
        noise = math.exp(0.5 * generator.gauss(0, 1) / max(generator.random(), 0.2))
        assert detector.update(level * noise, level * noise) < WORSE


@given(st.lists(st.tuples(POSITIVE, POSITIVE), max_size=40), st.integers(0, 40))
def test_a_resumed_detector_says_the_same(steps: list[tuple[float, float]], cut: int) -> None:
    whole, first, resumed = DivergenceDetector(), DivergenceDetector(), DivergenceDetector()
    expected = [whole.update(*step) for step in steps]
    for step in steps[:cut]:
        first.update(*step)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.update(*step) for step in steps[cut:]] == expected[cut:]


@given(st.floats(0.01, 100), st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=40))
def test_units_of_the_loss_do_not_matter(unit: float, steps: list[tuple[float, float]]) -> None:
    one, other = DivergenceDetector(), DivergenceDetector()
    for loss, norm in steps:
        said = one.update(loss, norm)
        assert other.update(unit * loss, unit * norm) == pytest.approx(said, rel=1e-6)


def test_a_network_that_has_died_collapses_after_ten_steps() -> None:
    detector = CollapseDetector()
    assert not any(detector.update(False) for _ in range(20))
    assert [detector.update(True) for _ in range(STEPS)] == [False] * (STEPS - 1) + [True]


def test_gradients_that_come_and_go_are_no_collapse() -> None:
    detector = CollapseDetector()
    assert not any(detector.update(is_collapsed) for _ in range(50) for is_collapsed in (False, True, True))


def test_what_was_never_alive_has_not_died() -> None:
    detector = CollapseDetector()
    assert not any(detector.update(True) for _ in range(50))


def test_recovery_goes_back_for_either_and_again_only_for_clearer_divergence() -> None:
    machine = RecoveryPolicy(3, 10, 0.5)
    steps = [machine.on_good_step(0, 1.0, 1.0) for _ in range(STEPS)]
    assert {decision for decision, _ in steps} == {"continue"}
    said = [machine.on_good_step(0, 20.0, 20.0) for _ in range(STEPS)]
    assert ("roll_back", "divergence") in said
    machine.on_rollback()
    again = {machine.on_good_step(0, 20.0, 20.0)[0] for _ in range(STEPS)}
    assert again == {"continue"}  # 400 times worse is no longer enough
    assert ("roll_back", "divergence") in [machine.on_good_step(0, 40.0, 40.0) for _ in range(STEPS)]
    machine.on_rollback()
    dead = [machine.on_good_step(0, 1.0, 1.0, is_collapsed=True) for _ in range(STEPS)]
    assert dead[-1] == ("roll_back", "gradient_collapse")


def test_among_rivals_a_loss_may_rise_and_fall() -> None:
    machine = RecoveryPolicy(3, 10, 0.5)
    machine.is_adversarial = True
    for loss, norm in [(0.7, 1.0), (5.0, 20.0), (0.3, 1.0), (12.0, 50.0)] * 5:
        for _ in range(STEPS):
            assert machine.on_good_step(0, loss, norm) == ("continue", "")
    assert any(machine.on_good_step(0, 1e5, 1e5)[0] == "roll_back" for _ in range(STEPS))


def test_budgets_are_renewed_for_whoever_resumes_a_run_that_was_stopped() -> None:
    machine = RecoveryPolicy(patience=1, max_rollbacks=1, max_skip_fraction=0.5)
    assert machine.on_skip(0) == "roll_back"
    machine.on_rollback()
    assert machine.on_skip(0) == "stop"
    machine.reset_budgets()
    assert machine.on_skip(0) == "roll_back"


def test_after_many_steps_a_rollback_no_longer_weighs_on_the_budget() -> None:
    machine = RecoveryPolicy(patience=1, max_rollbacks=1, max_skip_fraction=0.5)
    assert machine.on_skip(0) == "roll_back"
    machine.on_rollback()
    for _ in range(FORGIVEN_AFTER):
        machine.on_good_step(0, 1.0, 1.0)
    assert machine.on_skip(0) == "roll_back"
    assert machine.rollbacks == 1


def test_levels_that_change_for_good_again_and_again_do_not_use_the_budget_up() -> None:
    """A curriculum: each stage is harder than the one before, and is learnt before the next."""
    generator, machine = random.Random(0), RecoveryPolicy(patience=3, max_rollbacks=10, max_skip_fraction=0.5)
    for stage in range(15):
        for step in range(300):
            level = 2.0**stage * max(math.exp(-step / 40), 1e-3) * generator.lognormvariate(0, 0.1)
            decision, _ = machine.on_good_step(0, level, level)
            assert decision != "stop", stage
            if decision == "roll_back":
                machine.on_rollback()
    assert machine.rollbacks > 10
