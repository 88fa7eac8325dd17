"""The same outcomes lead to the same decision, and every decision has a budget."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.detectors import EVIDENCE_STEPS
from lightning_gradguard.core.recovery import (
    MOSTLY_CLIPPED,
    MOVED,
    MOVED_IF_CLIPPED,
    REFUND_AFTER_STEPS,
    RecoveryPolicy,
)


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


def test_new_data_with_a_higher_loss_is_one_alarm_and_no_rollback() -> None:
    """Loss and norm are far above all that was seen, and stay so, while the weights have hardly moved."""
    generator, policy = random.Random(0), recovery()
    for _ in range(300):
        assert policy.on_good_step(0, noise(generator), noise(generator)) == ("continue", "")
    steps = [
        policy.on_good_step(0, noise(generator, 50), noise(generator, 50), distance=lambda: 0.35)
        for _ in range(250)
    ]
    assert {decision for decision, _ in steps} == {"continue"}
    assert [anomaly for _, anomaly in steps if anomaly] == ["loss_spike"]


def test_high_loss_with_weights_far_away_is_a_divergence() -> None:
    generator, policy = random.Random(0), recovery()
    for _ in range(300):
        policy.on_good_step(0, noise(generator), noise(generator))
    steps = [
        policy.on_good_step(0, noise(generator, 50), noise(generator, 50), distance=lambda: MOVED)
        for _ in range(EVIDENCE_STEPS)
    ]
    assert ("roll_back", "divergence") in steps


def test_loss_that_grows_slowly_is_no_divergence() -> None:
    """Values of a Q network grow a thousandfold, and its loss with them."""
    generator, policy = random.Random(0), recovery()
    for step in range(2000):
        level = 1000 ** (step / 2000)
        outcome = policy.on_good_step(
            0, noise(generator, level), noise(generator, level), distance=lambda: 2.0
        )
        assert outcome == ("continue", ""), step


def test_run_without_progress_has_diverged_if_its_weights_are_far_away() -> None:
    for distance, decisions in [(MOVED, {"continue"}), (10.0, {"continue", "roll_back"})]:
        generator, policy = random.Random(0), recovery()
        found = {
            policy.on_good_step(0, noise(generator, 1.4), 1.0, distance=lambda: distance)[0]  # noqa: B023
            for _ in range(60)
        }
        assert found == decisions


@pytest.mark.parametrize(
    ("loss", "distance", "expected"),
    [(1.8, 0.7, "roll_back"), (1.8, 0.6, "continue"), (1.4, 9.0, "continue")],
)
def test_progress_that_is_lost_by_weights_far_away_is_a_divergence(
    loss: float, distance: float, expected: str
) -> None:
    policy = recovery()
    policy.compares_batches = True
    losses = [2.3] * 10 + [0.8] * 60 + [loss] * 40
    steps = [policy.on_good_step(0, x, 1.0, distance=lambda: distance)[0] for x in losses]
    assert {"continue", expected} == set(steps)
    assert set(steps[:70]) == {"continue"}
    unable = recovery()  # to see if the data are the reason
    assert {unable.on_good_step(0, x, 1.0, distance=lambda: distance)[0] for x in losses} == {"continue"}


def test_progress_that_the_data_have_undone_is_not_lost() -> None:
    policy = recovery()
    policy.compares_batches = True
    for loss in [2.3] * 10 + [0.8] * 60 + [1.8] * 9:
        policy.on_good_step(0, loss, 1.0, distance=lambda: MOVED)
    policy.accept_rise(0)
    assert {policy.on_good_step(0, 1.8, 1.0, distance=lambda: MOVED)[0] for _ in range(40)} == {"continue"}


def test_loss_that_rises_in_the_first_steps_with_its_weights_is_a_divergence() -> None:
    """A bad batch is none, nor is a rise once the task is learned, or where weights stay from then on."""
    for losses, first, move, expected in [
        ([2.3, 5.0, 3.0, 2.0], 0.0, 0.4, {"continue", "roll_back"}),
        ([2.3, 80.0, 3.0, 2.0], 0.0, 0.06, {"continue", "roll_back"}),
        ([2.3, 5.0, 3.0, 2.0], 0.0, 0.06, {"continue"}),
        ([2.3, 80.0, 3.0, 2.0], 0.0, 0.04, {"continue"}),
        ([2.3, 80.0, 2.2, 2.2], 0.0, 0.4, {"continue"}),
        ([2.3, 0.4, 80.0, 80.0, 80.0], 0.0, 0.4, {"continue"}),
        ([2.3, 5.0, 3.0, 2.0], 1.5, 0.01, {"continue"}),  # the first update is large, as of RMSprop
        ([2.3] * 9 + [80.0] * 4, 0.0, 0.04, {"continue"}),  # the data get harder, as in a curriculum
        ([2.3] * 9 + [80.0] * 4, 1.5, 0.0, {"continue", "roll_back"}),
        ([2.3] * 20 + [80.0] * 4, 0.0, 0.04, {"continue"}),
    ]:
        policy = recovery()
        found = {
            policy.on_good_step(0, loss, loss**4, distance=lambda: first + move * i)[0]  # noqa: B023
            for i, loss in enumerate(losses)
        }
        assert found == expected, (losses, first, move)


def test_weights_are_measured_once_in_ten_steps_at_most() -> None:
    policy, asked = recovery(), []
    for step in range(300):
        level = 1.0 if step < 200 else 100.0
        policy.on_good_step(0, level, level, distance=lambda: asked.append(step) or 0.0)  # type: ignore[func-returns-value]  # noqa: B023
    assert asked
    assert min(b - a for a, b in zip(asked, asked[1:], strict=False)) >= EVIDENCE_STEPS


def test_losses_that_change_sign_diverge_by_the_range_that_was_seen() -> None:
    generator, policy = random.Random(0), recovery()
    for _ in range(200):
        assert policy.on_good_step(0, generator.gauss(-1, 3), 1.0, distance=lambda: 9.0)[0] == "continue"
    steps = {policy.on_good_step(0, 500.0, 10.0, distance=lambda: 9.0) for _ in range(EVIDENCE_STEPS)}
    assert ("roll_back", "divergence") in steps


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


@pytest.mark.parametrize(("spikes", "found"), [((4.0,), []), ((4.0, 4.0), [201]), ((8.0,), [200])])
def test_one_step_is_a_spike_if_it_gives_back_half_of_what_was_learned(
    spikes: tuple[float, ...], found: list[int]
) -> None:
    generator, policy = random.Random(0), recovery()
    losses = [10.0, *(noise(generator) for _ in range(199)), *spikes, 1.0, 1.0]
    anomalies = [policy.on_good_step(0, loss, loss)[1] for loss in losses]
    assert [i for i, anomaly in enumerate(anomalies) if anomaly == "loss_spike"] == found


def test_alarms_become_fewer_where_spikes_are_the_nature_of_the_run() -> None:
    generator, policy = random.Random(0), recovery()
    alarms = 0
    for step in range(10_000):
        level = 30.0 if step % 200 > 195 else 1.0
        alarms += policy.on_good_step(0, noise(generator, level), noise(generator, level))[1] == "loss_spike"
    assert 1 <= alarms <= 6


def test_small_rise_that_lasts_is_reported() -> None:
    """A loss of 3 nats rises by 0.3, six times its noise, with the gradient norm as before."""
    generator, policy = random.Random(0), recovery()
    anomalies = [
        policy.on_good_step(0, 3 + generator.gauss(0, 0.05), noise(generator))[1] for _ in range(200)
    ]
    anomalies += [
        policy.on_good_step(0, 3.3 + generator.gauss(0, 0.05), noise(generator))[1] for _ in range(20)
    ]
    assert [i for i, anomaly in enumerate(anomalies) if anomaly == "loss_spike"] == [205]  # the sixth


def test_collapse_rolls_back() -> None:
    policy = recovery()
    steps = [policy.on_good_step(0, 1.0, 1.0) for _ in range(EVIDENCE_STEPS)]
    assert {decision for decision, _ in steps} == {"continue"}
    collapsed = [policy.on_good_step(0, 1.0, 1.0, is_collapsed=True) for _ in range(EVIDENCE_STEPS)]
    assert collapsed[-1] == ("roll_back", "gradient_collapse")


def test_losses_of_adversarial_optimizers_may_rise_and_fall() -> None:
    policy = RecoveryPolicy(3, 10, 0.5)
    policy.is_adversarial = True
    for loss, norm in [(0.7, 1.0), (5.0, 20.0), (0.3, 1.0), (12.0, 50.0)] * 5:
        for _ in range(EVIDENCE_STEPS):
            assert policy.on_good_step(0, loss, norm, distance=lambda: 9.0)[0] == "continue"
    steps = [policy.on_good_step(0, 1e5, 1e5, distance=lambda: 9.0)[0] for _ in range(2 * EVIDENCE_STEPS)]
    assert "roll_back" in steps


@pytest.mark.parametrize(
    ("loss", "distance", "clipped", "expected"),
    [
        (2.1, MOVED_IF_CLIPPED, MOSTLY_CLIPPED, "roll_back"),
        (2.1, MOVED_IF_CLIPPED, 0.7, "continue"),  # some steps are as long as they are without clipping
        (2.1, 0.2, MOSTLY_CLIPPED, "continue"),
        (1.7, MOVED_IF_CLIPPED, MOSTLY_CLIPPED, "continue"),  # progress
        (9.0, MOVED_IF_CLIPPED, MOSTLY_CLIPPED, "continue"),  # as where the task is another one
    ],
)
def test_without_progress_steps_of_the_length_that_clipping_sets_are_a_divergence_without_a_risen_loss(
    loss: float, distance: float, clipped: float, expected: str
) -> None:
    policy = recovery()
    losses = [2.0] + [loss] * 49
    steps = [policy.on_good_step(0, x, 1.0, distance=lambda: distance, clipped=clipped) for x in losses]
    assert {decision for decision, _ in steps[:-1]} == {"continue"}
    assert steps[-1][0] == expected
    assert policy.risen_loss == math.inf


@pytest.mark.parametrize(("loss", "expected"), [(2.1, "roll_back"), (1.7, "continue")])
def test_without_progress_updates_that_were_too_large_are_a_divergence(loss: float, expected: str) -> None:
    updated, policy = recovery(), recovery()
    updated.has_large_updates = True
    policy.load_state_dict(updated.state_dict())
    steps = [policy.on_good_step(0, x, 1.0, distance=lambda: 1.0)[0] for x in [2.0] + [loss] * 49]
    assert steps == ["continue"] * 49 + [expected]
    policy.on_rollback()
    assert not policy.has_large_updates


def test_a_small_rise_that_lasts_is_a_loss_spike_unless_optimizers_are_adversarial() -> None:
    for is_adversarial, expected in ((False, {"", "loss_spike"}), (True, {""})):
        policy, generator = RecoveryPolicy(3, 10, 0.5), random.Random(0)
        policy.is_adversarial = is_adversarial
        losses = [noise(generator) for _ in range(200)] + [2.0] * 20
        assert {policy.on_good_step(0, loss, 1.0)[1] for loss in losses} - {"no_progress"} == expected


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


def test_divergence_that_returns_uses_up_the_budget() -> None:
    policy = recovery(max_rollbacks=3)
    for _ in range(200):
        policy.on_good_step(0, 1.0, 1.0)
    state, decisions = policy.detector_state(), []
    while "stop" not in decisions:
        decisions.append(policy.on_good_step(0, 100.0, 100.0, distance=lambda: 9.0)[0])
        if decisions[-1] == "roll_back":
            policy.on_rollback()
            policy.load_detector_state(state)
        assert len(decisions) < 100
    assert policy.rollbacks == 3


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


@pytest.mark.parametrize("jump", [0.0, 20.0])
def test_losses_of_two_players_may_drift_far_within_few_steps(jump: float) -> None:
    policy = recovery()
    policy.is_adversarial = True
    drift = [0.5 * max(n - 60, 0) + (37 * n % 100) / 400 for n in range(90)]
    found = [policy.on_good_step(0, value, 1 + value)[1] for value in [*drift, drift[-1] + jump]]
    assert found.count("loss_spike") == (jump > 0)
    assert jump == 0 or found[-1] == "loss_spike"


def test_of_two_players_a_loss_spikes_with_its_norm_from_twice_the_usual_distance() -> None:
    values = [1 + (37 * n % 100) / 100 for n in range(100)]
    median, spread = 1.5, 0.44  # half of the sum of the upper decile and the highest, above the median
    for distance, is_adversarial, expected in (
        (4.5, False, "loss_spike"),
        (4.5, True, ""),
        (9.0, True, "loss_spike"),
    ):
        policy = recovery()
        policy.is_adversarial = is_adversarial
        for value in values:
            policy.on_good_step(0, value, value)
        risen = median + distance * spread
        assert policy.on_good_step(0, risen, risen)[1] == expected
