"""Trials are run within a budget, and it is known whether the budget has kept one from its steps."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest

from lightning_gradguard import Change
from lightning_gradguard.treatment.budget import Clock
from lightning_gradguard.treatment.candidates import Candidate
from lightning_gradguard.treatment.search import TrialRunner, search
from lightning_gradguard.treatment.trials.program import recorded_program
from lightning_gradguard.treatment.trials.trial import Job, Trial, run
from lightning_gradguard.treatment.trials.trial_log import TrialLog
from tests.treatment.programs import SHORT, Data, Net


@pytest.mark.parametrize(("until", "is_cut"), [(1.0, False), (0.0, True)])
def test_budget_has_ended_only_if_a_trial_was_cut(tmp_path: Path, until: float, is_cut: bool) -> None:
    clock = Clock(60.0)
    program = recorded_program(Net, Data(), SHORT, 0, 4, clock.share(1.0))
    runner = TrialRunner(program, TrialLog(tmp_path / "trials.jsonl", {}, 4), clock, 1, 4, lambda _: None)
    runner.run([Job((), 0, 4)], until)
    assert runner.was_cut == is_cut


def test_of_two_rates_with_which_a_program_learns_the_lower_is_adopted(tmp_path: Path) -> None:
    """A short trial is best at a rate that is too high for a whole run."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), SHORT, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 2, 150, lambda _: None)
    tried = [(Change("learning_rate", {"scale": scale}),) for scale in (0.1, 0.01)]
    for changes, loss in zip(tried, (0.08, 0.3), strict=True):
        job = runner.short_job(changes, 0)
        log.add(Trial(job=job, curve=[(0, 2.3), (60, loss)], over_constant=loss / 2.3))
    found = search(runner, [Candidate(changes, "") for changes in tried], 2.3, 1.0)
    assert [trial.job.changes for trial in found] == [tried[1]]


def test_whole_run_in_which_updates_are_too_large_is_not_undisturbed() -> None:
    program = recorded_program(partial(Net, rate=1.0), Data(), SHORT, 0, 60, math.inf)
    assert not run(program, Job((), 0, 60), math.inf).is_undisturbed
