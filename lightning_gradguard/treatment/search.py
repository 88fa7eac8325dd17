"""Successive halving over candidates, and the combinations of the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.core.remedies.kinds import KINDS
from lightning_gradguard.treatment.budget import Clock
from lightning_gradguard.treatment.candidates import Candidate
from lightning_gradguard.treatment.learning import learning_of
from lightning_gradguard.treatment.trials.program import Program
from lightning_gradguard.treatment.trials.trial import Job, Trial, name_of
from lightning_gradguard.treatment.trials.trial_log import TrialLog
from lightning_gradguard.treatment.trials.workers import outcomes

#: Changes that are combined at most, combinations that are tried, and candidates that reach the full length.
MAX_COMBINED, MAX_COMBINATIONS, FINALISTS = 3, 3, 3
#: Share of the first rung in the full length, and its least steps.
FIRST_RUNG, LEAST_RUNG = 0.4, 60
FASTER = Change("learning_rate", {"scale": 10.0})
#: Noise between seeds is at least this share of the untreated loss.
LEAST_NOISE = 0.02
#: Share of what the best treatment gains by which a smaller change may be behind it.
BEHIND = 0.05


@dataclass
class Laboratory:
    """Runs jobs that the log does not have yet, within the budget.

    Args:
        program: What is trained.
        log: Of the trials.
        clock: Of the budget.
        processes: Trials at once.
        steps: Optimizer steps of a trial of full length.
        report: Takes a line on the progress.
    """

    program: Program
    log: TrialLog
    clock: Clock
    processes: int
    steps: int
    report: Callable[[str], None]

    def run(self, jobs: Iterable[Job], until: float) -> list[Trial]:
        """Runs jobs until a share of the budget is spent; returns their trials in the order of the jobs."""
        wanted = list({job.key: job for job in jobs}.values())
        missing = [job for job in wanted if job.key not in self.log.trials]
        for trial in outcomes(self.program, missing, self.clock.share(until), self.processes):
            self.log.add(trial)
            self.report(self._progress(trial))
        return [self.log.trials[job.key] for job in wanted if job.key in self.log.trials]

    def _progress(self, trial: Trial) -> str:
        seed = self.program.seed
        known = [t for t in self.log.trials.values() if t.job.changes is not None and t.job.seed == seed]
        best = min(known, key=lambda t: (-t.job.steps, t.loss), default=None)
        outcome = trial.error or f"held-out loss {trial.loss:.4g} at step {trial.job.steps}"
        line = f"{self.clock.spent:4.0f} s of {self.clock.budget:.0f} s, trial {len(self.log.trials)}: "
        line += f"{name_of(trial.job.changes)}: {outcome}"
        if best is not None:
            line += f"; best so far: {name_of(best.job.changes)}, {best.loss:.4g}"
        return line


def search(
    laboratory: Laboratory, candidates: Sequence[Candidate], untreated: float, until: float
) -> list[Trial]:
    """Tries candidates for some steps, the best of them for more, and combinations of these.

    Candidates of which one learns well end the first rung: those behind it are less likely, and cost as much.

    Args:
        laboratory: Runs the trials.
        candidates: The likeliest first.
        untreated: Held-out loss of the program as it is.
        until: Share of the budget at which the search ends.

    Returns:
        Trials of full length that are better than the program as it is, the one to adopt first.
    """
    seed, steps = laboratory.program.seed, laboratory.steps
    short = min(max(round(FIRST_RUNG * steps), LEAST_RUNG), steps)
    wave = max(laboratory.processes, 2)
    first: list[Trial] = []
    for start in range(0, len(candidates), wave):
        jobs = [Job(one.changes, seed, short) for one in candidates[start : start + wave]]
        first += laboratory.run(jobs, until)
        if any(_is_certain(trial) for trial in first):
            break
    ranked = sorted((t for t in first if not t.error), key=lambda t: t.loss)[:FINALISTS]
    if any(_is_certain(trial) for trial in ranked):
        ranked = [trial for trial in ranked if learning_of(trial).learns]
    full = laboratory.run([Job(t.job.changes, seed, steps) for t in ranked], until)
    if not any(_is_certain(trial) for trial in full):
        merged = _combined(sorted((t for t in full if not t.error), key=lambda t: t.loss))
        full += laboratory.run([Job(one, seed, steps) for one in merged], until)
    bar = untreated - LEAST_NOISE * abs(untreated) if math.isfinite(untreated) else math.inf
    return _smallest_first([t for t in full if t.loss < bar and not t.error], bar)


def _is_certain(trial: Trial) -> bool:
    return learning_of(trial).is_certain and trial.is_undisturbed


def noise_of(untreated: Sequence[Trial]) -> float:
    """Returns how far the held-out losses of runs with different seeds are apart."""
    finite = [t.loss for t in untreated if math.isfinite(t.loss)]
    return max(max(finite) - min(finite), LEAST_NOISE * abs(min(finite))) if finite else 0.0


def size_of(changes: Sequence[Change]) -> int:
    """Returns how much changes alter a program; 0 for the suite's callbacks alone."""
    return sum(KINDS[change.kind].size for change in changes)


def _combined(ranked: Sequence[Trial]) -> list[tuple[Change, ...]]:
    """Returns combinations of the best changes, of different kinds, that were not tried."""
    tried = {frozenset(map(str, t.job.changes or ())) for t in ranked}
    singles = [t.job.changes for t in ranked[:FINALISTS] if t.job.changes]
    found: list[tuple[Change, ...]] = []
    best = singles[0] if singles else ()
    if best and len(best) < MAX_COMBINED and all(change.kind != "learning_rate" for change in best):
        found.append((*best, FASTER))  # what learns now may learn at a higher rate
    for n in (2, MAX_COMBINED):
        for parts in combinations(singles, n):
            by_kind: dict[str, Change] = {}
            for change in (change for part in parts for change in part):
                by_kind.setdefault(change.kind, change)
            merged = tuple(by_kind.values())
            if len(merged) <= MAX_COMBINED and frozenset(map(str, merged)) not in tried:
                tried.add(frozenset(map(str, merged)))
                found.append(merged)
    return found[:MAX_COMBINATIONS]


def _smallest_first(better: Sequence[Trial], bar: float) -> list[Trial]:
    """Returns trials as they are adopted: the smallest change among those near the best is first."""
    if not better:
        return []
    best = min(t.loss for t in better)
    reference = bar if math.isfinite(bar) else max(t.curve[0][1] for t in better)
    reach = best + BEHIND * max(reference - best, 0.0) if math.isfinite(reference) else 1.1 * best
    near = [t for t in better if t.loss <= reach]
    near.sort(key=lambda t: (not t.is_undisturbed, size_of(t.job.changes or ()), t.loss))
    rest = sorted((t for t in better if t.loss > reach), key=lambda t: t.loss)
    return [*near, *rest]
