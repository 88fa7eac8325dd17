"""A lasting condition raises one alarm an episode."""

from __future__ import annotations

from lightning_gradguard.core.detectors import Persistence


def test_one_alarm_for_each_episode() -> None:
    persistence = Persistence(steps=4, checks=2)
    holds = [True] * 8 + [False] * 6 + [True] * 6
    alarms = [persistence.update(step, hold) for step, hold in enumerate(holds)]
    assert [step for step, alarm in enumerate(alarms) if alarm] == [4, 18]


def test_intermittent_condition_raises_no_alarm() -> None:
    persistence = Persistence(steps=2, checks=2)
    assert not any(persistence.update(step, step % 2 == 0) for step in range(50))
