"""Trials are run within a budget, and it is known whether the budget has kept one from its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gradguard.treatment.budget import Clock
from lightning_gradguard.treatment.search import TrialRunner
from lightning_gradguard.treatment.trials.program import recorded_program
from lightning_gradguard.treatment.trials.trial import Job
from lightning_gradguard.treatment.trials.trial_log import TrialLog
from tests.treatment.programs import SHORT, Data, Net


@pytest.mark.parametrize(("until", "is_cut"), [(1.0, False), (0.0, True)])
def test_budget_has_ended_only_if_a_trial_was_cut(tmp_path: Path, until: float, is_cut: bool) -> None:
    clock = Clock(60.0)
    program = recorded_program(Net, Data(), SHORT, 0, 4, clock.share(1.0))
    runner = TrialRunner(program, TrialLog(tmp_path / "trials.jsonl", {}, 4), clock, 1, 4, lambda _: None)
    runner.run([Job((), 0, 4)], until)
    assert runner.was_cut == is_cut
