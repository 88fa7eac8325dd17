"""Successive halving over candidates, combinations of the best, and the learning rate around a treatment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from lightning_gradguard.core.detectors.best_constant import LEARNS
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.core.remedies.kinds import KINDS
from lightning_gradguard.treatment.budget import Clock
from lightning_gradguard.treatment.candidates import Candidate
from lightning_gradguard.treatment.learning import fails_beside, learned_enough, learning_of
from lightning_gradguard.treatment.trials.program import Program
from lightning_gradguard.treatment.trials.trial import OUT_OF_TIME, Job, Trial, name_of
from lightning_gradguard.treatment.trials.trial_log import TrialLog
from lightning_gradguard.treatment.trials.workers import outcomes

#: Changes that are combined at most, combinations that are tried, and candidates that reach the full length.
MAX_COMBINED, MAX_COMBINATIONS, FINALISTS = 3, 3, 3
#: Share of the first rung in the full length, and its least steps.
FIRST_RUNG, LEAST_RUNG = 0.4, 60
#: Factors of the learning rate that are tried around the best treatment: around one that learns, around one
#: that does not; and times that one is taken.
RATE_FACTORS, FAR_RATE_FACTORS, MAX_RATE_STEPS = (3.0, 1 / 3), (10.0, 0.1), 3
#: Held-out loss over that of the best constant answer of a short trial that ends those that do not learn.
DOMINATES = 0.75
#: Share of the loss by which another learning rate must be better, and the same for one that has learned:
#: another whole run costs more than a little is worth.
BETTER_RATE, FAR_BETTER_RATE = 0.05, 0.2
#: Noise between seeds is at least this share of the untreated loss.
LEAST_NOISE = 0.02
#: Share of what the best treatment gains by which a smaller change may be behind it.
BEHIND = 0.05


@dataclass
class TrialRunner:
    """Runs jobs that the log does not have yet, within the budget.

    Args:
        program: What is trained.
        log: Of the trials.
        clock: Of the budget.
        processes: Trials at once.
        steps: Optimizer steps of a trial of full length.
        report: Takes a line on the progress.

    Attributes:
        was_cut: True if the budget has kept a trial from its steps.
    """

    program: Program
    log: TrialLog
    clock: Clock
    processes: int
    steps: int
    report: Callable[[str], None]
    was_cut: bool = field(default=False, init=False)

    @property
    def short_steps(self) -> int:
        """Optimizer steps of a trial of the first rung."""
        return min(max(round(FIRST_RUNG * self.steps), LEAST_RUNG), self.steps)

    @property
    def whole_steps(self) -> int:
        """Optimizer steps of the program's own run; those of a trial if they are unknown."""
        return self.program.planned or self.steps

    def short_job(self, changes: tuple[Change, ...] | None, seed: int) -> Job:
        """Returns a trial of the first rung, which ends at half of it if nothing is learned."""
        return Job(changes, seed, self.short_steps, patience=self.short_steps // 2)

    def run(self, jobs: Iterable[Job], until: float) -> list[Trial]:
        """Runs jobs until a share of the budget is spent; returns their trials in the order of the jobs."""
        wanted = list({job.key: job for job in jobs}.values())
        known = {key for key, trial in self.log.trials.items() if trial.error != OUT_OF_TIME}
        missing = [job for job in wanted if job.key not in known]
        for trial in outcomes(self.program, missing, self.clock.share(until), self.processes):
            self.log.add(trial)
            self.report(self._progress(trial))
        ran = [self.log.trials[job.key] for job in wanted if job.key in self.log.trials]
        self.was_cut |= len(ran) < len(wanted) or any(trial.error == OUT_OF_TIME for trial in ran)
        return ran

    def run_in_waves(self, jobs: Sequence[Job], until: float, ends: Callable[[Trial], bool]) -> list[Trial]:
        """Runs jobs, as many at a time as there are processes, up to a trial that `ends` them."""
        ran: list[Trial] = []
        for start in range(0, len(jobs), self.processes):
            ran += self.run(jobs[start : start + self.processes], until)
            if any(map(ends, ran)):
                break
        return ran

    def _progress(self, trial: Trial) -> str:
        seed = self.program.seed
        known = [
            t
            for t in self.log.trials.values()
            if t.job.changes is not None and t.job.seed == seed and math.isfinite(t.loss)
        ]
        best = min(known, key=lambda t: (-t.job.steps, t.loss), default=None)
        reached = f"after {trial.reached} of {trial.job.steps} steps"
        outcome = trial.error or f"held-out loss {trial.loss_in_words} {reached}"
        phase = "search" if trial.job.seed == seed else "verification"
        line = f"{self.clock}, trial {len(self.log.trials)} "
        line += f"({phase}, seed {trial.job.seed}): {name_of(trial.job.changes)}: {outcome}"
        if best is not None and phase == "search":
            line += f"; best so far: {name_of(best.job.changes)}, {best.loss:.4g}"
        return line


def search(
    runner: TrialRunner,
    candidates: Sequence[Candidate],
    probed: Trial,
    untreated: float,
    until: float,
    promising: float = math.inf,
) -> list[Trial]:
    """Tries candidates for some steps, the best of them for more, and combinations.

    Candidates of which one has learned end the first rung: those behind it are less likely, and cost as much.
    Those that no symptom suggests are tried only if none of the others learns. `until` is the share of the
    budget at which the search ends. Of a program that learns by itself, only short trials with a held-out
    loss below `promising` are followed, and one ends a rung beside which its whole run, `probed`, fails.
    Returns trials that are better than the program as it is, the one to adopt first.
    """
    bar = untreated - LEAST_NOISE * abs(untreated) if math.isfinite(untreated) else math.inf

    def ends(trial: Trial) -> bool:
        has_learned = learning_of(trial).has_learned and trial.is_undisturbed
        return has_learned and (learned_enough(trial) or fails_beside(probed, trial))

    short: list[Trial] = []
    ordered: list[Trial] = []
    guesses = [one for one in candidates if not one.is_suggested]
    for group in ([one for one in candidates if one.is_suggested], guesses):
        jobs = [runner.short_job(one.changes, runner.program.seed) for one in group]
        short += runner.run_in_waves(jobs, until, ends)
        if group is not guesses and guesses and not any(learning_of(trial).learns for trial in short):
            continue
        kept = [trial for trial in short if trial.loss < promising]
        longer = [t for t in _second_rung(runner, kept, until, ends) if math.isfinite(t.loss)]
        ordered = _smallest_first(list({t.job.key: t for t in [*ordered, *longer]}.values()), bar)
        if any(learning_of(trial).has_learned for trial in ordered):
            break
    else:  # a whole run of one after the other costs more than what a smaller change is worth
        ordered.sort(key=lambda trial: (not trial.is_undisturbed, trial.loss))
    return [trial for trial in ordered if trial.loss < bar]


def _second_rung(
    runner: TrialRunner, short: Sequence[Trial], until: float, ends: Callable[[Trial], bool]
) -> list[Trial]:
    """Returns trials of full length: of the candidates that are best after a short one, and combinations.

    One that alone has learned in a short trial, and those that have learned enough, need no longer one.
    """
    seed, steps = runner.program.seed, runner.steps
    # of losses that have not fallen, the least is one by chance: the likelier candidates come first
    ranked = sorted(
        (t for t in short if not t.error), key=lambda t: t.loss if learning_of(t).learns else math.inf
    )[:FINALISTS]
    if any(map(ends, ranked)):
        ranked = list(filter(ends, ranked))
        enough = [trial for trial in ranked if learned_enough(trial)]
        if enough or len(ranked) == 1:
            return enough or ranked
    elif ranked and ranked[0].over_constant <= DOMINATES:
        ranked = [trial for trial in ranked if trial.over_constant < LEARNS]
    full = runner.run_in_waves([Job(t.job.changes, seed, steps) for t in ranked], until, ends)
    if not any(map(ends, full)):
        merged = _combined(sorted((t for t in full if not t.error), key=lambda t: t.loss))
        full += runner.run([Job(one, seed, steps) for one in merged], until)
    return full


def at_best_rate(runner: TrialRunner, trial: Trial, until: float) -> list[Trial]:
    """Returns a trial after one with a better learning rate, if there is one.

    A change of the network moves the learning rate that fits it, and an estimated rate is one of its order.
    """
    changes, seed, steps = trial.job.changes or (), trial.job.seed, runner.steps
    # shorter trials prefer rates that are too high later
    best = reference = next(iter(runner.run([Job(changes, seed, steps)], until)), trial)
    factors = list(RATE_FACTORS if learning_of(trial).learns else FAR_RATE_FACTORS)
    better = 1 - (FAR_BETTER_RATE if learning_of(reference).has_learned else BETTER_RATE)
    for _ in range(MAX_RATE_STEPS):
        wave = factors[: runner.processes]
        if not wave:
            break
        jobs = [Job(_at_rate(best, f), seed, steps) for f in wave]
        found = dict(zip(wave, runner.run(jobs, until), strict=False))
        factors = factors[len(wave) :]
        for factor, other in found.items():
            if other.loss < better * best.loss and other.is_undisturbed >= best.is_undisturbed:
                best, factors = other, [factor]
        if learned_enough(best):
            break
    return [trial] if best is reference else [best, trial]


def at_lower_rate(runner: TrialRunner, trial: Trial, until: float, *, is_slow: bool = False) -> list[Trial]:
    """Returns what has learned in a trial, and not in each longer run, at a lower rate, if it learns.

    One that was lowered, and `is_slow`, is tried at a rate between.
    """
    changes = _at_rate(trial, max(RATE_FACTORS) if is_slow else min(FAR_RATE_FACTORS))
    lower = runner.run([Job(changes, trial.job.seed, runner.steps)], until)
    return [t for t in lower if learning_of(t).learns]


def _at_rate(trial: Trial, factor: float) -> tuple[Change, ...]:
    """Returns the changes of a trial with a learning rate scaled by a factor, rounded to two digits."""
    scale, rest = _rate_and_rest(trial)
    return (*rest, Change("learning_rate", {"scale": float(f"{scale * factor:.2g}")}))


def _rate_and_rest(trial: Trial) -> tuple[float, tuple[Change, ...]]:
    """Returns by what the changes of a trial scale the learning rate, and the other changes."""
    changes = trial.job.changes or ()
    scale = math.prod(change["scale"] for change in changes if change.kind == "learning_rate")
    return scale, tuple(change for change in changes if change.kind != "learning_rate")


def with_needed_changes(
    runner: TrialRunner, trial: Trial, bar: float, until: float, *, may_be_empty: bool = True
) -> Trial:
    """Returns the trial with those changes of another one alone without which it is worse.

    Without the last one there is the suite alone, if it `may_be_empty`. `bar` is the held-out loss of what is
    no better than the program as it is.
    """
    parts = sorted(trial.job.changes or (), key=lambda change: -size_of([change]))
    while parts:
        part = parts.pop(0)
        rest = tuple(change for change in trial.job.changes or () if change is not part)
        if not (rest or may_be_empty):
            break
        for fewer in runner.run([replace(trial.job, changes=rest)], until):
            learns = learning_of(fewer).has_learned or not learning_of(trial).has_learned
            if learns and fewer.loss < bar and _smallest_first([trial, fewer], bar)[0] is fewer:
                # without it, one that was needed may be so no more
                trial, parts = fewer, sorted(rest, key=lambda change: -size_of([change]))
    return trial


def noise_of(untreated: Sequence[Trial]) -> float:
    """Returns how far the held-out losses of runs with different seeds are apart after the same steps.

    A run that is worse than the best constant answer counts as that: how far it diverges has no meaning.
    """
    steps = min((t.job.steps for t in untreated), default=0)
    # of an unknown constant, NaN, the minimum is the loss
    losses = [min(t.loss_at(steps), t.loss / t.over_constant) for t in untreated if math.isfinite(t.loss)]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return max(max(finite) - min(finite), LEAST_NOISE * abs(min(finite))) if finite else 0.0


def size_of(changes: Sequence[Change]) -> int:
    """Returns how much changes alter a program; 0 for the suite's callbacks alone."""
    return sum(KINDS[change.kind].size for change in changes)


def _combined(ranked: Sequence[Trial]) -> list[tuple[Change, ...]]:
    """Returns combinations of the best changes, of different kinds, that were not tried."""
    tried = {frozenset(map(str, t.job.changes or ())) for t in ranked}
    singles = [t.job.changes for t in ranked[:FINALISTS] if t.job.changes]
    found: list[tuple[Change, ...]] = []
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
    """Returns trials as they are adopted: the smallest change among those near the best is first.

    So it is among those that have learned enough: in a short trial, rates are best that are too high later.
    """
    if not better:
        return []
    best = min(t.loss for t in better)
    reference = bar if math.isfinite(bar) else max(t.curve[0][1] for t in better)
    reach = best + BEHIND * max(reference - best, 0.0) if math.isfinite(reference) else 1.1 * best
    near = [t for t in better if t.loss <= reach or learned_enough(t)]
    near.sort(
        key=lambda t: (not t.is_undisturbed, size_of(t.job.changes or ()), _rate_and_rest(t)[0], t.loss)
    )
    rest = sorted((t for t in better if t not in near), key=lambda t: t.loss)
    return [*near, *rest]
