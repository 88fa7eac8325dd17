"""The verdict of a verification rests on three fresh seeds, and on runs as long as the program's own."""

from __future__ import annotations

import pytest

from lightning_gradguard import Change
from lightning_gradguard.treatment.trials.trial import Job, Trial
from lightning_gradguard.treatment.verification import SeedResult, verdict_of

CHANGES = (Change("initialize"),)
WHOLE = 400


def trial(seed: int, loss: float, steps: int, *, treated: bool, before: float | None = None) -> Trial:
    """A run from a loss of 2.3, that of the best constant answer, past another after two thirds."""
    curve = [(0, 2.3), (steps * 2 // 3 + 1, loss if before is None else before), (steps, loss)]
    return Trial(job=Job(CHANGES if treated else None, seed, steps), curve=curve, over_constant=loss / 2.3)


def results(
    treated: list[float], untreated: list[float], steps: int = WHOLE, before: float | None = None
) -> list[SeedResult]:
    return [
        SeedResult(
            trial(seed, bare, 60, treated=False), trial(seed, after, steps, treated=True, before=before)
        )
        for seed, (after, bare) in enumerate(zip(treated, untreated, strict=True))
    ]


def test_program_is_cured_that_learns_with_each_seed() -> None:
    verdict, evidence = verdict_of(results([0.3, 0.4, 0.2], [2.3, 2.31, 2.29]), WHOLE)
    assert verdict == "cured"
    assert "after 400 steps: seed 0: 0.3 treated, 2.3 untreated (after 60 steps)" in evidence


@pytest.mark.parametrize("treated", [[0.3, 0.4, 1.4], [0.3, 0.4, 2.3]])
def test_one_seed_that_has_not_learned_is_no_cure(treated: list[float]) -> None:
    assert verdict_of(results(treated, [2.3, 2.31, 2.29]), WHOLE)[0] != "cured"


def test_runs_shorter_than_the_own_are_better_so_far() -> None:
    verdict, evidence = verdict_of(results([0.3, 0.4, 0.2], [2.3, 2.31, 2.29], steps=150), WHOLE)
    assert verdict == "better"
    assert "the budget has allowed 150 of the 400 steps of your run: better so far" in evidence


def test_loss_that_has_risen_is_no_cure() -> None:
    assert verdict_of(results([1.1] * 3, [2.3, 2.31, 2.29], before=0.5), WHOLE)[0] == "better"


def test_loss_that_still_falls_is_no_cure() -> None:
    verdict, evidence = verdict_of(results([1.0] * 3, [2.3, 2.31, 2.29], before=1.6), WHOLE)
    assert verdict == "better"
    assert "still falls, from 1.6 after two thirds of the run: a longer run learns more" in evidence


def test_seed_with_which_the_program_learns_by_itself_may_be_equalled() -> None:
    assert verdict_of(results([0.3, 0.4, 0.2], [2.3, 0.4, 2.29]), WHOLE)[0] == "cured"
    assert verdict_of(results([0.3, 0.4, 0.2], [0.3, 0.4, 0.2]), WHOLE)[0] == "no_treatment_found"


def test_two_seeds_are_better_at_most_and_one_is_nothing() -> None:
    found = results([0.3, 0.4], [2.3, 2.31])
    assert verdict_of(found, WHOLE)[0] == "better"
    assert verdict_of(found[:1], WHOLE)[0] == "no_treatment_found"
    assert verdict_of([], WHOLE)[0] == "no_treatment_found"
