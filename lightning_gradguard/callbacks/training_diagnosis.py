"""The callback that names symptoms of training, their causes, and what helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradguard.core import arguments, tags
from lightning_gradguard.core.detectors.best_constant import STUCK
from lightning_gradguard.core.detectors.diagnosis import (
    Diagnosis,
    LossBaselines,
    Steps,
    Symptom,
    TargetDependence,
)
from lightning_gradguard.core.forensics import advice_on_schedules
from lightning_gradguard.core.incidents import CURE, Incident, IncidentKind
from lightning_gradguard.core.initialization import frozen_layers, tried_cure
from lightning_gradguard.core.remedies import Present, advice_for_symptom
from lightning_gradguard.runtime import distributed, lightning_api
from lightning_gradguard.runtime.diagnosis.epoch_ends import EpochEnds
from lightning_gradguard.runtime.diagnosis.followed_steps import FollowedSteps
from lightning_gradguard.runtime.diagnosis.messages import decoded, encoded
from lightning_gradguard.runtime.diagnosis.permutation import losses_of_permuted
from lightning_gradguard.runtime.diagnosis.sampled_step import SampledStep
from lightning_gradguard.runtime.diagnosis.schedule import next_sample
from lightning_gradguard.runtime.incidents.journal import incident_now, publish
from lightning_gradguard.runtime.incidents.present import findings_of_check, present_in
from lightning_gradguard.runtime.initialization.learning_rates import planned_steps
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.logging.heat_map import GradientHistory
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.logging.metrics import log_figure
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback

#: Kinds that the callback publishes.
SYMPTOMS: tuple[IncidentKind, ...] = (
    "vanishing_gradient",
    "exploding_gradient",
    "weight_stagnation",
    "stuck_loss",
    "dead_units",
    "saturated_units",
    "vanishing_weights",
    "constant_clipping",
    "nonfinite_gradient",
)


#: Steps of a fit by which each optimizer has stepped, if it ever will.
STEPPED_BY = 20


class TrainingDiagnosis(StepCallback):
    """Names what ails a network while it trains: the symptom, the layer, since when, why, and what helps.

    On sampled steps alone, hooks read the output of each layer and the gradient that arrives there, the units
    of each activation, the gradient through time of recurrences, and what each loss function is called with.
    The loss is compared with that of the best constant answer to the targets, the update with the weights,
    and the parameters with those that optimizers hold. Nothing is hooked on other steps, and nothing is
    written on any.

    One cause is one incident: `vanishing_gradient`, `exploding_gradient`, `weight_stagnation`, `stuck_loss`,
    `dead_units`, `saturated_units`, `vanishing_weights`, `constant_clipping` (by other code than the suite),
    or, where no callback checks steps, `nonfinite_gradient`. What follows from it is listed under it, in
    `diagnosis.roots`.

    Args:
        every_n_steps: Interval of the samples after step 250. Before, steps 0, 1, 2, 5, 10, 20, 35 and every
            25th one are sampled, and the first step of up to four more epochs.
        symptoms: Kinds to publish; all if `None`.
        charts: True to log, on sampled steps, `dead_share/<layer>`, `saturated_share/<layer>`, and the rms of
            the gradient at each layer's output, `output_gradient/<layer>`, with a heat map of it at the end.

    Attributes:
        diagnosis: The symptoms so far, in `diagnosis.roots`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import TrainingDiagnosis
        >>> diagnosis = TrainingDiagnosis(symptoms=["vanishing_gradient", "dead_units"])

    References:
        Schoop, Huang, Hartmann, UMLAUT: Debugging Deep Learning Programs using Program Structure and Model
        Behavior, 2021. Zhang, Zhai, Ma, Shen, AUTOTRAINER, 2021, for symptoms of training.
    """

    is_single = True

    def __init__(
        self, every_n_steps: int = 100, symptoms: Sequence[str] | None = None, charts: bool = False
    ) -> None:
        super().__init__()
        self.settings = non_defaults(TrainingDiagnosis, locals())
        chosen = SYMPTOMS if symptoms is None else arguments.names("symptoms", symptoms)
        unknown = [symptom for symptom in chosen if symptom not in SYMPTOMS]
        if unknown:
            raise ValueError(f"symptoms={unknown[0]!r} must be of {', '.join(SYMPTOMS)}.")
        self.every_n_steps = arguments.whole_number("every_n_steps", every_n_steps)
        self.symptoms = tuple(chosen)
        self.charts = arguments.flag("charts", charts)
        self._history = GradientHistory()
        self.diagnosis = Diagnosis()
        self._baselines, self._dependence = LossBaselines(), TargetDependence()
        self._sampled: SampledStep | None = None
        self._waiting: SampledStep | None = None
        self._followed = FollowedSteps()
        self._epoch_ends = EpochEnds()
        self._uses_targets = False
        self._next_sample = 0
        self._steps = Steps()
        self._started = 0
        self._finite_at = -1
        self._facts: set[Present] = set()
        self._is_publishing = False

    @override
    def on_begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the length of the run, and reports where layers are not diagnosed."""
        if lightning_api.is_compiled(pl_module):
            console.print_message(
                trainer,
                "Layers and losses are not diagnosed, because a part of the module is compiled, "
                "and hooks would change what it computes; updates and optimizers are. Train some hundred "
                "steps without torch.compile to have all diagnosed.",
            )
        planned = planned_steps(trainer)
        self.diagnosis.plan(int(planned) if math.isfinite(planned) else 0, frozen_layers(pl_module))
        self._sampled = self._waiting = None
        self._followed.close()
        self._epoch_ends = EpochEnds()
        self._steps = Steps()
        self._started = lightning_api.batches_that_stepped(trainer)
        self._next_sample = next_sample(self._started, self.every_n_steps)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins a sample where one is due."""
        step = lightning_api.batches_that_stepped(trainer)
        is_due = step >= self._next_sample or self._epoch_ends.wants_sample
        if not is_due or self._sampled is not None or lightning_api.is_swa_bn_update(trainer):
            return
        self._next_sample = next_sample(step + 1, self.every_n_steps)
        permuted = None
        wants = self._uses_targets and self.diagnosis.wants_permutation(step)
        if wants and pl_module.automatic_optimization and distributed.world_size() == 1:
            permuted = losses_of_permuted(trainer, pl_module, batch, batch_idx)
        self._dependence.is_wanted = self.diagnosis.wants_dependence(step)
        self._sampled = SampledStep(trainer, pl_module, batch, self._baselines, self._dependence, permuted)

    @override
    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """True on sampled steps."""
        return self._sampled is not None

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes note of the step, also of one without a gradient; of a sampled step, what is not trained."""
        if self.suite.is_running:
            if id(optimizer) not in self._steps.updated:
                self._steps.add(optimizer)
            if self._followed.followed:
                self._followed.end(optimizer)
            if self._epoch_ends.is_pending:
                self._epoch_ends.begin_epoch(pl_module, trainer.optimizers)
            if self._sampled is not None:
                is_late = self._sampled.step - self._started >= STEPPED_BY
                self._sampled.cover(trainer, optimizer, self._steps if is_late else None)
                if not (lightning_api.flattens_parameters(trainer) or lightning_api.is_compiled(pl_module)):
                    self._followed.begin(optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Measures the update of a sampled step."""
        if self._waiting is not None:  # the reduction of this step has summed its update
            self._send(self._waiting)
            self._waiting = None
        if self._sampled is not None and step.gradients.names and not step.inside_closure:
            self._sampled.add_update(self.suite, trainer, step, self.diagnosis.wants_largest)

    @override
    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        sampled = self._sampled
        if trainer.is_last_batch:
            self._epoch_ends.end_epoch(pl_module)
        if sampled is None:
            return
        sampled.end_batch()
        self._uses_targets = sampled.uses_targets
        if not (sampled.has_stepped or self.suite.has_stepped):
            return  # gradients accumulate
        self._sampled = None
        sampled.close()
        sampled.left = torch.cat([self._followed.found, self._epoch_ends.in_a_row.reshape(1)])
        self._followed.end_batch()
        if sampled.is_pending:
            self._waiting = sampled
        else:
            self._send(sampled)

    def on_host_numbers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: Any, numbers: list[float]
    ) -> None:
        """Diagnoses a sample, or publishes the symptoms of rank 0."""
        if record is None:
            self._publish(trainer, pl_module, decoded(numbers), {})
            return
        sample = record.read(numbers)
        self._facts = {"residual"} if sample.has_residuals else set()
        self._facts |= {"no_divergence"} if sample.divergence[1] is None else set()
        if self.charts:
            self.suite.metrics.add_scalars_at(sample.step, sample.scalars())
            self._history.append(sample.step, sample.output_gradients())
        symptoms = self.diagnosis.update(sample)
        where, share = record.nonfinite()
        if where:
            last = self._finite_at
            text = f"step {last}, the one sampled before, was finite" if last >= 0 else ""
            symptom = Symptom("nonfinite_gradient", "unknown", where, share, text, "update", since=last + 1)
            symptoms = [*symptoms, *self.diagnosis.add_once(symptom)]
        else:
            self._finite_at = sample.step
        self._publish_on_all_ranks(trainer, pl_module, symptoms, record.now)

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Takes note of a symptom that another callback has named, and names why training has diverged."""
        if incident.kind == "divergence" and incident.cause in ("", "update_too_large"):
            evidence = incident.detail.rstrip(".") or "training has diverged"
            symptoms = self.diagnosis.add_divergence(incident.where, evidence, incident.step)
            now = {"step": incident.step, "epoch": incident.epoch}
            self._publish_on_all_ranks(trainer, pl_module, symptoms, now)
        kind = next((kind for kind in SYMPTOMS if kind == incident.kind != "constant_clipping"), None)
        if not self._is_publishing and kind is not None:
            self.diagnosis.add_published(kind, incident.where, incident.step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes what is on its way."""
        super().on_train_end(trainer, pl_module)
        self._followed.close()
        if self._waiting is not None and not self._waiting.is_pending:
            self._send(self._waiting)
        self._waiting = None
        self.suite.metrics.flush(trainer, pl_module)
        if len(self._history):
            log_figure(trainer, tags.OUTPUT_HEAT_MAP, self._history.draw, self._history.last_step)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Ends a sample without a symptom."""
        if self._sampled is not None:
            self._sampled.end_batch()
            self._sampled.close()
        self._sampled = self._waiting = None
        self._followed.close()
        super().on_exception(trainer, pl_module, exception)

    @override
    def final_counts(self) -> dict[str, float]:
        """Returns the loss over that of the best constant answer, if it is no better."""
        over = self.diagnosis.over_constant
        return {tags.OVER_CONSTANT: over} if over > STUCK else {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns samples, symptoms, and sums over targets."""
        return {"diagnosis": self.diagnosis.state_dict(), "baselines": self._baselines.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.diagnosis.load_state_dict(state_dict["diagnosis"])
        self._baselines.load_state_dict(state_dict["baselines"])

    def snapshot_state_dict(self) -> dict[str, Any]:
        """Returns the state that `NaNRollback` rolls back with the weights."""
        return {"diagnosis": self.diagnosis.state_dict()}

    def load_snapshot_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rolls samples back with the weights; what was published remains."""
        self.diagnosis.load_state_dict(state_dict["diagnosis"], with_roots=False)

    def _send(self, sampled: SampledStep) -> None:
        self.suite.metrics.add_numbers(self, sampled, sampled.values())

    def _publish_on_all_ranks(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        symptoms: Sequence[Symptom],
        now: dict[str, int],
    ) -> None:
        """Publishes what this process has found or, of several, what rank 0 has found."""
        if distributed.world_size() == 1:
            self._publish(trainer, pl_module, symptoms, now)
            return
        message = encoded(symptoms, pl_module.device)
        if distributed.rank() > 0:
            message.zero_()
        self.suite.sum_in_next_step(message, partial(self.suite.metrics.add_numbers, self, None))

    def _publish(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        symptoms: Sequence[Symptom],
        now: dict[str, int],
    ) -> None:
        self._is_publishing = True
        present = present_in(trainer)
        # a schedule that has left a rate is not to step more often
        present |= {"sampled", *(("has_rate", "by_batch") if self.diagnosis.has_rate else ("no_rate",))}
        present |= self._facts
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for symptom in symptoms:
            if symptom.kind in self.symptoms:
                cause = "" if symptom.cause == "unknown" else symptom.cause
                detail = f"Since step {symptom.since}: {symptom.evidence}." if symptom.evidence else ""
                own = ""
                # how gradients pass is measured from the first update on
                is_first = symptom.since <= (1 if symptom.tier == "depth" else 0)
                if cause == "update_too_large":
                    own, _ = advice_on_schedules(schedules)
                if found := findings_of_check(trainer, symptom):
                    is_stuck = not symptom.is_of_initialization
                    detail += (
                        f" The check of the initialization reports: {found[0].describe()}."
                        if is_stuck
                        else " It follows from the poor initialization that the check reports."
                    )
                    own = tried_cure(found) or (found[0].cure if is_stuck else own)
                    cause = "" if is_stuck else cause
                    if cause == "depth" and symptom.kind == "exploding_gradient":
                        cause = cause if "normalized" in present else "large_weights"
                    elif cause == "depth" and "residual" not in present:
                        own = ""  # it trains where other weights do not, as in a deep GCN
                if not own:
                    facts: set[Present] = {*present, "untrained"} if is_first else present
                    own = advice_for_symptom(symptom, facts, pl_module)
                    if "treatment" in present and symptom.kind == "exploding_gradient":
                        own = f"If the loss falls, the changes of the treatment suffice. If not: {own}"
                incident = incident_now(
                    trainer,
                    symptom.kind,
                    where=symptom.where,
                    value=None if math.isnan(symptom.value) else symptom.value,
                    cause=cause,
                    detail=detail,
                    advice=own,
                    **now,
                )
                # a cure is printed with its finding
                publish(trainer, pl_module, incident, prints_advice=not own.startswith(CURE))
        self._is_publishing = False
