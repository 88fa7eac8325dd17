"""Trials are run within a budget, and it is known whether the budget has kept one from its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from lightning_gradguard import Change
from lightning_gradguard.treatment.budget import Clock
from lightning_gradguard.treatment.candidates import Candidate
from lightning_gradguard.treatment.search import TrialRunner, search, with_needed_changes
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


def test_a_budget_that_allowed_no_trial_sets_no_length_of_later_ones(tmp_path: Path) -> None:
    TrialLog(tmp_path / "trials.jsonl", {}, 22)
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    assert (log.steps, log.was_resumed) == (150, False)
    clock = Clock(60.0)
    program = recorded_program(Net, Data(), SHORT, 0, 4, clock.share(1.0))
    TrialRunner(program, log, clock, 1, 4, lambda _: None).run([Job((), 0, 4)], 1.0)
    assert TrialLog(tmp_path / "trials.jsonl", {}, 22).steps == 150


LOWER, LOWEST = ((Change("learning_rate", {"scale": scale}),) for scale in (0.1, 0.01))
INITIALIZED = (Change("initialize"),)
FAILS = Trial(job=Job(None, 0, 60), curve=[(0, 2.3), (60, 2.3)], over_constant=1.0, is_likelihood=True)


@pytest.mark.parametrize(
    ("best", "adopted"), [(LOWER, LOWEST), ((*INITIALIZED, Change("add_normalization")), INITIALIZED)]
)
def test_of_changes_that_have_learned_enough_the_smallest_is_adopted(
    tmp_path: Path, best: tuple[Change, ...], adopted: tuple[Change, ...]
) -> None:
    """A short trial is best at a rate that is too high for a whole run."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), SHORT, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 2, 150, lambda _: None)
    for changes, loss in ((best, 0.08), (adopted, 0.3)):
        job = runner.short_job(changes, 0)
        log.add(Trial(job=job, curve=[(0, 2.3), (60, loss)], over_constant=loss / 2.3, is_likelihood=True))
    found = search(runner, [Candidate(changes, "") for changes in (best, adopted)], FAILS, 2.3, 1.0)
    assert [trial.job.changes for trial in found] == [adopted, best]


def test_at_a_deadline_the_note_counts_what_was_recorded() -> None:
    class Alone(Data):
        val_dataloader = None  # type: ignore[assignment]

    program = recorded_program(Net, Alone(), SHORT, 0, 4, -math.inf)
    assert program.batches.notes == (
        "One batch was recorded and no validation data: its own loss is measured.",
    )


def test_of_changes_that_have_not_learned_the_best_is_verified_first(tmp_path: Path) -> None:
    """Narrow networks learn little in a trial: smaller changes, with more, took a whole run each."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 60)
    program = recorded_program(Net, Data(), SHORT, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 2, 60, lambda _: None)
    larger, smaller = (Change("add_normalization"), Change("add_residual")), INITIALIZED
    for changes, loss in ((larger, 1.70), (smaller, 1.71), ((*larger, *INITIALIZED), 1.8)):
        for job in (runner.short_job(changes, 0), Job(changes, 0, 60)):
            log.add(
                Trial(job=job, curve=[(0, 2.3), (60, loss)], over_constant=loss / 2.3, is_likelihood=True)
            )
    found = search(runner, [Candidate(changes, "") for changes in (larger, smaller)], FAILS, 2.3, 1.0)
    assert [trial.job.changes for trial in found][:2] == [larger, smaller]


@pytest.mark.parametrize(("alone", "kept"), [(2.3, INITIALIZED), (0.31, ())])
def test_change_without_an_effect_of_its_own_is_omitted(
    tmp_path: Path, alone: float, kept: tuple[Change, ...]
) -> None:
    """Where clipping sets the length of the steps, a learning rate changes nothing."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), SHORT, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 1, 150, lambda _: None)
    for changes, loss in (((*INITIALIZED, *LOWER), 0.3), (INITIALIZED, 0.3), (LOWER, 2.3), ((), alone)):
        job = runner.short_job(changes, 0)
        log.add(Trial(job=job, curve=[(0, 2.3), (60, loss)], over_constant=loss / 2.3, is_likelihood=True))
    best = log.trials[runner.short_job((*INITIALIZED, *LOWER), 0).key]
    assert with_needed_changes(runner, best, 2.25, 1.0).job.changes == kept
    assert with_needed_changes(runner, best, 2.25, 1.0, may_be_empty=False).job.changes == INITIALIZED


def test_of_changes_with_which_nothing_is_learned_the_likeliest_are_run_for_longer(tmp_path: Path) -> None:
    """An LSTM at a thousandth of its rate needs more steps than a short trial has at any rate."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), SHORT, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 1, 150, lambda _: None)
    offered = [*((Change("learning_rate", {"scale": scale}),) for scale in (1e3, 1e2, 10.0)), INITIALIZED]
    for n, changes in enumerate(offered):
        for job, loss in ((runner.short_job(changes, 0), 2.29 - 1e-3 * n), (Job(changes, 0, 150), 0.3)):
            log.add(
                Trial(job=job, curve=[(0, 2.3), (60, loss)], over_constant=loss / 2.3, is_likelihood=True)
            )
    found = search(runner, [Candidate(changes, "") for changes in offered], FAILS, 2.3, 1.0)
    assert [trial.job.changes for trial in found] == [offered[0]]


@pytest.mark.parametrize(("learned", "n_tried"), [(1.6, 1), (0.9, 2)])
def test_search_ends_once_the_program_fails_beside_a_short_trial(
    tmp_path: Path, learned: float, n_tried: int
) -> None:
    """So it does if the program itself learns a part, and far less than the trial."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), SHORT, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 1, 150, lambda _: None)
    probed = replace(FAILS, curve=[(0, 2.3), (60, learned)], over_constant=learned / 2.3)
    asked: list[Job] = []

    def run(jobs: Iterable[Job], _: float) -> list[Trial]:
        asked.extend(jobs)
        return [replace(FAILS, job=job, curve=[(0, 2.3), (60, 0.8)], over_constant=0.35) for job in jobs]

    runner.run = run  # type: ignore[method-assign, assignment]
    search(runner, [Candidate(changes, "") for changes in (LOWER, INITIALIZED)], probed, 2.3, 1.0, 2.0)
    assert len([job for job in asked if job.steps == runner.short_steps]) == n_tried


def test_whole_run_in_which_updates_are_too_large_is_not_undisturbed() -> None:
    program = recorded_program(partial(Net, rate=1.0), Data(), SHORT, 0, 60, math.inf)
    assert not run(program, Job((), 0, 60), math.inf).is_undisturbed


class Lagging(Net):
    """Its running statistics are far behind, as those of many normalizations are in the first steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(0, nn.BatchNorm1d(8, momentum=1e-6))
        self.net[0].running_mean.fill_(30.0)  # type: ignore[operator]


def test_what_is_learned_in_training_mode_is_followed_while_statistics_lag() -> None:
    program = recorded_program(Lagging, Data(), SHORT, 0, 60, math.inf)
    trial = run(program, Job((), 0, 60, patience=30), math.inf)
    assert trial.curve[-1][0] == 60
