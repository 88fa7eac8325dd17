"""Verifies a treatment on fresh seeds: the program is cured if the treated one learns with each of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.treatment.learning import LEARNS, Learning, learning_of
from lightning_gradguard.treatment.search import LEAST_RUNG, Laboratory, noise_of
from lightning_gradguard.treatment.trials.trial import OUT_OF_TIME, Job, Trial

#: Seeds of the verification, and how far they are from those of the search.
N_SEEDS, FIRST_SEED = 3, 101
#: Time that a run may take over what it took in the search.
RESERVE = 1.2
#: Length of the second verification over that of the first, at least.
LONGER = 1.5

TreatmentVerdict = Literal["healthy", "cured", "better", "no_treatment_found"]


@dataclass(frozen=True)
class SeedResult:
    """Runs with one fresh seed.

    Args:
        untreated: Without changes.
        treated: With them.
    """

    untreated: Trial
    treated: Trial

    @property
    def learning(self) -> Learning:
        """The extent to which the treated run has learned."""
        return learning_of(self.treated)

    def beats(self, noise: float) -> bool:
        """True if the treated run is better by more than a difference between seeds."""
        return self.treated.loss < self.untreated.loss - noise

    def keeps(self, noise: float) -> bool:
        """True if the untreated run learns with this seed, and the treated one as well."""
        return learning_of(self.untreated).has_learned and self.treated.loss <= self.untreated.loss + noise


def verify(laboratory: Laboratory, trial: Trial, until: float) -> list[SeedResult]:
    """Runs the changes of a trial, and the program as it is, with fresh seeds.

    They run for as many steps as the trial, or for fewer if the budget does not suffice for all. If the
    treated runs are better then, and the program's own run is longer, all run again for as many steps as
    that, or as the budget allows: what trains for a while may fail later.

    Returns:
        Fewer than three if the budget ends before.
    """
    short = min(trial.job.steps, max(_affordable(laboratory, trial, until), LEAST_RUNG))
    results = _run(laboratory, trial.job.changes, short, until)
    steps = min(laboratory.program.planned, _affordable(laboratory, trial, until))
    is_promising = all(r.beats(0.0) for r in results) and len(results) == N_SEEDS
    if is_promising and steps >= LONGER * short:
        longer = _run(laboratory, trial.job.changes, steps, until)
        return longer if len(longer) == N_SEEDS else results
    return results


def _affordable(laboratory: Laboratory, trial: Trial, until: float) -> int:
    """Returns the steps for which all runs of a verification fit into the budget."""
    left = laboratory.clock.share(until) - time.monotonic()
    rounds = 2 * N_SEEDS / min(laboratory.processes, 2 * N_SEEDS)
    return int(left / (rounds * trial.seconds / trial.job.steps * RESERVE))


def _run(
    laboratory: Laboratory, changes: tuple[Change, ...] | None, steps: int, until: float
) -> list[SeedResult]:
    seeds = [laboratory.program.seed + FIRST_SEED + i for i in range(N_SEEDS)]
    known = {t.job.steps for t in laboratory.log.trials.values() if t.job.seed in seeds}
    # what was verified before the treatment was stopped is not run again for a few steps more or less
    steps = next((n for n in known if 0.5 * steps <= n <= 1.5 * steps), steps)
    jobs = [Job(one, seed, steps) for seed in seeds for one in (changes, None)]
    found = {t.job.key: t for t in laboratory.run(jobs, until) if not is_unfinished(t)}
    pairs = [(Job(None, s, steps).key, Job(changes, s, steps).key) for s in seeds]
    return [SeedResult(found[a], found[b]) for a, b in pairs if a in found and b in found]


def is_unfinished(trial: Trial) -> bool:
    """True if the budget has ended a trial."""
    return trial.error == OUT_OF_TIME


def verdict_of(results: Sequence[SeedResult]) -> tuple[TreatmentVerdict, str]:
    """Returns the verdict of a verification, and its evidence.

    *Cured*: with each of three fresh seeds the held-out loss of the treated run is well below that of the
    best constant answer, is not on its way up, and is below that of the untreated run by more than these
    differ between seeds; with at most two seeds, it may equal that of an untreated run that learns as well.
    *Better*: with each seed the treated run learns, and beats the untreated one by more than that, also if
    the budget has allowed two seeds alone.
    """
    missing = N_SEEDS - len(results)
    if missing > 1:
        return "no_treatment_found", f"the budget has allowed {len(results)} of {N_SEEDS} fresh seeds"
    failing = [r.untreated for r in results if not learning_of(r.untreated).has_learned]
    noise = noise_of(failing or [r.untreated for r in results])
    beats = [r.beats(noise) for r in results]
    learned = [r.learning.has_learned for r in results]
    evidence = "; ".join(
        f"seed {r.treated.job.seed}: {_loss(r.treated)} treated, {_loss(r.untreated)} untreated"
        for r in results
    )
    steps = max((r.treated.job.steps for r in results), default=0)
    evidence = f"held-out loss after {steps} steps: {evidence}; seed noise {noise:.2g}"
    if missing:
        evidence += f"; the budget has allowed {len(results)} of {N_SEEDS} fresh seeds"
    elif (
        all(learned) and any(beats) and all(b or r.keeps(noise) for b, r in zip(beats, results, strict=True))
    ):
        return "cured", f"{evidence}. With the last seed, {results[-1].learning.evidence}"
    if all(beats) and not any(r.treated.over_constant >= LEARNS for r in results):
        return "better", evidence
    return "no_treatment_found", evidence


def _loss(trial: Trial) -> str:
    return f"{trial.loss:.4g}" if math.isfinite(trial.loss) else "nonfinite"
