"""Runs a program with watching callbacks alone, and finds whether it learns and what ails it."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradguard.callbacks.initialization_check import InitializationCheck
from lightning_gradguard.callbacks.training_diagnosis import TrainingDiagnosis
from lightning_gradguard.core import initialization
from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.detectors.diagnosis.rules import input_cause
from lightning_gradguard.core.incidents import Incident, IncidentKind, sentence_case, title
from lightning_gradguard.core.norms import tensor_norms
from lightning_gradguard.core.snapshots import Snapshot, preserve_state, rng_state
from lightning_gradguard.runtime.configured_rates import initial_rate
from lightning_gradguard.runtime.diagnosis.permutation import target_of
from lightning_gradguard.runtime.diagnosis.traced_pass import traced_pass
from lightning_gradguard.runtime.incidents.invalid_batches import is_check_of_values, was_raised_in_step
from lightning_gradguard.runtime.incidents.investigation import Investigation
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.replay import SeenBatch, training_loss_or_nan, without_logging
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.logging.silence import messages_silenced
from lightning_gradguard.runtime.optimizer_hooks import is_scale_free
from lightning_gradguard.runtime.rollback.reporter import origin_facts
from lightning_gradguard.treatment.learning import (
    LEARNED_ENOUGH_OF_VALUES,
    RISES,
    Learning,
    exceeds_constant,
    learning_of,
    overfits,
)
from lightning_gradguard.treatment.prescriptions import keeps_from_learning
from lightning_gradguard.treatment.trials.held_out import HeldOutLoss
from lightning_gradguard.treatment.trials.program import Program, TreatmentError, described
from lightning_gradguard.treatment.trials.trial import Job, Trial, logged

#: Mean learning rate of a run, over that before any schedule, below which a schedule takes it away: one that
#: falls to 0 along a line or a cosine leaves 0.5, a tenfold fall at 30, 60 and 80 % 0.33, an exponential fall
#: to 1e-3 0.145. Where no rate comes near that before the schedule, it is no rate to train with.
LEAST_MEAN_RATE, NEAR_INITIAL = 0.14, 0.5
#: Steps below which a run shows nothing.
TOO_FEW_STEPS = 30
#: Causes with which a run may learn in its second half alone.
LEARNS_LATE = frozenset({"through_time", "padding"})
#: Batches that are examined at most.
MAX_EXAMINED = 2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The outcome of a run without changes.

    Args:
        trial: The run.
        steps: Its optimizer steps.
        symptoms: Of the diagnosis, causes first.
        initialization: Criteria that the network does not meet as it is initialized.
        incidents: All that was published.
        module: The module, as it was initialized.
        is_automatic: False under manual optimization, or with several optimizers.
        has_epsilon: True if an optimizer divides by a sum with an epsilon.
        learning: Whether it learns.
        moved: Distance that a weight has gone, over its norm, the largest of all; NaN if unknown.
        targets: Mean and standard deviation of the values that are predicted; `None` if there are none.
        plain_rate: Learning rate, as without momentum, if steps scale with the gradients; NaN for others.
        has_large_inputs: True if the first layer gets inputs far from a scale of 1.
        decay: Words for what a schedule leaves of the learning rate; empty while it leaves enough.
        has_luck: True if the program has learned with another seed.
        run_loss: Runs `module` on the first batch; `None` if it cannot be run outside of a fit.
    """

    trial: Trial
    steps: int
    symptoms: Sequence[Symptom]
    initialization: Sequence[initialization.Finding]
    incidents: Sequence[Incident]
    module: nn.Module
    is_automatic: bool
    has_epsilon: bool
    learning: Learning
    moved: float
    decay: str
    targets: tuple[float, float] | None = None
    plain_rate: float = math.nan
    has_large_inputs: bool = False
    has_luck: bool = False
    run_loss: Callable[[], Tensor] | None

    def with_reachable(self, reachable: float) -> Probe:
        """Returns the outcome beside what plain learners reach on the same data."""
        trial = replace(self.trial, reachable=reachable)
        return replace(self, trial=trial, learning=learning_of(trial))

    @property
    def seconds_per_step(self) -> float:
        """Duration of a step in a trial, with its share of evaluations."""
        # before the first few, a run spends its time on its start
        of_steps = self.steps < TOO_FEW_STEPS and math.isfinite(self.trial.seconds_per_step)
        return self.trial.seconds_per_step if of_steps else self.trial.seconds / max(self.steps, 1)

    def shows(self, steps: int) -> bool:
        """True if the run shows what one of so many steps does: nothing is learned in half of it or more."""
        is_stuck = 2 * self.steps >= steps and exceeds_constant(self.trial)
        return self.steps >= steps or is_stuck or not math.isfinite(self.trial.loss)

    @property
    def learns_unhindered(self) -> bool:
        """True if the run learns, if only little, or overfits, and nothing was found that hinders it."""
        return (self.learning.learns or overfits(self.trial)) and not self.problems

    @property
    def is_healthy(self) -> bool:
        """True if the run has learned, or learns as far as nothing hinders it."""
        return self.learning.has_learned or self.learns_unhindered

    @property
    def doubt(self) -> str:
        """Reason that a run that learns may fail with another seed; empty if nothing was found."""
        exploding = [one for one in self.incidents if one.kind == "exploding_gradient"]
        if found := [f"{title(one.kind)}: {one.detail}" for one in exploding] or self.problems:
            return found[0]
        has_risen = self.trial.loss > RISES * self.trial.lowest and not overfits(self.trial)
        matters = self.trial.over_constant > LEARNED_ENOUGH_OF_VALUES
        return f"the held-out loss has risen from {self.trial.lowest:.4g}" if has_risen and matters else ""

    @property
    def is_unexplained(self) -> bool:
        """True if nothing was found that hinders it, but that the loss is stuck for no known reason."""
        known = [s for s in self.symptoms if (s.kind, s.cause) != ("stuck_loss", "unknown")]
        return len(self.problems) == len(self.symptoms) and not known and math.isfinite(self.trial.loss)

    @property
    def problems(self) -> list[str]:
        """Symptoms and unmet criteria in words."""
        found = [in_words(symptom) for symptom in self.symptoms]
        found += [self.decay] if self.decay else []
        severe = [f for f in self.initialization if f.severity == "fail"]
        found += [f"a training step fails: {self.trial.error}"] if self.trial.error else []
        return [*found, *(f"initialization: {f.describe()}" for f in severe[:3])]


def in_words(symptom: Symptom) -> str:
    """Returns a symptom with its place, and what is known of it."""
    cause = "" if symptom.cause == "unknown" else symptom.cause.replace("_", " ")
    name = title(symptom.kind, symptom.cause) + (f" at {symptom.where[0]}" if symptom.where else "")
    return ": ".join(filter(None, [name, symptom.evidence or cause]))


@dataclass(eq=False)
class _Ending(Callback):
    """Ends a probe that does not learn, after `least` batches: with a fault of code; others may learn late.

    With another cause it ends if the deadline does not allow `most` batches, so that time is left for trials,
    or if nothing is learned in half of these.
    """

    least: int
    most: int
    deadline: float
    diagnosis: TrainingDiagnosis
    held_out: HeldOutLoss
    began: float = field(default_factory=time.monotonic, init=False)
    seen: int = field(default=0, init=False)
    rates: list[float] = field(default_factory=list, init=False)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ends a run that does not learn, and of which a cause is known."""
        self.seen += 1
        for schedule in trainer.lr_scheduler_configs[:1]:
            group = schedule.scheduler.optimizer.param_groups[0]
            self.rates.append(float(group["lr"]) / (initial_rate(group) or math.inf))
        roots = self.diagnosis.diagnosis.roots if self.seen >= self.least else []
        if any(map(keeps_from_learning, roots)) or (roots and self._is_too_long()):
            trainer.should_stop = trainer.should_stop or self._is_stuck()
        # what is to be kept through time, or waits for another learning rate, is learned late
        has_cause = any(r.kind != "stuck_loss" and r.cause not in LEARNS_LATE for r in roots)
        is_constant = pl_module.automatic_optimization and not trainer.lr_scheduler_configs
        if has_cause and is_constant and self.seen == max(self.most // 2, self.least):
            trainer.should_stop |= self.held_out.learns_nothing(trainer, pl_module)

    def _is_too_long(self) -> bool:
        elapsed = time.monotonic() - self.began
        return self.began + elapsed * self.most / self.seen > self.deadline

    def _is_stuck(self) -> bool:
        losses = [loss for _, loss in self.held_out.curve]
        return not (math.isfinite(losses[-1]) and losses[-1] < 0.7 * losses[0])


class _Examination(Callback):
    """Examines the first batches with nonfinite gradients, or with which the step raises, before an update.

    Attributes:
        incidents: What was found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.incidents: list[Incident] = []
        self._investigation = Investigation(MAX_EXAMINED, 0.0)
        self._initial: Snapshot | None = None
        self._seen: SeenBatch | None = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch."""
        self._seen = SeenBatch(batch, batch_idx, rng_state(), trainer.global_step)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Examines the batch if a gradient is nonfinite.

        The weights before the first update are kept: what has moved far from them is at fault before any
        operation is. Lazy ones exist by now.
        """
        if self._initial is None:
            self._initial = Snapshot()
            self._initial.capture([pl_module], ())
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients and not bool(tensor_norms(gradients).isfinite().all()):
            self._examine(trainer, "nonfinite_gradient")

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Examines the batch with which the step has raised on its values."""
        if is_check_of_values(exception) and was_raised_in_step(exception):
            self._examine(trainer, "exception_in_step")

    def _examine(self, trainer: pl.Trainer, kind: IncidentKind) -> None:
        if self._seen is None or len(self.incidents) >= MAX_EXAMINED:
            return
        module, step = trainer.lightning_module, trainer.global_step
        result = self._investigation.examine_exception(
            trainer, module, step, self._seen, self._initial, None, is_certain=True
        )
        if result is not None:
            facts = origin_facts(result.origin, present_in(trainer))
            self.incidents.append(Incident(kind, step, batch_idx=self._seen.batch_idx, **facts))


def probe(program: Program, least: int, most: int, deadline: float) -> Probe:
    """Runs a program as it is, and diagnoses it.

    Args:
        program: What is trained.
        least: Optimizer steps after which the run may end, if it has shown why it fails.
        most: Optimizer steps at most.
        deadline: When it ends, on the clock of `time.monotonic`.

    Raises:
        TreatmentError: If a step raises an exception, or there is no optimizer.
    """
    began = time.monotonic()
    n_least, n_most = program.n_batches(least), program.n_batches(most)
    held_out = HeldOutLoss(program.batches.held_out, n_most, deadline, every=n_least // 4)
    diagnosis, check, examination = TrainingDiagnosis(), InitializationCheck(), _Examination()
    ending = _Ending(n_least, n_most, deadline, diagnosis, held_out)
    raised = ""
    untrained = program.module(program.seed)
    module = program.module(program.seed)
    with messages_silenced(logging.CRITICAL), tempfile.TemporaryDirectory() as folder:
        watching = [check, diagnosis, examination, held_out, ending]
        trainer = program.trainer_of(module, watching, most, folder)
        try:
            program.fit(trainer, module)
        except Exception as error:  # the user's own code
            if not is_check_of_values(error):
                raise TreatmentError(f"a training step of the program fails: {described(error)}") from error
            raised = described(error)
        metrics = logged(trainer)
    if not any(optimizer.param_groups for optimizer in trainer.optimizers):
        raise TreatmentError("configure_optimizers of the module returns no optimizer: nothing is trained.")
    trial = Trial(
        job=Job(None, program.seed, most),
        metrics=metrics,
        parameters=sum(p.numel() for p in module.parameters()),
        seconds=time.monotonic() - began,
        error=raised,
        **held_out.outcome(),
    )
    decay = _decay(ending.rates)
    first = program.batches.epochs[0][0]
    run_loss = _runnable(untrained, first, trainer)
    has_large_inputs = run_loss and input_cause(traced_pass(untrained, first, run_loss)) != "unknown"
    is_automatic = module.automatic_optimization and len(trainer.optimizers) == 1
    roots = diagnosis.diagnosis.roots
    if is_automatic and decay:  # trials are made without the schedule
        roots = [r for r in roots if r.cause not in ("learning_rate_too_low", "learning_rate_schedule")]
    return Probe(
        trial=trial,
        steps=trainer.global_step,
        symptoms=list(roots),
        initialization=[f for f in check.findings if f.severity != "info"],
        incidents=[*held_out.incidents, *examination.incidents],
        module=untrained,
        is_automatic=is_automatic,
        has_epsilon=any("eps" in group for one in trainer.optimizers for group in one.param_groups),
        learning=learning_of(trial),
        moved=_moved(untrained, module),
        decay=decay,
        targets=None if trial.is_likelihood else _scale_of_targets(program.batches.epochs[0]),
        plain_rate=_plain_rate(trainer.optimizers[0]) if is_automatic else math.nan,
        has_large_inputs=bool(has_large_inputs),
        run_loss=run_loss,
    )


def confirmed(program: Program, found: Probe, least: int, deadline: float) -> tuple[Program, Probe]:
    """Returns a program and its probe, with a second seed if that fails: with one it may learn by chance."""
    doubt, other = found.doubt, replace(program, seed=program.seed + 1)
    second: Probe | None = None
    if time.monotonic() + found.trial.seconds < deadline:
        second = probe(other, least, found.steps, deadline).with_reachable(program.reachable)
    if second is None or time.monotonic() > deadline:
        more = "the budget allows no second seed"
    else:
        more = f"with seed {other.seed}, {second.learning.evidence}"
        if not second.is_healthy:
            program, more = other, f"seed {program.seed} learns, and {more}"
            found = replace(second, has_luck=True)
    batches = program.batches
    note = f"{sentence_case(doubt)}; {more}."
    return replace(program, batches=replace(batches, notes=(*batches.notes, note))), found


def _decay(rates: Sequence[float]) -> str:
    """Returns words for learning rates over those before any schedule that are too low in their mean."""
    if not max(rates, default=0.0) > NEAR_INITIAL or not fmean(rates) < LEAST_MEAN_RATE:
        return ""
    return (
        f"learning rate: the schedule leaves {fmean(rates):.2g} of it in the mean of the run (usual: "
        f"above {LEAST_MEAN_RATE}): check its length, and whether it is to step once a batch or an epoch"
    )


def _moved(before: nn.Module, after: nn.Module) -> float:
    """Returns how far a weight has gone, over its norm, the largest of all; NaN if no two can be compared."""
    trained = dict(after.named_parameters())
    ratios = []
    for name, old in before.named_parameters():
        new = trained.get(name)
        if new is not None and new.shape == old.shape and old.ndim > 1 and old.requires_grad:
            distance = float((new.detach().cpu() - old.detach().cpu()).norm())
            norm = float(old.detach().norm())
            ratios.append(distance / norm if norm else math.inf)
    return max(ratios, default=math.nan)


def _scale_of_targets(batches: Sequence[Any]) -> tuple[float, float] | None:
    """Returns mean and standard deviation of targets that are one value of each sample."""
    found = [target_of(batch) for batch in batches]
    values = [t.detach().flatten().double() for t in found if t is not None and t.is_floating_point()]
    if not values or any(t is None or t.numel() != len(t) for t in found):
        return None
    every = torch.cat(values)
    return float(every.mean()), float(every.std())


def _plain_rate(optimizer: torch.optim.Optimizer) -> float:
    """Returns the rate of an optimizer without a scale of its own, as it is for steps without momentum."""
    group = optimizer.param_groups[0]
    rate = initial_rate(group)
    if is_scale_free(optimizer) or not rate:
        return math.nan
    return float(rate) / (1 - float(group.get("momentum", 0.0)))


def _runnable(module: pl.LightningModule, batch: Any, trainer: pl.Trainer) -> Callable[[], Tensor] | None:
    def run_loss() -> Tensor:
        # a step may ask its Trainer for the epoch; one by hand would step the optimizers of the probe
        module.trainer = trainer if module.automatic_optimization else None
        with preserve_state(module), without_logging(module):
            return training_loss_or_nan(module, copy.deepcopy(batch), 0)

    try:
        run_loss()
    except Exception:  # a step that needs a running fit
        return None
    return run_loss
