"""Spikes are detected, noise and changes of level are not."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.core.detectors import SpikeDetector


def test_tenfold_spikes_are_detected_and_noise_is_not() -> None:
    generator = random.Random(0)
    detector = SpikeDetector()
    false_alarms = sum(detector.update(generator.lognormvariate(0, 0.2)) for _ in range(10_000))
    assert false_alarms == 0
    hits = 0
    for _ in range(100):
        for _ in range(20):
            detector.update(generator.lognormvariate(0, 0.2))
        hits += detector.update(10 * generator.lognormvariate(0, 0.2))
    assert hits == 100


def test_correlated_noise_gives_few_alarms() -> None:
    generator = random.Random(1)
    detector, level, alarms = SpikeDetector(), 0.0, 0
    for _ in range(10_000):
        level = 0.9 * level + generator.gauss(0, 0.4 * math.sqrt(1 - 0.81))
        alarms += detector.update(math.exp(level))
    assert alarms <= 20


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
@given(st.lists(st.sampled_from([math.nan, math.inf, -1.0, 0.0, None]), min_size=60, max_size=120))
def test_nonfinite_values_do_not_change_later_results(stream: list[float | None]) -> None:
    generator = random.Random(3)
    with_bad, without = SpikeDetector(min_history=8), SpikeDetector(min_history=8)
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
