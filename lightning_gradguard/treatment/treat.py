"""`treat`: from a failing program to one that trains, by experiment within a budget."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_gradguard.core.detectors.best_constant import LEARNS
from lightning_gradguard.core.incidents import sentence_case
from lightning_gradguard.core.remedies import advice_for_cause
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.core.snapshots import rng_state, set_rng_state
from lightning_gradguard.treatment import files
from lightning_gradguard.treatment.budget import Clock, seconds
from lightning_gradguard.treatment.candidates import Candidate, applies, candidates, has_far_targets, unfit
from lightning_gradguard.treatment.learning import LEARNED_ENOUGH, fails_beside, learned_enough, learning_of
from lightning_gradguard.treatment.prescriptions import Prescription, prescriptions
from lightning_gradguard.treatment.probe import TOO_FEW_STEPS, Probe, confirmed, probe
from lightning_gradguard.treatment.result import TreatmentResult
from lightning_gradguard.treatment.search import (
    TrialRunner,
    at_best_rate,
    at_lower_rate,
    search,
    with_needed_changes,
)
from lightning_gradguard.treatment.trials.program import Program, recorded_program
from lightning_gradguard.treatment.trials.reachable import reachable_loss
from lightning_gradguard.treatment.trials.trial import Trial, name_of
from lightning_gradguard.treatment.trials.trial_log import TrialLog, identity_of
from lightning_gradguard.treatment.trials.workers import usable_processes
from lightning_gradguard.treatment.verification import (
    SeedResult,
    TreatmentVerdict,
    Verification,
    Verified,
    open_ends,
    rank_of,
    unverified,
    verdict_of,
)

#: Steps of a trial of full length: this share of the user's run, at least and at most so many.
SHARE, LEAST_STEPS, MOST_STEPS, USUAL_STEPS = 0.25, 150, 2000, 400
#: Steps below which a run logs too little for a report by default, and the points that it then logs.
FEW_STEPS, LOGGED = 500, 30
#: Steps of a probe at most, and batches that are recorded.
MOST_PROBED = 5000
#: Trials of full length that a treatment costs, about: search and verification.
COST_IN_TRIALS = 18
#: Shares of the budget at which recording, probe and verification end; the search ends between two of them,
#: so that a verification at the whole length fits in.
RECORDED, PROBED, VERIFIED = 0.1, 0.35, 0.93
LEAST_SEARCHED, MOST_SEARCHED = 0.45, 0.75
#: Share of the loss of a program that learns at which a short trial shows that it may learn far more.
PROMISING = 0.9
#: Treatments that are verified before none is found, and times that a rate is lowered for other seeds.
MAX_VERIFIED, MAX_LOWERED = 3, 2


def treat(
    make_module: Callable[[], pl.LightningModule],
    datamodule: Any = None,
    *,
    budget: str | float = "10m",
    out: str | Path = "treatment",
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[str], None] | None = None,
    callbacks: Sequence[Any] = (),
    command: str = "lightning-gradguard fit -c CONFIGURATION --model ... --data ...",
) -> TreatmentResult:
    """Finds by experiment the changes with which a failing program trains, and proves it on fresh seeds.

    A probe diagnoses the program. Changes that its symptoms suggest are tried on the same batches, the best
    for longer, and combinations of these. What beats the program as it is goes through three fresh seeds:
    *cured* if it learns with each of them. Files of yours are never written.

    Args:
        make_module: Builds the LightningModule anew at each call.
        datamodule: A LightningDataModule; `None` if the module has a `train_dataloader`.
        budget: Time that it may take, such as `"10m"`, `"90s"`, or seconds. Kept strictly.
        out: Folder for `treatment.yaml`, `report.html`, `treatment.json`, `trials.jsonl`, and TensorBoard's
            `runs`. One with trials of the same program is continued; one with those of another is an error.
        trainer: Arguments of your Trainer: `max_epochs`, `precision`, `gradient_clip_val` and the like.
        seed: Of the search.
        processes: Trials at once; as many as there are cores, up to four, by default, and one on a GPU.
        progress: Takes each line on the progress; standard error by default.
        callbacks: Configuration of callbacks of yours that `treatment.yaml` keeps.
        command: Trains with the configuration; for the report.

    Raises:
        ValueError: If the budget is no time.
        TreatmentError: If the program cannot be treated: it cannot be built twice, a step raises, or the
            folder has trials of another program, or files that are of no treatment.

    Example:
        >>> from lightning_gradguard import treat
        >>> treat(lambda: None, budget="soon")
        Traceback (most recent call last):
        ValueError: budget='soon' must be a time such as '10m', '90s', '2h', or seconds.
    """
    clock = Clock(seconds(budget))
    folder = Path(out)
    files.require_no_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda line: print(line, file=sys.stderr, flush=True))
    random_numbers = rng_state()
    try:
        program = recorded_program(
            make_module, datamodule, dict(trainer or {}), seed, MOST_PROBED, clock.share(RECORDED)
        )
        least = _length(program.planned)
        most = max(min(program.planned or least, MOST_PROBED), least)
        found = probe(program, least, most, clock.share(PROBED))
        if not found.is_automatic and found.steps:
            program = program.with_manual_steps(found.trial.curve[-1][0], found.steps)
        if not learned_enough(found.trial):
            reachable = reachable_loss(
                [*program.batches.epochs[0], *program.batches.held_out], clock.share(PROBED)
            )
            program = replace(program, reachable=reachable)
            found = found.with_reachable(reachable)
        if found.is_healthy and found.doubt:
            program, found = confirmed(program, found, least, clock.share(MOST_SEARCHED))
        treatment = _Treatment(program, found, clock, folder, report, processes or usable_processes(), least)
        result = treatment.run()
    finally:
        set_rng_state(random_numbers)
    trains = command.replace("CONFIGURATION", str(folder / files.CONFIGURATION))
    if 0 < program.planned < FEW_STEPS and "log_every_n_steps" not in (trainer or {}):
        trains += f" --trainer.log_every_n_steps {max(program.planned // LOGGED, 1)}"
    files.write(result, trains, callbacks)
    return result


def _length(planned: int) -> int:
    """Returns the steps of a trial of full length, of which a diagnosis needs some to be certain."""
    if not planned:
        return USUAL_STEPS
    return min(max(round(SHARE * planned), LEAST_STEPS), MOST_STEPS, planned)


class _Treatment:
    """The steps of a treatment after its probe."""

    def __init__(
        self,
        program: Program,
        found: Probe,
        clock: Clock,
        folder: Path,
        report: Callable[[str], None],
        processes: int,
        steps: int,
    ) -> None:
        self.program, self.found, self.clock, self.folder, self.report = program, found, clock, folder, report
        identity = identity_of(program, found.module, found.trial)
        self.log = TrialLog(folder / files.TRIALS, identity, min(steps, self._affordable(processes)))
        self.steps = self.log.steps
        self.runner = TrialRunner(program, self.log, clock, processes, self.steps, report)
        self.notes = list(program.batches.notes)
        if self.log.was_resumed:
            self.notes.append(f"Continued with {len(self.log.trials)} trials of {self.log.path}.")
        if not found.is_automatic:
            self.notes.append(
                "The program has several optimizers or manual optimization: learning rates, clipping and "
                "initialization are tried, no change of its architecture."
            )
        self.prescriptions = prescriptions(
            found.module, found.symptoms, program.batches.epochs[0], found.run_loss, found.incidents
        )
        fits = applies(found.module, Change("scale_output"), found.run_loss)
        if has_far_targets(found) and not (fits or found.learning.has_learned or self.prescriptions):
            advice = advice_for_cause("target_scale", ("the network",))
            self.prescriptions.append(Prescription("target_scale", advice))
        if found.decay and not (found.is_automatic or self.prescriptions):
            self.prescriptions.append(
                Prescription("learning_rate_schedule", f"{sentence_case(found.decay)}.")
            )

    def run(self) -> TreatmentResult:
        """Searches and verifies."""
        learning = self.found.learning
        healthy = f"after {self.found.steps} steps {learning.evidence}"
        if (
            self.found.is_healthy
            and not self._is_open
            and not any(one.is_beside_learning for one in self.prescriptions)
        ):
            return self._result("healthy", healthy)
        if self.steps < TOO_FEW_STEPS:
            duration = self.found.seconds_per_step
            least = self.clock.spent + TOO_FEW_STEPS * COST_IN_TRIALS * duration / VERIFIED
            evidence = (
                f"{self.clock.budget:.0f} s do not allow {TOO_FEW_STEPS} steps a trial, the least, of "
                f"{1e3 * duration:.3g} ms each; give at least {least:.0f} s"
            )
            return self._result("budget_too_small", evidence)
        blocking = [p for p in self.prescriptions if p.is_blocking]
        if blocking:
            evidence = (
                f"{learning.evidence}; no trial was made, as no change of the network or of its training "
                f"mends the cause: {blocking[0].fault.replace('_', ' ')}"
            )
            return self._result("no_treatment_found", evidence)
        suggested = candidates(self.found)
        self.report(
            f"{self.clock}, probe: {learning.evidence}; "
            f"{len(suggested)} treatments to try: {', '.join(name_of(c.changes) for c in suggested)}"
        )
        best: Verified | None = None
        for one in self._verified(suggested):
            self.report(f"{self.clock}, {one.verdict}: {name_of(one.changes)}")
            if one.is_last:
                return self._result(one.verdict, one.evidence, one.changes, one.results, suggested)
            if one.results:
                best = min(filter(None, (best, one)), key=rank_of)
        ahead = unverified(self.log.trials.values(), self.found.trial)
        if self._is_open and not (self.runner.was_cut and ahead):
            rest = f"; {self._cut} before more was tried" if self.runner.was_cut else ""
            return self._result("healthy", f"{healthy}; no change that was tried learns far more{rest}")
        if best is None or self._is_open or (best.verdict != "better" and self.runner.was_cut):
            results = best.results if best is not None else ()
            return self._result("no_treatment_found", self._shortfall(ahead, results), (), results, suggested)
        kept = best.changes if best.verdict == "better" else ()
        return self._result(best.verdict, best.evidence, kept, best.results, suggested)

    def _shortfall(self, ahead: Trial | None, results: Sequence[SeedResult]) -> str:
        """Returns why no treatment is known: none has proved better, or the budget has ended before."""
        if not self.runner.was_cut:
            tried = ", ".join(dict.fromkeys(name_of(t.job.changes) for t in self.log.trials.values()))
            evidence = f"{self.found.learning.evidence}; none that was tried has proved better: {tried}"
            if kinds := unfit(self.found):
                evidence += f"; suggested as well, and without a place in the module: {', '.join(kinds)}"
            reached = self.program.reachable
            if self.found.is_unexplained and not reached < LEARNS:
                evidence += "; no cause was found, and its data may allow no more"
                evidence += f" (plain learners: {reached:.2f})" if math.isfinite(reached) else ""
            return evidence
        left = open_ends(results, ahead, self.runner.whole_steps, self._cut)
        return f"{self.found.learning.evidence}; {left}"

    def _verified(self, suggested: Sequence[Candidate]) -> Iterator[Verified]:
        """Yields treatments as they are verified, with their verdicts.

        The learning rate is searched around the first of them that does not learn, or that ends its own run
        with little learned; it is lowered, twice at most, for those that do not learn with each seed. If none
        is a cure, candidates without a trial follow.
        """
        runner, whole = self.runner, self.runner.whole_steps
        verification = Verification(
            runner, self.found.trial if self.found.shows(whole) else None, VERIFIED, self.found.has_luck
        )
        needed = verification.share(self.found.seconds_per_step)
        waiting, bar, until = self._searched(suggested, VERIFIED - needed)
        has_rate, n_lowered = False, 0
        verified: set[str] = set()
        late: list[tuple[float, Trial]] = []
        while waiting or late or self._untried(suggested, verified):
            if not waiting and (rest := self._untried(suggested, verified)):
                waiting, bar, until = self._searched(rest, VERIFIED - needed)
                continue
            if is_late := not waiting:
                waiting, late = [min(late, key=lambda pair: pair[0])[1]], []
            trial = waiting.pop(0)
            is_known = str(trial.job.changes) in verified and not is_late
            if is_known or (verified and not learning_of(trial).learns):
                continue
            first = None
            if has_rate or learning_of(trial).has_learned:
                fewer = with_needed_changes(runner, trial, bar, until, may_be_empty=self._may_be_suite)
                if fewer is not trial and str(fewer.job.changes) not in verified:
                    trial, waiting = fewer, [trial, *waiting]
                first = verification.first(trial)
            if not has_rate and not (first and learned_enough(first) and first.is_undisturbed):
                has_rate = True
                is_lowered = first is not None and (learned_enough(trial) or not first.is_undisturbed)
                n_lowered += is_lowered
                lowered = [*at_lower_rate(runner, trial, until), trial] if is_lowered else []
                # what has learned comes before a rate at which little is learned
                lowered.sort(key=lambda one: not learning_of(one).has_learned)
                waiting = [*(lowered or at_best_rate(runner, trial, until)), *waiting]
                continue
            verified.add(str(trial.job.changes))
            better = first if first and fails_beside(self.found.trial, first) else None
            if better and not (is_late or learning_of(better).has_learned) and better.job.steps >= whole:
                # no cure: it gets its other seeds if nothing else is one
                late.append((better.loss, trial))
                continue
            results = verification.others(better) if better else []
            yield self._with_verdict(trial.job.changes or (), results)
            if n_lowered < MAX_LOWERED and not all(r.learning.has_learned for r in results):
                is_slow = n_lowered > 0 and all(r.learning.learns for r in results)
                has_rate, n_lowered = True, n_lowered + 1
                if lower := at_lower_rate(runner, trial, VERIFIED, is_slow=is_slow):
                    waiting = [*lower, *waiting]
                    continue
            if first is None or first.job.steps < whole:
                # what is left of the budget shows less of the next ones, which are open if the program fails
                runner.was_cut |= bool(waiting) and not self._is_open
                break

    def _untried(self, suggested: Sequence[Candidate], verified: Collection[str]) -> list[Candidate]:
        """Returns candidates without a trial: those behind one that has learned, and was no cure."""
        if self._is_open or self.runner.was_cut or not 0 < len(verified) < MAX_VERIFIED:
            return []
        seed = self.program.seed
        return [c for c in suggested if self.runner.short_job(c.changes, seed).key not in self.log.trials]

    def _searched(self, suggested: Sequence[Candidate], latest: float) -> tuple[list[Trial], float, float]:
        """Returns trials to verify, the held-out loss that they beat, and the share at which searches end."""
        runner = self.runner
        until = min(max(latest, LEAST_SEARCHED), MOST_SEARCHED)
        short, bar, promising = self._untreated(runner.short_steps), self._untreated(self.steps), math.inf
        if self._is_open and min(short, bar) > 0:
            promising, bar = PROMISING * short, PROMISING * bar
        found = search(runner, suggested, self.found.trial, bar, until, promising)
        if runner.was_cut and not found:  # there is nothing yet to verify in the time that was kept
            runner.was_cut, until = False, MOST_SEARCHED
            found = search(runner, suggested, self.found.trial, bar, until, promising)
        return found[:MAX_VERIFIED], bar, until

    def _with_verdict(self, changes: tuple[Change, ...], results: Sequence[SeedResult]) -> Verified:
        """Returns the verdict on changes: none is a cure beside a fault that remains."""
        verdict, evidence = verdict_of(results, self.runner.whole_steps)
        is_last = verdict == "cured" or (verdict == "better" and bool(results[0].scores))
        left = next((one.place for one in self.prescriptions if one.remains), "")
        if is_last and left:
            verdict, evidence = "better", f"{evidence}. The fault of the code at {left} remains"
        return Verified(changes, results, verdict, evidence, is_last)

    @property
    def _may_be_suite(self) -> bool:
        """True if there is something for the suite's callbacks alone to prevent."""
        return not (self.found.trial.is_undisturbed and math.isfinite(self.found.trial.loss))

    @property
    def _is_open(self) -> bool:
        """True for a whole run that learns a part: it may lack something, or be as good as its data allow."""
        is_long = 0 < self.program.planned <= self.found.steps and self.steps >= TOO_FEW_STEPS
        if self.found.learning.has_learned:
            return is_long and self.found.trial.over_constant > LEARNED_ENOUGH
        return is_long and self.found.learns_unhindered

    def _result(
        self,
        verdict: TreatmentVerdict,
        evidence: str,
        changes: tuple[Change, ...] = (),
        verification: Sequence[SeedResult] = (),
        suggested: Sequence[Candidate] = (),
    ) -> TreatmentResult:
        reasons = [c.reason for c in suggested if {*map(str, c.changes)} <= {*map(str, changes)}]
        kind = type(self.found.module)
        return TreatmentResult(
            verdict=verdict,
            evidence=evidence,
            program=f"{kind.__module__}.{kind.__qualname__}",
            problems=self.found.problems,
            changes=changes,
            reason=reasons[0] if reasons else "",
            prescriptions=self.prescriptions,
            probe=self.found.trial,
            trials=list(self.log.trials.values()),
            verification=verification,
            candidates=suggested,
            metric=self.program.batches.metric,
            budget=self.clock.budget,
            spent=self.clock.spent,
            steps=self.steps,
            seed=self.program.seed,
            notes=self.notes,
            folder=self.folder,
        )

    @property
    def _cut(self) -> str:
        """Words for what has ended: the budget, or the part of it that a search may take."""
        spent = f"{self.clock.spent:.0f} s of {self.clock.budget:.0f} s"
        if self.clock.spent > VERIFIED * self.clock.budget:
            return "the budget has ended"
        return f"the time for a search has ended, {spent}, as the rest is for a verification,"

    def _untreated(self, steps: int) -> float:
        """Returns the held-out loss of the probe after the steps of a trial."""
        curve: Sequence[tuple[int, float]] = self.found.trial.curve
        reached = [loss for step, loss in curve if step <= self.program.n_batches(steps)]
        return reached[-1] if math.isfinite(reached[-1]) else math.inf

    def _affordable(self, processes: int) -> int:
        total = COST_IN_TRIALS * self.found.seconds_per_step / min(processes, 4)
        return int(max(self.clock.budget - self.clock.spent, 0.0) * VERIFIED / max(total, 1e-9))
