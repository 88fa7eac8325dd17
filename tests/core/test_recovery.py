"""The same outcomes lead to the same decision, and every decision has a budget."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.detectors import EVIDENCE_STEPS, SPIKE_PATIENCE
from lightning_gradguard.core.recovery import REFUND_AFTER_STEPS, SPIKE_COOLDOWN, RecoveryPolicy


def recovery(patience: int = 3, max_rollbacks: int = 2, max_skip_fraction: float = 0.5) -> RecoveryPolicy:
    return RecoveryPolicy(patience, max_rollbacks, max_skip_fraction)


def noise(generator: random.Random, level: float = 1.0) -> float:
    return level * generator.lognormvariate(0, 0.1)


def test_only_consecutive_skips_count() -> None:
    policy = recovery()
    for _ in range(20):
        assert policy.on_skip(0) == "continue"
        assert policy.on_skip(0) == "continue"
        assert policy.on_good_step(0, 1.0, 1.0)[0] == "continue"
        assert policy.on_good_step(0, 1.0, 1.0)[0] == "continue"
        assert policy.on_good_step(0, 1.0, 1.0)[0] == "continue"
    assert [policy.on_skip(0) for _ in range(3)] == ["continue", "continue", "roll_back"]


def test_skips_are_counted_for_each_optimizer() -> None:
    policy = recovery()
    for _ in range(2):
        assert policy.on_skip(0) == "continue"
        assert policy.on_good_step(1, 1.0, 1.0)[0] == "continue"
    assert policy.on_skip(1) == "continue"
    assert policy.on_skip(0) == "roll_back"


def test_lasting_spike_of_loss_and_norm_rolls_back_once() -> None:
    generator, policy = random.Random(0), recovery()
    for _ in range(100):
        assert policy.on_good_step(0, noise(generator), noise(generator))[0] == "continue"
    decisions = [policy.on_good_step(0, noise(generator, 15), noise(generator, 15))[0] for _ in range(20)]
    assert decisions.index("roll_back") == SPIKE_PATIENCE - 1
    assert decisions.count("roll_back") == 1


def test_spike_of_the_norm_alone_continues() -> None:
    generator, policy = random.Random(0), recovery()
    for _ in range(100):
        policy.on_good_step(0, noise(generator), noise(generator))
    assert {policy.on_good_step(0, noise(generator), noise(generator, 50))[0] for _ in range(20)} == {
        "continue"
    }


def test_first_step_of_a_spike_is_reported() -> None:
    generator, policy = random.Random(0), recovery()
    for _ in range(100):
        policy.on_good_step(0, noise(generator), noise(generator))
    anomalies = [policy.on_good_step(0, noise(generator, 15), noise(generator, 15))[1] for _ in range(5)]
    assert anomalies == ["loss_spike", "", "", "", ""]


def test_permanent_change_of_level_does_not_use_up_the_budget() -> None:
    generator, policy = random.Random(0), recovery(max_rollbacks=3)
    for _ in range(200):
        policy.on_good_step(0, noise(generator), noise(generator))
    detector_state = policy.detector_state()
    for _ in range(4 * SPIKE_COOLDOWN):
        decision, _ = policy.on_good_step(0, noise(generator, 15), noise(generator, 15))
        assert decision != "stop"
        if decision == "roll_back":
            policy.on_rollback()
            policy.load_detector_state(detector_state)
    assert policy.rollbacks == 1


def test_divergence_and_collapse_roll_back_and_repeated_divergence_needs_a_larger_ratio() -> None:
    policy = RecoveryPolicy(3, 10, 0.5)
    steps = [policy.on_good_step(0, 1.0, 1.0) for _ in range(EVIDENCE_STEPS)]
    assert {decision for decision, _ in steps} == {"continue"}
    outcomes = [policy.on_good_step(0, 20.0, 20.0) for _ in range(EVIDENCE_STEPS)]
    assert ("roll_back", "divergence") in outcomes
    policy.on_rollback()
    again = {policy.on_good_step(0, 20.0, 20.0)[0] for _ in range(EVIDENCE_STEPS)}
    assert again == {"continue"}  # 400 times worse is no longer enough
    assert ("roll_back", "divergence") in [policy.on_good_step(0, 40.0, 40.0) for _ in range(EVIDENCE_STEPS)]
    policy.on_rollback()
    collapsed = [policy.on_good_step(0, 1.0, 1.0, is_collapsed=True) for _ in range(EVIDENCE_STEPS)]
    assert collapsed[-1] == ("roll_back", "gradient_collapse")


def test_losses_of_adversarial_optimizers_may_rise_and_fall() -> None:
    policy = RecoveryPolicy(3, 10, 0.5)
    policy.is_adversarial = True
    for loss, norm in [(0.7, 1.0), (5.0, 20.0), (0.3, 1.0), (12.0, 50.0)] * 5:
        for _ in range(EVIDENCE_STEPS):
            assert policy.on_good_step(0, loss, norm) == ("continue", "")
    assert any(policy.on_good_step(0, 1e5, 1e5)[0] == "roll_back" for _ in range(EVIDENCE_STEPS))


def test_reset_budgets_allows_a_rollback_after_a_stop() -> None:
    policy = RecoveryPolicy(patience=1, max_rollbacks=1, max_skip_fraction=0.5)
    assert policy.on_skip(0) == "roll_back"
    policy.on_rollback()
    assert policy.on_skip(0) == "stop"
    policy.reset_budgets()
    assert policy.on_skip(0) == "roll_back"


def test_rollback_is_refunded_after_many_good_steps() -> None:
    policy = RecoveryPolicy(patience=1, max_rollbacks=1, max_skip_fraction=0.5)
    assert policy.on_skip(0) == "roll_back"
    policy.on_rollback()
    for _ in range(REFUND_AFTER_STEPS):
        policy.on_good_step(0, 1.0, 1.0)
    assert policy.on_skip(0) == "roll_back"
    assert policy.rollbacks == 1


def test_repeated_changes_of_level_do_not_use_up_the_budget() -> None:
    """A curriculum: each stage is harder than the one before, and is learnt before the next."""
    generator, policy = random.Random(0), RecoveryPolicy(patience=3, max_rollbacks=10, max_skip_fraction=0.5)
    for stage in range(15):
        for step in range(300):
            level = 2.0**stage * max(math.exp(-step / 40), 1e-3) * generator.lognormvariate(0, 0.1)
            decision, _ = policy.on_good_step(0, level, level)
            assert decision != "stop", stage
            if decision == "roll_back":
                policy.on_rollback()
    assert policy.rollbacks > 10


@given(st.lists(st.sampled_from(["skip", "step"]), max_size=150), st.integers(0, 150))
def test_resumed_policy_makes_the_same_decisions(events: list[str], cut: int) -> None:
    def play(policy: RecoveryPolicy, events: list[str]) -> list[str]:
        decisions: list[str] = []
        for event in events:
            decision = policy.on_skip(0) if event == "skip" else policy.on_good_step(0, 1.0, 1.0)[0]
            if decision == "roll_back":
                policy.on_rollback()
            decisions.append(decision)
        return decisions

    whole, first, resumed = recovery(), recovery(), recovery()
    expected = play(whole, events)
    play(first, events[:cut])
    resumed.load_state_dict(first.state_dict())
    assert play(resumed, events[cut:]) == expected[cut:]
