"""`RelativeNormClipping`: exact decisions on series of norms, losses, rates and weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard import RelativeNormClipping
from lightning_gradguard.core.norms import StepContext
from tests.core.clipping.steps import gradients_of, step

#: A rate at which unit norms and losses are far from overshoot.
SLOW = 0.01


def applied(policy: RelativeNormClipping, norms: Sequence[float], **context: Any) -> list[float]:
    """Norms after clipping; `losses` may give a loss for each."""
    losses = context.pop("losses", [context.pop("loss", math.nan)] * len(norms))
    return [
        step(policy, dataclasses.replace(gradients_of([norm]), context=StepContext(loss, **context)))
        for norm, loss in zip(norms, losses, strict=True)
    ]


def test_spike_is_clipped_to_the_level() -> None:
    policy = RelativeNormClipping()
    norms = [1.0, 1.2, 0.8] * 10
    assert applied(policy, norms) == pytest.approx(norms)
    assert applied(policy, [11.0, 9.0, 100.0, 1.1]) == pytest.approx([1.0, 9.0, 1.0, 1.1])


def test_spike_without_a_rise_of_the_loss_must_be_larger() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 30, loss=1.0)
    # of an optimizer that normalizes gradients, less is one if the loss has tripled
    assert applied(policy, [4.0], loss=3.1) == pytest.approx([1.0])
    assert applied(policy, [1.0, 4.0, 1.0], losses=[1.0, 2.9, 1.0]) == pytest.approx([1.0, 4.0, 1.0])
    assert applied(policy, [20.0, 1.0], losses=[2.1, 1.0]) == pytest.approx([1.0, 1.0])
    assert applied(policy, [140.0, 90.0], loss=1.0) == pytest.approx([1.0, 90.0])


def test_spike_enters_the_history_with_at_most_its_bound() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 4)
    assert applied(policy, [1e6] * 4)[-1] == pytest.approx(1.0)
    assert policy.state_dict()["norms"] == pytest.approx([1.0] * 4 + [10.0] * 4)


@pytest.mark.parametrize(("norm", "loss"), [(8.0, 2.5), (4.0, 3.1)])
def test_resumed_policy_knows_the_usual_norm_and_loss(norm: float, loss: float) -> None:
    policy, resumed = RelativeNormClipping(), RelativeNormClipping()
    applied(policy, [1.0] * 30, loss=1.0)
    resumed.load_state_dict(policy.state_dict())
    assert applied(resumed, [norm], loss=loss) == applied(policy, [norm], loss=loss)


def test_spike_is_above_three_times_the_level_however_small_norms_are() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 30 + [0.01] * 120)
    assert applied(policy, [3.1, 2.9]) == pytest.approx([1.0, 2.9])


def test_recent_norm_falls_by_a_tenth_a_step() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 30 + [4.0] + [1.0] * 3)
    assert float(policy.state_dict()["recent"]) == pytest.approx(4 * 0.9**3)


def test_losses_around_zero_have_no_ratio() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 30, losses=[-0.1, 0.1] * 15)
    assert applied(policy, [4.0, 8.0], losses=[0.5, -0.9]) == pytest.approx([4.0, 8.0])


def test_harmless_step_of_sgd_is_no_spike() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 30, loss=1.0, learning_rate=1e-5)
    assert applied(policy, [100.0], loss=1.0, learning_rate=1e-3) == pytest.approx([1.0])
    assert applied(policy, [100.0], loss=1.0, learning_rate=1e-5) == pytest.approx([100.0])


def test_rate_of_zero_divides_nothing() -> None:
    """A warm-up of SGD may begin at 0."""
    context = StepContext(1.0, learning_rate=0.0)
    known = dataclasses.replace(gradients_of([2.0]), known_norm=2.0, context=context)
    assert RelativeNormClipping().coefficients(known) == 1.0
    assert applied(RelativeNormClipping(), [2.0], loss=1.0, learning_rate=0.0) == pytest.approx([2.0])


def test_norms_that_rise_step_by_step_are_no_spikes() -> None:
    policy, rate = RelativeNormClipping(), {"learning_rate": 0.05, "momentum": 0.9}
    applied(policy, [0.1] * 30, loss=2.3, **rate)
    rising, falling = [0.1 * 2.5**i for i in range(1, 6)], [2.3, 2.1, 1.9, 1.5, 1.0]
    assert rising[-1] > 90 * 0.1
    assert applied(policy, rising, losses=falling, **rate) == pytest.approx(rising)
    # the level of the plateau has not grown: one that rises at once is clipped to it
    (clipped,) = applied(policy, [900.0], loss=1.0, **rate)
    assert clipped < 0.11


def test_swing_of_momentum_is_no_overshoot() -> None:
    policy, rate = RelativeNormClipping(), {"learning_rate": 0.1, "momentum": 0.9}
    applied(policy, [0.1] * 30, loss=2.3, **rate)
    swing, losses = [0.3, 0.9, 2.7, 8.0, 8.0, 2.0], [2.2, 1.8, 1.0, 2.0, 3.5, 1.5]
    assert applied(policy, swing, losses=losses, **rate) == pytest.approx(swing)


def test_only_without_a_loss_is_a_rise_of_norms_bounded_by_the_level() -> None:
    rising = [0.1 * 2.5**i for i in range(1, 6)]
    for loss, is_followed in ((-1.0, True), (math.nan, False)):
        policy = RelativeNormClipping()
        applied(policy, [0.1] * 30, loss=loss, learning_rate=0.05)
        found = applied(policy, rising, loss=loss, learning_rate=0.05)
        assert (found == pytest.approx(rising)) is is_followed


def test_slow_explosion_is_not_followed() -> None:
    norms = [1.02 ** max(i - 60, 0) for i in range(361)]
    assert norms[-1] > 350
    without_loss = applied(RelativeNormClipping(), norms, learning_rate=SLOW)
    assert max(without_loss) < 60
    assert without_loss[-1] < 5
    with_loss = applied(RelativeNormClipping(), norms, losses=norms, learning_rate=0.1, momentum=0.9)
    assert max(with_loss) < 22
    assert with_loss[-1] < 9
    # Adam normalizes it by itself
    assert applied(RelativeNormClipping(), norms, loss=1.0) == pytest.approx(norms)


@pytest.mark.parametrize(
    ("rate", "first"),
    [({"learning_rate": 0.01, "momentum": 0.9}, [22.0, 45.0]), ({}, [2.0, 2.0])],
    ids=["sgd", "adam"],
)
def test_first_steps_of_a_new_task_are_clipped_where_no_rate_tells_a_spike(
    rate: dict[str, Any], first: list[float]
) -> None:
    policy = RelativeNormClipping()
    applied(policy, [2.0] * 30 + [0.5] * 120, losses=[5.0] * 30 + [0.05] * 120, **rate)
    norms, losses = [22.0, 45.0, 22.0, 193.0, 75.0] + [30.0] * 60, [6.0, 12.0, 7.0, 76.0, 30.0] + [9.0] * 60
    assert applied(policy, norms, losses=losses, **rate) == pytest.approx([*first, *norms[2:]])
    # which has a level of its own
    assert applied(policy, [4e4], losses=[1e4], **rate)[0] < 100


def test_loss_jumps_from_the_last_ones_also_where_the_usual_one_is_older() -> None:
    policy, rate = RelativeNormClipping(), {"learning_rate": 0.01, "momentum": 0.9}
    applied(policy, [2.0] * 80, losses=[8.0 * 0.95**i for i in range(80)], **rate)
    assert policy.state_dict()["losses"][40] > 1.0
    # the second would begin an alarm: its loss has risen, and p is 7
    norms, losses = [20.0, 90.0, 90.0, 90.0], [4.0, 20.0, 20.0, 20.0]
    assert applied(policy, norms, losses=losses, **rate)[2:] == pytest.approx(norms[2:])


def test_bad_batches_are_no_new_task() -> None:
    policy, rate = RelativeNormClipping(), {"learning_rate": 0.05, "momentum": 0.9}
    applied(policy, [0.5] * 150, loss=0.05, **rate)
    hit, then = [2e3, 0.5, 2e3, 2e3, 0.5], [2e3, 0.3, 2e3, 2e3, 0.3]
    assert max(applied(policy, hit, losses=then, **rate)) == pytest.approx(0.5)
    assert applied(policy, [2e3], loss=2e3, **rate) == pytest.approx([0.5])


@pytest.mark.parametrize("rate", [{}, {"learning_rate": 0.001, "momentum": 0.9}], ids=["adam", "sgd"])
@pytest.mark.parametrize("period", [2, 4])
def test_batches_of_a_kind_with_losses_of_its_own_are_not_clipped(rate: dict[str, Any], period: int) -> None:
    policy = RelativeNormClipping()
    sizes = [100.0 if i % period == 1 else 1.0 for i in range(200)]
    found = applied(policy, sizes, losses=sizes, **rate)
    assert found[10 * period :] == pytest.approx(sizes[10 * period :])
    # their norms have a bound, too
    assert applied(policy, [1e7], loss=100.0, **rate)[0] < 1e3


@pytest.mark.parametrize("high", [[100.0] * 9, [100.0, *[1.0] * 24] * 8], ids=["all", "rare"])
def test_losses_that_have_all_risen_and_rare_ones_are_of_no_kind(high: list[float]) -> None:
    policy = RelativeNormClipping()
    sizes = [1.0] * 11 + high
    assert max(applied(policy, sizes, losses=sizes)) == pytest.approx(1.0)


def test_loss_that_jumps_during_an_alarm_is_no_new_task() -> None:
    policy, rate = RelativeNormClipping(), {"learning_rate": 0.5}
    applied(policy, [0.5] * 30 + [1.5, 4.5, 13.0], losses=[1.0] * 32 + [2.0], **rate)
    applied(policy, [0.5] * 30, loss=1.0, **rate)
    assert max(applied(policy, [40.0] * 4, losses=[30.0, 40.0, 50.0, 60.0], **rate)) < 4


def test_norms_that_fall_by_decades_are_not_clipped() -> None:
    policy = RelativeNormClipping()
    norms = [10 ** (-i / 50) * (1 + 4 * (i % 7 == 0)) for i in range(300)]
    assert applied(policy, norms) == pytest.approx(norms)


def test_overshoot_is_reduced_and_remembered() -> None:
    policy = RelativeNormClipping()
    # p = 1 * 100 ** 2 / 2: reduced to p = .5, a norm of 1
    assert applied(policy, [100.0], loss=2.0, learning_rate=1.0) == pytest.approx([1.0])
    # the cap grows by 2 % with each step that it bounds, and with no other
    later = applied(policy, [1.5, 0.5, 1.5], loss=2.0, learning_rate=1.0)
    assert later == pytest.approx([1.02, 0.5, 1.02**2])


def test_overshoot_is_reduced_also_where_a_cap_is_lifted_by_a_lower_rate() -> None:
    policy = RelativeNormClipping()
    applied(policy, [100.0], loss=2.0, learning_rate=1.0)
    # the cap of 1 is one of 100 at a hundredth of the rate, and p = .5 a norm of 10
    assert applied(policy, [100.0], loss=2.0, learning_rate=0.01) == pytest.approx([10.0])


def test_cap_is_lifted_for_a_new_task() -> None:
    policy = RelativeNormClipping()
    applied(policy, [100.0, *[0.5] * 70], loss=2.0, learning_rate=1.0)
    capped = applied(policy, [5.0] * 4, loss=20.0, learning_rate=1.0)
    assert capped == pytest.approx([1.02, 1.02**2, 5.0, 5.0])


def test_cap_of_a_step_at_a_rate_that_lasts_for_one_step_does_not_last() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 3, loss=1.0, learning_rate=SLOW)
    (capped,) = applied(policy, [1.0], loss=1.0, learning_rate=1e4 * SLOW)
    assert capped < 0.1
    assert applied(policy, [1.0] * 3, loss=1.0, learning_rate=SLOW) == [1.0] * 3
    assert applied(policy, [1.0], loss=1.0, learning_rate=1e4 * SLOW) == pytest.approx([capped], rel=0.03)


def test_step_longer_than_the_weights_is_reduced_further() -> None:
    policy = RelativeNormClipping()
    context = {"learning_rate": 1.0, "loss": 2.0}
    assert applied(policy, [100.0], weight_norm=10.0, **context) == pytest.approx([0.2])
    other = RelativeNormClipping()
    assert applied(other, [100.0], weight_norm=1000.0, **context) == pytest.approx([1.0])


def test_momentum_lengthens_the_step_only_once_the_loss_has_risen() -> None:
    usual = {"learning_rate": SLOW, "momentum": 0.9}
    policy = RelativeNormClipping()
    norms = [8.0] * 40  # p = .1 * 8 ** 2 / .1 = 64 with momentum, 12 without
    assert applied(policy, norms, loss=0.1, **usual) == pytest.approx(norms)
    # of the loss of the step itself, p = .019 * 6 ** 2 / .18 = 3.8 without momentum
    assert applied(policy, [6.0], loss=0.18, **usual) == pytest.approx([6.0])
    (clipped,) = applied(policy, [8.0], loss=0.18, **usual)
    assert clipped == pytest.approx(math.sqrt(0.5 * 0.1 / 0.1))


@pytest.mark.parametrize(("n_before", "usual", "overshoots"), [(19, 15.0, 17.0), (25, 30.0, 34.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_overshoot_is_found_earlier_in_the_first_steps(
    n_before: int, usual: float, overshoots: float, momentum: float
) -> None:
    """By p of the first step, the rate times 1 + momentum, as norm and loss are 1."""
    policy = RelativeNormClipping()
    applied(policy, [1.0] * n_before, loss=1.0, learning_rate=SLOW)
    for p, reduced in ((usual, False), (overshoots, True)):
        rate = p / (1 + momentum)
        expected = math.sqrt(0.5 * (1 - momentum) / rate) if reduced else 1.0
        found = applied(copy.deepcopy(policy), [1.0], loss=1.0, learning_rate=rate, momentum=momentum)
        assert found == pytest.approx([expected])


def test_loss_counts_as_at_most_the_highest_usual_one() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 240, losses=[10.0] * 30 + [1.0] * 210, learning_rate=SLOW)
    assert applied(policy, [1.0], loss=8.0, learning_rate=40.0) == [1.0]


def test_alarm_lasts_60_finite_steps() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 5, loss=1.0, learning_rate=SLOW, weight_norm=100.0)
    applied(policy, [1.0], loss=1.0, learning_rate=17.0)
    assert float(policy.state_dict()["alarm"]) == 60
    before = {key: float(policy.state_dict()[key]) for key in ("alarm", "cap", "lowest_loss", "weight_norm")}
    applied(policy, [math.inf, math.nan, 1.0], losses=[1.0, 1.0, -math.inf], learning_rate=SLOW)
    assert {key: float(policy.state_dict()[key]) for key in before} == before
    applied(policy, [1.0] * 59, loss=1.0, learning_rate=SLOW, weight_norm=1.0)
    # up to 2, p is no reason to shorten a step that is longer than the weights
    assert applied(copy.deepcopy(policy), [1.0], loss=1.0, learning_rate=1.5) == pytest.approx([1.0])
    assert applied(copy.deepcopy(policy), [1.0], loss=1.0, learning_rate=2.5) == pytest.approx([0.02 / 2.5])
    applied(policy, [1.0], loss=1.0, learning_rate=SLOW)
    assert applied(policy, [1.0], loss=1.0, learning_rate=2.5) == pytest.approx([1.0])


def test_negative_losses_leave_the_spike_rule_alone() -> None:
    policy = RelativeNormClipping()
    norms = [100.0] * 30
    assert applied(policy, norms, loss=-1.0, learning_rate=1.0) == pytest.approx(norms)
    assert applied(policy, [2000.0], loss=5.0, learning_rate=1.0) == pytest.approx([100.0])


def test_nonfinite_loss_or_norm_changes_nothing() -> None:
    policy = RelativeNormClipping()
    applied(policy, [1.0] * 10, loss=1.0, learning_rate=SLOW)
    before = {k: v for k, v in policy.state_dict().items() if k != "steps_since_weights"}
    applied(policy, [math.nan, math.inf, 50.0], losses=[1.0, 1.0, math.inf], learning_rate=SLOW)
    after = {k: v for k, v in policy.state_dict().items() if k != "steps_since_weights"}
    for key, value in before.items():
        torch.testing.assert_close(torch.as_tensor(after[key]), torch.as_tensor(value), equal_nan=True)


def test_weights_are_asked_for_once_in_fifty_steps_of_sgd() -> None:
    policy, adaptive = RelativeNormClipping(), RelativeNormClipping()
    asked = []
    for _ in range(101):
        asked.append(policy.wants_weight_norm)
        applied(policy, [1.0], loss=1.0, learning_rate=SLOW)
    assert [i for i, wants in enumerate(asked) if wants] == [0, 50, 100]
    applied(adaptive, [1.0] * 50, loss=1.0)
    assert not adaptive.wants_weight_norm


finite = st.floats(1e-3, 1e5)
pairs = st.lists(st.tuples(finite, finite), min_size=1, max_size=60)


@given(
    steps=st.lists(st.tuples(finite, finite), min_size=1, max_size=60), momentum=st.sampled_from([0.0, 0.9])
)
@settings(deadline=None, max_examples=25)
def test_host_and_device_decide_alike(steps: list[tuple[float, float]], momentum: float) -> None:
    on_host, on_device = RelativeNormClipping(window=10), RelativeNormClipping(window=10)
    for norm, loss in steps:
        gradients = gradients_of([norm])
        known = dataclasses.replace(
            gradients,
            known_norm=gradients.total_norm.item(),
            context=StepContext(loss, 0.05, momentum, weight_norm=3.0),
        )
        tensors = StepContext(torch.tensor(loss, dtype=torch.float64), 0.05, momentum, weight_norm=3.0)
        expected = on_host.coefficients(known)
        found = on_device.coefficients(dataclasses.replace(gradients, context=tensors))
        assert isinstance(expected, float)
        assert float(found) == pytest.approx(expected, rel=1e-12)
        on_host.commit()
        on_device.commit()


@pytest.mark.parametrize(
    ("arguments", "quoted"), [({"max_ratio": 0}, "max_ratio=0"), ({"window": 0}, "window=0")]
)
def test_wrong_arguments_are_quoted(arguments: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        RelativeNormClipping(**arguments)


def test_a_shorter_window_keeps_the_last_norms() -> None:
    policy, shorter = RelativeNormClipping(), RelativeNormClipping(window=2)
    applied(policy, [1.0, 2.0, 3.0])
    shorter.load_state_dict(policy.state_dict())
    assert shorter.state_dict()["norms"] == [2.0, 3.0]
