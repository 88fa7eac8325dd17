"""Verifies a treatment on fresh seeds: the program is cured if the treated one learns with each of them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.treatment.learning import (
    HAS_LEARNED_OVER_PERMUTED,
    Learning,
    exceeds_constant,
    fails_beside,
    learned_at_lowest,
    learning_of,
    settled_loss,
)
from lightning_gradguard.treatment.search import LEAST_NOISE, LEAST_RUNG, TrialRunner, noise_of
from lightning_gradguard.treatment.trials.trial import OUT_OF_TIME, Job, Trial, name_of

#: Seeds of the verification, and how far they are from those of the search.
N_SEEDS, FIRST_SEED = 3, 101
#: Share of the steps that the budget allows with which runs of an earlier treatment are not repeated.
A_FEW_LESS = 0.8
#: Time that a run may take over what it took in the search.
RESERVE = 1.2
#: Words in the names of metrics of which 1 is best, and share of another's that is no less than it.
SCORES = frozenset({"acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "iou", "dice", "r2"})
EQUAL_SCORE = 0.9

TreatmentVerdict = Literal["healthy", "cured", "better", "no_treatment_found", "budget_too_small"]


@dataclass(frozen=True)
class SeedResult:
    """Runs with one fresh seed.

    Args:
        untreated: Without changes; beside the first seed it may be the probe, with the seed of the search.
        treated: With them.
    """

    untreated: Trial
    treated: Trial

    @property
    def learning(self) -> Learning:
        """The extent to which the treated run has learned."""
        return learning_of(self.treated)

    @property
    def fails(self) -> bool:
        """True if the untreated run fails beside the treated one, by its loss and by what it logs."""
        return fails_beside(self.untreated, self.treated) and not self.scores

    @property
    def scores(self) -> str:
        """Scores that both runs log, if the untreated one is as good by all of them; empty if not.

        Its answers depend on its inputs: that of a rare class, or of the frequent one alone, is no score.
        """
        mine, bare = self.treated.metrics, self.untreated.metrics
        names = [name for name in bare if name in mine and SCORES & set(re.split("[^a-z0-9]+", name.lower()))]
        is_as_good = all(bare[name] >= EQUAL_SCORE * mine[name] > 0 for name in names)
        if not (is_as_good and self.untreated.over_permuted <= HAS_LEARNED_OVER_PERMUTED):
            return ""
        return ", ".join(f"{name} {bare[name]:.3g} untreated and {mine[name]:.3g} treated" for name in names)

    def keeps(self, noise: float) -> bool:
        """True if the untreated run learns with this seed, and the treated one as well."""
        return learning_of(self.untreated).has_learned and self.treated.loss <= self.untreated.loss + noise

    def describe(self) -> str:
        """Returns both losses in words, each with its steps."""
        mine, bare = self.treated, self.untreated
        has_ended = mine.job.enough is not None and mine.loss <= mine.job.enough
        early = ", when it had learned" if has_ended else ""
        other = f" (seed {bare.job.seed})" if bare.job.seed != mine.job.seed else ""
        treated, untreated = (f"{t.loss_in_words} after {t.reached} steps" for t in (mine, bare))
        return f"seed {mine.job.seed}: treated {treated}{early}, untreated {untreated}{other}"


class Verified(NamedTuple):
    """Changes that were run with fresh seeds; none are tried after the last."""

    changes: tuple[Change, ...]
    results: Sequence[SeedResult]
    verdict: TreatmentVerdict
    evidence: str
    is_last: bool


def rank_of(one: Verified) -> tuple[bool, float]:
    """Returns what is lowest for the best treatment, of which the worst seed counts."""
    return one.verdict != "better", max(result.treated.loss for result in one.results)


@dataclass(frozen=True)
class Verification:
    """Runs a treatment, and the program as it is, with fresh seeds.

    The treated run with the first seed has the length of the program's own run, or what the budget allows of
    it: what trains for a while may fail later. So has a run of the program as it is: the probe, if it was not
    ended before. The treated runs with the other seeds end once they have learned; short runs of the program
    as it is show how far these seeds are apart, or whole ones, if it learns, or has learned and lost it.

    Args:
        runner: Runs the trials.
        probed: The program as it is in a run of the whole length; `None` if the probe was shorter.
        until: Share of the budget at which it ends.
        has_luck: True if the program as it is has learned with a seed, and not with that of the search.
    """

    runner: TrialRunner
    probed: Trial | None
    until: float
    has_luck: bool = False

    def share(self, seconds_per_step: float) -> float:
        """Returns the share of the budget that it takes."""
        steps = self._n_long * self.runner.whole_steps + (N_SEEDS - 1) * self._beside
        return steps * seconds_per_step * RESERVE / self._lanes / self.runner.clock.budget

    def first(self, trial: Trial) -> Trial | None:
        """Runs the changes of a trial with the first fresh seed; `None` if the budget ends before."""
        steps = self._length(trial)
        job = Job(trial.job.changes, self._seeds[0], steps, patience=steps // 2)
        beside = self._untreated(job.steps) if self._lanes > 1 else []
        return self._run([job, *beside]).get(job.key)

    def others(self, first: Trial) -> list[SeedResult]:
        """Runs the changes with the other seeds, and the program as it is.

        The results are fewer than three if the budget ends before, or the first treated run does not learn.
        """
        if not math.isfinite(first.loss) or exceeds_constant(first):
            return []
        steps = first.job.steps
        # beside a run that learns, another must show how much more can be learned; what explodes may fail yet
        enough = first.loss if self._learns else settled_loss(first) if first.is_undisturbed else None
        treated = [Job(first.job.changes, seed, steps, enough, steps // 2) for seed in self._seeds[1:]]
        untreated = self._untreated(steps)
        found = self._run([*treated, *untreated])
        if not self._learns and any(
            learned_at_lowest(found[job.key]) for job in untreated if job.key in found
        ):
            return replace(self, has_luck=True).others(first)  # a whole run may lose it, as the probe has
        pairs = [] if self.probed is None else [SeedResult(self.probed, first)]
        found[first.job.key] = first
        of_seed = {job.seed: job for job in [first.job, *treated]}
        for bare in untreated:
            mine = of_seed[bare.seed]
            if bare.key in found and mine.key in found:
                pairs.append(SeedResult(found[bare.key], found[mine.key]))
        return pairs

    @property
    def _seeds(self) -> list[int]:
        return [self.runner.program.seed + FIRST_SEED + i for i in range(N_SEEDS)]

    @property
    def _n_long(self) -> int:
        return N_SEEDS + 1 + (self.probed is None)

    @property
    def _learns(self) -> bool:
        return self.has_luck or (self.probed is not None and learned_at_lowest(self.probed))

    @property
    def _beside(self) -> int:
        """Steps of the untreated runs with the other seeds."""
        return self.runner.whole_steps if self._learns else self.runner.short_steps // 2

    @property
    def _lanes(self) -> int:
        """Runs at once, with two or more processes."""
        return min(self.runner.processes, 2)

    def _untreated(self, steps: int) -> list[Job]:
        first, *others = self._seeds
        long = [Job(None, first, steps)] if self.probed is None else []
        return [*long, *(Job(None, seed, min(self._beside, steps)) for seed in others)]

    def _length(self, trial: Trial) -> int:
        """Returns the steps of the treated runs: the whole length, or what the budget allows."""
        runner = self.runner
        left = runner.clock.share(self.until) - time.monotonic()
        affordable = int(left * self._lanes / (trial.seconds / trial.job.steps * RESERVE))
        whole, beside = runner.whole_steps, (N_SEEDS - 1) * self._beside
        if affordable >= self._n_long * whole + beside:
            return whole
        # what was verified before the treatment was stopped is not run again for a few steps more or less
        fresh = [t.job for t in runner.log.trials.values() if t.job.seed == self._seeds[0]]
        known = [job.steps for job in fresh if job.changes == trial.job.changes]
        steps = max((affordable - beside) // self._n_long, LEAST_RUNG)
        return next((n for n in known if A_FEW_LESS * steps <= n), min(steps, whole))

    def _run(self, jobs: Sequence[Job]) -> dict[str, Trial]:
        ran = self.runner.run(jobs, self.until)
        return {t.job.key: t for t in ran if t.error != OUT_OF_TIME}


def unverified(trials: Iterable[Trial], probed: Trial) -> Trial | None:
    """Returns the best trial that is better than the program as it is, and was run with no fresh seed."""
    ended = [t for t in trials if t.job.changes is not None and math.isfinite(t.loss)]
    fresh = {str(t.job.changes) for t in ended if t.job.seed != probed.job.seed}
    # what is worse than one that has failed promises no more
    failed = min((t.loss for t in ended if str(t.job.changes) in fresh), default=math.inf)
    bar = min((1 - LEAST_NOISE) * probed.lowest, failed)
    better = [t for t in ended if t.loss < bar and str(t.job.changes) not in fresh]
    return min(better, key=lambda t: t.loss, default=None)


def open_ends(results: Sequence[SeedResult], ahead: Trial | None, whole: int, cut: str) -> str:
    """Returns what was verified in vain, and what was not, where the budget has ended the treatment.

    Args:
        results: Those of the best treatment that was verified.
        ahead: The best trial of those that were not.
        whole: Steps of the program's own run.
        cut: What has ended, in words.
    """
    if len(results) > 1:
        job = results[0].treated.job
        found = (
            f"{name_of(job.changes)} was verified, and has not proved better: {verdict_of(results, whole)[1]}"
        )
        more = "runs are longer" if job.steps < whole else "more is tried"
    else:
        found, more = f"{cut} before a treatment was verified", ""
    if ahead is not None:
        found += (
            f". {name_of(ahead.job.changes)} has a held-out loss of {ahead.loss:.4g} after {ahead.job.steps} "
        )
        found += "steps of a trial: run the command again with a larger budget to verify it"
    elif more:
        found += f". With a larger budget, {more}"
    return found


def verdict_of(results: Sequence[SeedResult], whole: int) -> tuple[TreatmentVerdict, str]:
    """Returns the verdict of a verification, and its evidence.

    *Cured*: with each of three fresh seeds the held-out loss of the treated run is far below that of the best
    constant answer, is not on its way up, has settled, and is below that of the untreated run by more than
    these differ between seeds; with at most two seeds, it may equal that of an untreated run that learns as
    well. The first treated run has the whole length, and of the untreated runs of that length, one at least,
    most have not learned, or far less, and are not as good by the scores that they log.
    *Better*: with each seed the treated run learns, by its loss beside that of the best constant answer, or
    with permuted targets where that is unknown, and beats the untreated one by more than that, also if
    the budget has allowed two seeds alone, or shorter runs.
    """
    missing = N_SEEDS - len(results)
    if missing > 1:
        return "no_treatment_found", f"{len(results)} of {N_SEEDS} fresh seeds were run"
    failing = [r.untreated for r in results if r.fails]
    noise = noise_of(failing or [r.untreated for r in results])
    # a short run may have lost less after the whole length, as one of these has
    lowest = min((t.loss for t in failing), default=math.inf) - noise
    beats = [r.treated.loss < min(r.untreated.loss - noise, lowest) for r in results]
    learned = [r.learning.has_learned and r.learning.is_settled for r in results]
    steps = min(r.treated.job.steps for r in results)
    evidence = f"held-out losses: {'; '.join(r.describe() for r in results)}"
    evidence += f"; seed noise {noise:.2g}" if noise else ""  # 0 where no untreated loss is finite
    if missing:
        evidence += f"; the budget has allowed {len(results)} of {N_SEEDS} fresh seeds"
    slow = next((r.learning for r in results if r.learning.has_learned and not r.learning.is_settled), None)
    if steps < whole:
        evidence += f"; the budget has allowed {steps} of the {whole} steps of your run"
    elif slow is not None:
        evidence += f"; {slow.evidence}: a longer run learns more"
    if scores := next((r.scores for r in results if r.scores and r.untreated.job.steps >= whole), ""):
        evidence += f"; {scores}: by that the program does not fail"
    is_better = all(b or r.keeps(noise) for b, r in zip(beats, results, strict=True)) and any(beats)
    long = [r.fails for r in results if r.untreated.job.steps >= whole]
    fails = 2 * sum(long) > len(long)
    if all(learned) and is_better and fails and not missing and steps >= whole:
        return "cured", f"{evidence}. With the last seed, {results[-1].learning.evidence}"
    if all(beats) and not any(exceeds_constant(r.treated) for r in results):
        weak = next((r for r in results if not r.learning.has_learned), None)
        if weak is not None:
            evidence += f"; not cured, as with seed {weak.treated.job.seed}, {weak.learning.evidence}"
        elif not fails:
            evidence += f"; not cured, as {'most' if long else 'no'} untreated runs of the whole length "
            evidence += "have learned, too" if long else "were made"
        return "better", f"{evidence}: better so far" if steps < whole else evidence
    for one in (r for r in results if exceeds_constant(r.treated)):
        evidence += f"; not learned with seed {one.treated.job.seed}: {one.learning.evidence}"
    return "no_treatment_found", evidence
