"""Skip, go back, give up: the same outcomes lead to the same decision, and every decision has a budget."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.core.recovery import SPIKE_COOLDOWN, SPIKE_PATIENCE, RecoveryPolicy


def recovery(patience: int = 3, max_rollbacks: int = 2, max_skip_fraction: float = 0.5) -> RecoveryPolicy:
    return RecoveryPolicy(patience, max_rollbacks, max_skip_fraction)


def noise(generator: random.Random, level: float = 1.0) -> float:
    return level * generator.lognormvariate(0, 0.1)


def test_only_skips_in_a_row_count() -> None:
    machine = recovery()
    for _ in range(20):
        assert machine.on_skip(0) == "continue"
        assert machine.on_skip(0) == "continue"
        assert machine.on_good_step(0, 1.0, 1.0)[0] == "continue"
        assert machine.on_good_step(0, 1.0, 1.0)[0] == "continue"
        assert machine.on_good_step(0, 1.0, 1.0)[0] == "continue"
    assert [machine.on_skip(0) for _ in range(3)] == ["continue", "continue", "roll_back"]


def test_each_optimizer_counts_for_itself() -> None:
    machine = recovery()
    for _ in range(2):
        assert machine.on_skip(0) == "continue"
        assert machine.on_good_step(1, 1.0, 1.0)[0] == "continue"
    assert machine.on_skip(1) == "continue"
    assert machine.on_skip(0) == "roll_back"


def test_a_spike_of_both_that_does_not_clear_goes_back_once() -> None:
    generator, machine = random.Random(0), recovery()
    for _ in range(100):
        assert machine.on_good_step(0, noise(generator), noise(generator))[0] == "continue"
    decisions = [machine.on_good_step(0, noise(generator, 15), noise(generator, 15))[0] for _ in range(20)]
    assert decisions.index("roll_back") == SPIKE_PATIENCE - 1
    assert decisions.count("roll_back") == 1


def test_a_spike_of_one_alone_is_clipping_s_business() -> None:
    generator, machine = random.Random(0), recovery()
    for _ in range(100):
        machine.on_good_step(0, noise(generator), noise(generator))
    assert {machine.on_good_step(0, noise(generator), noise(generator, 50))[0] for _ in range(20)} == {
        "continue"
    }


def test_the_first_step_of_a_spike_is_told() -> None:
    generator, machine = random.Random(0), recovery()
    for _ in range(100):
        machine.on_good_step(0, noise(generator), noise(generator))
    told = [machine.on_good_step(0, noise(generator, 15), noise(generator, 15))[1] for _ in range(5)]
    assert told == ["loss_spike", "", "", "", ""]


def test_a_level_that_changed_for_good_does_not_use_the_budget_up() -> None:
    generator, machine = random.Random(0), recovery(max_rollbacks=3)
    for _ in range(200):
        machine.on_good_step(0, noise(generator), noise(generator))
    detector_state = machine.detector_state()
    for _ in range(4 * SPIKE_COOLDOWN):
        decision, _ = machine.on_good_step(0, noise(generator, 15), noise(generator, 15))
        assert decision != "stop"
        if decision == "roll_back":
            machine.on_rollback()
            machine.load_detector_state(detector_state)
    assert machine.rollbacks == 1


@given(st.lists(st.sampled_from(["skip", "step"]), max_size=150), st.integers(0, 150))
def test_a_resumed_machine_decides_alike(events: list[str], cut: int) -> None:
    def play(machine: RecoveryPolicy, events: list[str]) -> list[str]:
        decisions: list[str] = []
        for event in events:
            decision = machine.on_skip(0) if event == "skip" else machine.on_good_step(0, 1.0, 1.0)[0]
            if decision == "roll_back":
                machine.on_rollback()
            decisions.append(decision)
        return decisions

    whole, first, resumed = recovery(), recovery(), recovery()
    expected = play(whole, events)
    play(first, events[:cut])
    resumed.load_state_dict(first.state_dict())
    assert play(resumed, events[cut:]) == expected[cut:]
