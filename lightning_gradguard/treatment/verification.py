"""Verifies a treatment on fresh seeds: the program is cured if the treated one learns with each of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.detectors.diagnosis.progress import LEARNS
from lightning_gradguard.treatment.learning import Learning, learning_of
from lightning_gradguard.treatment.search import LEAST_RUNG, TrialRunner, noise_of
from lightning_gradguard.treatment.trials.trial import OUT_OF_TIME, Job, Trial

#: Seeds of the verification, and how far they are from those of the search.
N_SEEDS, FIRST_SEED = 3, 101
#: Time that a run may take over what it took in the search.
RESERVE = 1.2

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


def whole_length(runner: TrialRunner) -> int:
    """Returns the optimizer steps of the program's own run; those of a trial if they are unknown."""
    return runner.program.planned or runner.steps


def share_of(runner: TrialRunner, seconds_per_step: float) -> float:
    """Returns the share of the budget that a verification at the whole length takes."""
    steps = whole_length(runner)
    needed = (_LONG * steps + _SHORT * runner.short_steps) * seconds_per_step * RESERVE
    return needed / _lanes(runner) / runner.clock.budget


def verify(runner: TrialRunner, trial: Trial, until: float) -> list[SeedResult]:
    """Runs the changes of a trial, and the program as it is, with fresh seeds.

    The treated runs have the length of the program's own run, or what the budget allows of it: what trains
    for a while may fail later. So has the program as it is with the first seed; with the others, which show
    how far seeds are apart, it has that of a short trial. If the first treated run does not learn, the
    others are omitted.

    Returns:
        Fewer than three if the budget ends before, or the first treated run does not learn.
    """
    steps = _length(runner, trial, until)
    short = min(runner.short_steps, steps)
    first, *others = (runner.program.seed + FIRST_SEED + i for i in range(N_SEEDS))
    changes = trial.job.changes
    jobs = [Job(changes, first, steps), Job(None, first, steps)]
    n_first = min(runner.processes, 2)
    found = _run(runner, jobs[:n_first], until)
    treated = found.get(jobs[0].key)
    if treated is None or not math.isfinite(treated.loss) or treated.over_constant >= LEARNS:
        return []
    jobs += [Job(changes, seed, steps) for seed in others] + [Job(None, seed, short) for seed in others]
    found |= _run(runner, jobs[n_first:], until)
    pairs = [(jobs[1], jobs[0]), *((Job(None, s, short), Job(changes, s, steps)) for s in others)]
    return [SeedResult(found[a.key], found[b.key]) for a, b in pairs if a.key in found and b.key in found]


#: Runs of the whole length, and short ones.
_LONG, _SHORT = N_SEEDS + 1, N_SEEDS - 1


def _length(runner: TrialRunner, trial: Trial, until: float) -> int:
    """Returns the steps of the treated runs: the whole length, or what the budget allows."""
    left = runner.clock.share(until) - time.monotonic()
    affordable = int(left * _lanes(runner) / (trial.seconds / trial.job.steps * RESERVE))
    whole, short = whole_length(runner), runner.short_steps
    if affordable >= _LONG * whole + _SHORT * short:
        return whole
    seed = runner.program.seed + FIRST_SEED
    # what was verified before the treatment was stopped is not run again for a few steps more or less
    known = [t.job.steps for t in runner.log.trials.values() if t.job.seed == seed]
    steps = max((affordable - _SHORT * short) // _LONG, LEAST_RUNG)
    return next((n for n in known if 0.5 * steps <= n), min(steps, whole))


def _lanes(runner: TrialRunner) -> int:
    """Returns how many of the runs are at once, with two or more processes."""
    return min(runner.processes, 2)


def _run(runner: TrialRunner, jobs: Sequence[Job], until: float) -> dict[str, Trial]:
    return {t.job.key: t for t in runner.run(jobs, until) if not is_unfinished(t)}


def is_unfinished(trial: Trial) -> bool:
    """True if the budget has ended a trial."""
    return trial.error == OUT_OF_TIME


def verdict_of(results: Sequence[SeedResult], whole: int) -> tuple[TreatmentVerdict, str]:
    """Returns the verdict of a verification, and its evidence.

    *Cured*: with each of three fresh seeds, in a run of the whole length, the held-out loss of the treated
    run is far below that of the best constant answer, is not on its way up, has settled, and is below that of
    the untreated run by more than these differ between seeds; with at most two seeds, it may equal that of an
    untreated run that learns as well. *Better*: with each seed the treated run learns, and beats the
    untreated one by more than that, also if the budget has allowed two seeds alone, or shorter runs.

    Args:
        results: Of the fresh seeds.
        whole: Optimizer steps of the program's own run.
    """
    missing = N_SEEDS - len(results)
    if missing > 1:
        return "no_treatment_found", f"{len(results)} of {N_SEEDS} fresh seeds were run"
    failing = [r.untreated for r in results if not learning_of(r.untreated).has_learned]
    noise = noise_of(failing or [r.untreated for r in results])
    beats = [r.beats(noise) for r in results]
    learned = [r.learning.has_learned and r.learning.is_settled for r in results]
    steps = min(r.treated.job.steps for r in results)
    each = "; ".join(
        f"seed {r.treated.job.seed}: {_loss(r.treated)} treated, {_loss(r.untreated)} untreated"
        + (f" (after {r.untreated.job.steps} steps)" if r.untreated.job.steps != steps else "")
        for r in results
    )
    evidence = f"held-out loss after {steps} steps: {each}; seed noise {noise:.2g}"
    if missing:
        evidence += f"; the budget has allowed {len(results)} of {N_SEEDS} fresh seeds"
    slow = next((r.learning for r in results if r.learning.has_learned and not r.learning.is_settled), None)
    if steps < whole:
        evidence += f"; the budget has allowed {steps} of the {whole} steps of your run: better so far"
    elif slow is not None:
        evidence += f"; {slow.evidence}: a longer run learns more"
    is_better = all(b or r.keeps(noise) for b, r in zip(beats, results, strict=True)) and any(beats)
    if all(learned) and is_better and not missing and steps >= whole:
        return "cured", f"{evidence}. With the last seed, {results[-1].learning.evidence}"
    if all(beats) and not any(r.treated.over_constant >= LEARNS for r in results):
        return "better", evidence
    return "no_treatment_found", evidence


def _loss(trial: Trial) -> str:
    return f"{trial.loss:.4g}" if math.isfinite(trial.loss) else "nonfinite"
