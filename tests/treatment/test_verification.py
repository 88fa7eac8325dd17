"""The verdict of a verification rests on three fresh seeds, and on runs as long as the program's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_gradguard import Change
from lightning_gradguard.treatment.budget import Clock
from lightning_gradguard.treatment.learning import learned_enough, learning_of, overfits, settled_loss
from lightning_gradguard.treatment.search import TrialRunner
from lightning_gradguard.treatment.trials.program import recorded_program
from lightning_gradguard.treatment.trials.trial import OUT_OF_TIME, Job, Trial
from lightning_gradguard.treatment.trials.trial_log import TrialLog
from lightning_gradguard.treatment.verification import SeedResult, Verification, unverified, verdict_of
from tests.treatment.programs import Data, Net

CHANGES = (Change("initialize"),)
WHOLE = 400


def trial(job: Job, loss: float, *, before: float | None = None, is_likelihood: bool = False) -> Trial:
    """A run from a loss of 2.3, that of the best constant answer, past another after two thirds."""
    curve = [(0, 2.3), (job.steps * 2 // 3 + 1, loss if before is None else before), (job.steps, loss)]
    return Trial(job=job, curve=curve, over_constant=loss / 2.3, is_likelihood=is_likelihood)


def results(
    treated: list[float],
    untreated: list[float],
    steps: int = WHOLE,
    before: float | None = None,
    probed: int = WHOLE,
) -> list[SeedResult]:
    """The first seed beside a probe of some steps; the others, which may end early, beside short runs."""
    found = []
    for seed, (after, bare) in enumerate(zip(treated, untreated, strict=True), 101):
        job = Job(CHANGES, seed, steps, None if seed == 101 else 0.575)
        beside = Job(None, 0, probed) if seed == 101 else Job(None, seed, 60)
        found.append(SeedResult(trial(beside, bare), trial(job, after, before=before)))
    return found


def test_program_is_cured_that_learns_with_each_seed() -> None:
    verdict, evidence = verdict_of(results([0.3, 0.4, 0.2], [2.3, 2.31, 2.29]), WHOLE)
    assert verdict == "cured"
    assert "seed 101: treated 0.3 after 400 steps, untreated 2.3 after 400 steps (seed 0); " in evidence
    assert "seed 102: treated 0.4 after 400 steps, when it had learned, untreated 2.31 after 60" in evidence


def test_program_that_was_not_run_to_its_end_is_not_known_to_fail() -> None:
    verdict, evidence = verdict_of(results([0.3, 0.4, 0.2], [2.3, 2.31, 2.29], probed=100), WHOLE)
    assert verdict == "better"
    assert evidence.endswith("; not cured, as no untreated runs of the whole length were made")
    assert verdict_of(results([0.3, 0.4, 0.2], [0.3, 2.31, 2.29]), WHOLE)[0] != "cured"


@pytest.mark.parametrize(
    ("logged", "over_permuted", "expected"),
    [
        ({"val_acc": 0.959, "val_loss": 59.0}, 0.03, "better"),
        ({"accuracy": 0.6}, 0.03, "cured"),
        ({"accuracy": 0.95}, 1.0, "cured"),  # the frequent class alone
        ({"val_accuracy": 0.95, "recall": 0.2}, 0.03, "cured"),
        ({"val_loss": 59.0, "lr": 0.1}, 0.03, "cured"),
    ],
)
def test_program_that_is_as_good_by_its_own_score_does_not_fail(
    logged: dict[str, float], over_permuted: float, expected: str
) -> None:
    first, *rest = results([0.1, 0.2, 0.2], [59.0, 2.31, 2.29])
    good = dict.fromkeys(logged, 0.962)
    beside = replace(first.untreated, metrics=logged, over_permuted=over_permuted)
    pairs = [SeedResult(beside, replace(first.treated, metrics=good)), *rest]
    verdict, evidence = verdict_of(pairs, WHOLE)
    assert verdict == expected, evidence
    says = "; val_acc 0.959 untreated and 0.962 treated: by that the program does not fail"
    assert (says in evidence) == (expected == "better")


@pytest.mark.parametrize("treated", [[0.3, 0.4, 1.4], [0.3, 0.4, 2.3]])
def test_one_seed_that_has_not_learned_is_no_cure(treated: list[float]) -> None:
    assert verdict_of(results(treated, [2.3, 2.31, 2.29]), WHOLE)[0] != "cured"


def test_runs_shorter_than_the_own_are_better_so_far() -> None:
    verdict, evidence = verdict_of(results([0.3, 0.4, 0.2], [2.3, 2.31, 2.29], steps=150), WHOLE)
    assert verdict == "better"
    assert "the budget has allowed 150 of the 400 steps of your run: better so far" in evidence
    verdict, evidence = verdict_of(results([2.2, 0.4, 0.2], [2.3, 2.31, 2.29], steps=150), WHOLE)
    assert verdict == "no_treatment_found"
    assert (
        "the budget has allowed 150 of the 400 steps of your run; not learned with seed 101: the" in evidence
    )


@pytest.mark.parametrize(("ratio", "verdict"), [(0.94, "no_treatment_found"), (0.75, "better")])
def test_loss_of_ones_own_is_compared_with_that_of_permuted_targets(ratio: float, verdict: str) -> None:
    found = [
        SeedResult(r.untreated, replace(r.treated, over_constant=math.nan, over_permuted=ratio))
        for r in results([6.3, 11.0, 9.6], [math.inf] * 3)
    ]
    assert verdict_of(found, WHOLE)[0] == verdict


def test_loss_that_has_risen_is_no_cure() -> None:
    verdict, evidence = verdict_of(results([1.1] * 3, [2.3, 2.31, 2.29], before=0.5), WHOLE)
    assert verdict == "better"
    assert "; not cured, as with seed 101, the held-out loss is 1.1, " in evidence


@pytest.mark.parametrize(
    ("loss", "is_likelihood", "expected"),
    [(0.4, True, "cured"), (0.4, False, "better"), (0.2, False, "cured"), (0.8, True, "better")],
)
def test_what_falls_by_a_quarter_is_no_cure_unless_little_is_left(
    loss: float, is_likelihood: bool, expected: str
) -> None:
    """Of values, a fifth of the loss that is left is a fifth of the variance."""
    found = [
        SeedResult(r.untreated, trial(r.treated.job, loss, before=1.3 * loss, is_likelihood=is_likelihood))
        for r in results([loss] * 3, [2.3, 2.31, 2.29])
    ]
    assert verdict_of(found, WHOLE)[0] == expected


def test_loss_that_still_falls_is_no_cure() -> None:
    verdict, evidence = verdict_of(results([1.0] * 3, [2.3, 2.31, 2.29], before=1.6), WHOLE)
    assert verdict == "better"
    assert "still falls, from 1.6 after two thirds of the run: a longer run learns more" in evidence


def test_seed_with_which_the_program_learns_by_itself_may_be_equalled() -> None:
    assert verdict_of(results([0.3, 0.4, 0.2], [2.3, 0.4, 2.29]), WHOLE)[0] == "cured"
    assert verdict_of(results([0.3, 0.4, 0.2], [0.3, 0.4, 0.2]), WHOLE)[0] == "no_treatment_found"


def halfway(treated: list[float], untreated: list[float], is_likelihood: bool = True) -> list[SeedResult]:
    """Whole runs with each seed of a program that learns, and of the same with changes."""
    return [
        SeedResult(
            trial(Job(None, seed, WHOLE), bare, is_likelihood=is_likelihood),
            trial(Job(CHANGES, seed, WHOLE), after, is_likelihood=is_likelihood),
        )
        for seed, (after, bare) in enumerate(zip(treated, untreated, strict=True), 101)
    ]


@pytest.mark.parametrize("is_likelihood", [True, False])
def test_program_that_learns_halfway_is_cured_by_what_leaves_far_less(is_likelihood: bool) -> None:
    assert verdict_of(halfway([0.2] * 3, [0.8, 0.82, 0.79], is_likelihood), WHOLE)[0] == "cured"
    assert verdict_of(halfway([0.5] * 3, [0.8, 0.82, 0.79], is_likelihood), WHOLE)[0] != "cured"


def test_program_that_is_right_as_often_is_not_cured_by_a_lower_loss() -> None:
    assert verdict_of(halfway([0.1] * 3, [0.3, 0.31, 0.29]), WHOLE)[0] != "cured"


def test_one_seed_of_three_that_learns_halfway_is_chance() -> None:
    assert verdict_of(halfway([0.2] * 3, [0.8, 0.2, 0.2]), WHOLE)[0] != "cured"
    assert verdict_of(halfway([0.2] * 3, [0.8, 0.2, 0.8]), WHOLE)[0] == "cured"


def test_noise_is_measured_after_the_same_steps() -> None:
    probed = trial(Job(None, 0, WHOLE), 1.6)  # at 2.3 after 60 steps, as the others are
    found = results([0.3, 0.4, 0.2], [2.3, 2.31, 2.29])
    verdict, evidence = verdict_of([SeedResult(probed, found[0].treated), *found[1:]], WHOLE)
    assert verdict == "cured"
    assert "seed noise 0.046" in evidence


def test_untreated_runs_without_a_finite_loss_have_no_noise() -> None:
    assert "seed noise" not in verdict_of(results([0.3, 0.4, 0.2], [math.nan] * 3), WHOLE)[1]


def test_how_far_untreated_runs_diverge_is_no_noise_between_seeds() -> None:
    verdict, evidence = verdict_of(results([0.3, 0.4, 0.2], [14.0, 5.0, 3.0]), WHOLE)
    assert verdict == "cured"
    assert "seed noise 0.046" in evidence


def test_two_seeds_are_better_at_most_and_one_is_nothing() -> None:
    found = results([0.3, 0.4], [2.3, 2.31])
    assert verdict_of(found, WHOLE)[0] == "better"
    assert verdict_of(found[:1], WHOLE)[0] == "no_treatment_found"
    assert verdict_of([], WHOLE)[0] == "no_treatment_found"


@pytest.mark.parametrize("incidents", [{}, {"exploding_gradient": 1}])
def test_what_explodes_is_run_to_its_end_with_each_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, incidents: dict[str, int]
) -> None:
    """A rate that is too high learns for a while."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), {"max_steps": WHOLE}, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 1, 150, lambda _: None)
    asked: list[Job] = []
    monkeypatch.setattr(runner, "run", lambda jobs, _: asked.__iadd__(jobs)[:0])
    probed, first = trial(Job(None, 0, WHOLE), 2.3), trial(Job(CHANGES, 101, WHOLE), 0.3)
    Verification(runner, probed, 1.0).others(replace(first, incidents=incidents))
    ends_early = [job.enough is not None for job in asked if job.changes]
    assert ends_early == [not incidents] * 2
    assert all(job.steps < WHOLE for job in asked if not job.changes)
    Verification(runner, probed, 1.0, has_luck=True).others(first)
    assert [job.steps for job in asked[-2:]] == [WHOLE] * 2, "it has learned with another seed"


def test_program_that_learns_in_a_short_run_of_another_seed_is_run_to_its_end(tmp_path: Path) -> None:
    """Layers with normalization behind the sum learn in some tens of steps, and lose it."""
    log = TrialLog(tmp_path / "trials.jsonl", {}, 150)
    program = recorded_program(Net, Data(), {"max_steps": WHOLE}, 0, 4, math.inf)
    runner = TrialRunner(program, log, Clock(60.0), 1, 150, lambda _: None)

    def run(jobs: Iterable[Job], _: float) -> list[Trial]:
        return [trial(job, 0.2 if job.changes else 2.3 if job.steps == WHOLE else 0.6) for job in jobs]

    runner.run = run  # type: ignore[method-assign, assignment]
    verification = Verification(runner, trial(Job(None, 0, WHOLE), 2.3), 1.0)
    found = verification.others(trial(Job(CHANGES, 101, WHOLE), 0.2))
    assert [r.untreated.job.steps for r in found] == [WHOLE] * 3
    assert verdict_of(found, WHOLE)[0] == "cured"


def test_loss_that_is_low_enough_is_that_of_the_first_seed_or_a_quarter_of_the_best_constant_answer() -> None:
    assert settled_loss(trial(Job(CHANGES, 101, WHOLE), 0.3)) == pytest.approx(0.25 * 2.3)
    assert settled_loss(trial(Job(CHANGES, 101, WHOLE), 0.9)) == pytest.approx(0.9)
    assert settled_loss(trial(Job(CHANGES, 101, WHOLE), math.nan)) is None


def test_loss_that_explodes_has_three_digits() -> None:
    assert "6.19e+24 times that of" in learning_of(trial(Job(None, 0, 40), 1.423e25)).evidence


@pytest.mark.parametrize(("is_likelihood", "is_enough"), [(True, True), (False, False)])
def test_fifth_of_the_loss_is_enough_for_classes_and_not_for_values(
    is_likelihood: bool, is_enough: bool
) -> None:
    """It is nine of ten classes that are right, and four fifths of the variance."""
    run = trial(Job(CHANGES, 0, WHOLE), 0.2 * 2.3, is_likelihood=is_likelihood)
    assert learned_enough(run) == is_enough


def test_a_better_trial_is_unverified_until_it_was_run_with_a_fresh_seed() -> None:
    probed, short = trial(Job(None, 0, WHOLE), 2.2), trial(Job(CHANGES, 0, 60), 0.4)
    cut = replace(trial(Job(CHANGES, 0, 150), 0.3), error=OUT_OF_TIME)
    assert unverified([trial(Job((), 0, 60), 2.19), short, cut], probed) is short
    fresh, other = trial(Job(CHANGES, 101, WHOLE), 2.2), Job((Change("add_normalization"),), 0, 60)
    assert unverified([short, fresh], probed) is None
    assert unverified([short, fresh, trial(other, 0.9)], probed) is None, "worse than one that has failed"


@pytest.mark.parametrize(("training", "is_overfit"), [(0.2, True), (2.2, False)])
def test_loss_that_rises_on_held_out_batches_alone_is_that_of_a_run_that_overfits(
    training: float, is_overfit: bool
) -> None:
    """A run that diverges loses it on the batches of training, too."""
    run = replace(
        trial(Job(None, 0, 400), 2.4, before=1.7),
        training=[(step, 1.0 if step <= 300 else training) for step in range(10, 410, 10)],
    )
    assert overfits(run) == is_overfit
    assert (
        "has risen from 1.7, while that of training batches falls: it overfits" in learning_of(run).evidence
    ) == is_overfit
