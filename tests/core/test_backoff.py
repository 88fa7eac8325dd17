"""The scale is cut at once, recovers slowly, and stays within its bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.backoff import Backoff
from lightning_gradguard.core.incidents import TRIAL_STEPS

EVENTS = st.lists(st.sampled_from(["reduce", "step"]), max_size=300)


def play(backoff: Backoff, events: list[str]) -> list[float]:
    scales = []
    for event in events:
        getattr(backoff, event)()
        scales.append(backoff.scale)
    return scales


def small() -> Backoff:
    return Backoff(min_scale=0.1, cooldown_steps=3, rewarm_steps=5, recover_after_steps=20)


@given(EVENTS)
def test_scale_stays_within_its_bounds(events: list[str]) -> None:
    assert all(0.01 <= scale <= 1 for scale in play(small(), events))


@given(EVENTS, EVENTS)
def test_resumed_scale_continues_alike(before: list[str], after: list[str]) -> None:
    whole, first, resumed = small(), small(), small()
    play(whole, before)
    play(first, before)
    resumed.load_state_dict(first.state_dict())
    assert play(resumed, after) == play(whole, after)


def test_rewarming_is_linear_from_a_tenth() -> None:
    backoff = Backoff(rewarm_steps=10)
    assert backoff.reduce()
    scales = [backoff.scale, *play(backoff, ["step"] * 10)]
    assert scales == pytest.approx([0.5 * (0.1 + 0.09 * i) for i in range(11)])


def test_cooldown_prevents_a_second_cut() -> None:
    backoff = Backoff(cooldown_steps=3, rewarm_steps=0)
    assert [backoff.reduce() for _ in range(2)] == [True, False]
    play(backoff, ["step"] * 3)
    assert backoff.reduce()
    assert backoff.scale == 0.25


def test_search_cuts_by_squares_and_raises_what_lasts() -> None:
    backoff = Backoff(rewarm_steps=0)
    levels = [backoff.level for _ in range(4) if backoff.reduce(search=True)]
    assert levels == [2**-1, 2**-3, 2**-7, 2**-15]
    rates = []
    for step in range(4 * TRIAL_STEPS):
        backoff.step(loss=1 / (step + 1))
        rates.append(backoff.level)
    # 2**-7 has failed: half of the way there is tried, and is close enough
    assert list(dict.fromkeys(rates)) == [2**-15, 2**-11]
    assert not backoff.is_searching


def test_search_from_a_divergence_at_the_start_begins_with_a_sixteenth() -> None:
    for has_diverged, level in ((True, 2**-4), (False, 2**-1)):
        backoff = Backoff()
        backoff.begin(0)
        assert backoff.on_rollback(0, has_diverged=has_diverged)
        assert (backoff.level, backoff.scale) == (level, level)


def test_found_level_is_kept_and_returned_to_if_a_higher_one_fails() -> None:
    backoff = Backoff(rewarm_steps=0, recover_after_steps=100)
    for _ in range(4):
        backoff.reduce(search=True)
    for step in range(TRIAL_STEPS):
        backoff.step(1 / (step + 1))
    assert backoff.level == 2**-11
    backoff.reduce(search=True)
    assert backoff.level == 2**-15
    found = []
    for step in range(1000):
        backoff.step(1 / (step + 1))
        found.append(backoff.has_found)
    assert (found.count(True), backoff.level) == (1, 2**-15)


def test_level_that_lasts_without_a_fall_of_the_loss_is_not_said_to_train() -> None:
    backoff = Backoff(rewarm_steps=0)
    for _ in range(2):
        backoff.reduce(search=True)
    for _ in range(200):
        backoff.step(1.0)
        assert not backoff.has_found


def test_scale_recovers_after_good_steps_up_to_one() -> None:
    backoff = Backoff(rewarm_steps=0, cooldown_steps=0, recover_after_steps=10)
    play(backoff, ["reduce", "reduce"])
    assert play(backoff, ["step"] * 35)[9::10] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", 0.0),
        ("factor", 1.0),
        ("min_scale", 0.0),
        ("min_scale", 2.0),
        ("cooldown_steps", -1),
        ("rewarm_steps", 1.5),
        ("recover_after_steps", 0),
    ],
)
def test_bad_arguments_are_quoted(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Backoff(**{name: value})


@pytest.mark.parametrize(("losses", "level"), [((9.0, 8.0, 10.0), 1.0), ((9.0, 1.0, 1.0), 1 / 16)])
def test_cut_for_a_divergence_is_taken_back_if_the_next_losses_are_as_high(
    losses: tuple[float, ...], level: float
) -> None:
    backoff = Backoff()
    backoff.begin(0)
    assert backoff.on_rollback(0, has_diverged=True, risen_loss=10.0)
    for loss in losses:
        assert backoff.needs_loss
        assert not backoff.has_returned
        backoff.step(loss)
    assert backoff.has_returned == (level == 1.0)
    assert backoff.level == backoff.scale == level
    assert backoff.is_searching == (level < 1.0)
