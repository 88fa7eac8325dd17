"""Spikes are detected, noise and changes of level are not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.core.detectors import SpikeAlarm, SpikeDetector
from lightning_gradguard.core.detectors.spike import CALM_STEPS, QUIET_STEPS


def alarms(values: Iterable[float], gap: int = 10) -> list[int]:
    """Positions of spikes, those within `gap` values of another counted once."""
    detector, found, last = SpikeDetector(), [], -gap - 1
    for i, value in enumerate(values):
        if detector.update(value):
            if i - last > gap:
                found.append(i)
            last = i
    return found


def test_tenfold_spikes_are_detected_and_noise_is_not() -> None:
    generator = random.Random(0)
    noise = [generator.lognormvariate(0, 0.2) for _ in range(10_000)]
    assert len(alarms(noise)) <= 1
    spikes = range(199, 10_000, 200)
    with_spikes = [10 * value if i in spikes else value for i, value in enumerate(noise)]
    assert set(spikes) <= set(alarms(with_spikes))


def test_correlated_and_heavy_tailed_noise_give_few_alarms() -> None:
    generator = random.Random(1)
    level, correlated = 0.0, []
    for _ in range(10_000):
        level = 0.9 * level + generator.gauss(0, 0.4 * math.sqrt(1 - 0.81))
        correlated.append(math.exp(level))
    assert len(alarms(correlated)) <= 40
    assert len(alarms(math.exp(generator.gauss(0, 1)) for _ in range(10_000))) <= 20


def test_rise_of_six_deviations_that_lasts_is_detected() -> None:
    generator = random.Random(2)
    values = [3 + generator.gauss(0, 0.05) for _ in range(300)]
    assert alarms(values) == []
    assert alarms([v + 0.3 if i >= 200 else v for i, v in enumerate(values)])[0] in range(200, 206)


def test_frequent_spikes_are_followed_by_silence() -> None:
    generator = random.Random(3)
    found = alarms((30.0 if i % 10 == 9 else 1.0) * generator.lognormvariate(0, 0.2) for i in range(3000))
    assert all(i < 300 for i in found)


def test_lasting_spike_is_one_for_ten_steps() -> None:
    detector = SpikeDetector()
    assert not any(detector.update(1.0) for _ in range(100))
    assert all(detector.update(50.0) for _ in range(10))


def test_permanent_change_of_level_is_followed() -> None:
    generator = random.Random(2)
    detector = SpikeDetector()
    for _ in range(200):
        detector.update(generator.lognormvariate(0, 0.2))
    after = [detector.update(5 * generator.lognormvariate(0, 0.2)) for _ in range(400)]
    assert any(after[:10])
    assert not any(after[150:])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, None]), min_size=60, max_size=120))
def test_nonfinite_values_do_not_change_later_results(stream: list[float | None]) -> None:
    generator = random.Random(3)
    with_bad, without = SpikeDetector(), SpikeDetector()
    for bad in stream:
        if bad is not None:
            assert not with_bad.update(bad)
        value = generator.lognormvariate(0, 1.5)
        assert with_bad.update(value) is without.update(value)


def test_resumed_detector_gives_the_same_results() -> None:
    generator = random.Random(4)
    values = [generator.lognormvariate(0, 0.5) * (100 if i % 37 == 36 else 1) for i in range(400)]
    whole, first, resumed = SpikeDetector(), SpikeDetector(), SpikeDetector()
    expected = [whole.update(value) for value in values]
    for value in values[:150]:
        first.update(value)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.update(value) for value in values[150:]] == expected[150:]
    assert any(expected[150:])


def test_a_calm_run_undoes_one_doubling_of_the_quiet_time() -> None:
    alarm = SpikeAlarm()
    assert alarm.update(True)
    assert not any(alarm.update(False) for _ in range(CALM_STEPS))
    raised = [alarm.update(True) for _ in range(QUIET_STEPS + 1)]
    assert [i for i, is_alarm in enumerate(raised) if is_alarm] == [0, QUIET_STEPS]
