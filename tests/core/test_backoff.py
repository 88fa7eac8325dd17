"""The scale is cut at once, recovers slowly, and stays within its bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.backoff import Backoff

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
