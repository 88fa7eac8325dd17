"""The callback that lowers the learning rate after a rollback and lets it recover."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from typing_extensions import override

from lightning_gradguard.core import arguments, tags
from lightning_gradguard.core.backoff import Backoff, ScaledLearningRate
from lightning_gradguard.core.incidents import AT_ANY_RATE, OF_OPTIMIZER, Incident
from lightning_gradguard.runtime.incidents.journal import incident_now, publish
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.optimizer_hooks import NO_CURE, largest_usual_rate
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback


class LearningRateBackoff(StepCallback):
    """Lowers the learning rate after a rollback, re-warms it, and lets it recover.

    The rate is scaled only while an optimizer steps and restored right after, so that schedulers are not
    affected. A rollback multiplies the scale by `factor`, unless bad data has caused it, which is no reason
    to train slower; nor is a skipped batch, nor an operation of your code that fails again after one cut.

    A run that is rolled back to its start, or again to the same snapshot, has a rate that does not train it.
    Then the highest rate that trains is searched, within a factor of 16; it is kept, logged, and reported as
    the rate to train with. If the weights have diverged from the start, the search begins with a sixteenth.
    A cut for a divergence is taken back if the next losses are as high: it is the data that raise them.

    | tag | value |
    |---|---|
    | `lr_backoff/scale` | factor on the learning rates |
    | `lr_backoff/scheduled_lr/<group>` | the learning rate as scheduled |
    | `lr_backoff/lr/<group>` | the learning rate that the optimizer used |

    Args:
        factor: Factor on the scale after a rollback; in (0, 1).
        min_scale: The scale never falls below it (re-warming aside); in (0, 1].
        cooldown_steps: Good steps after a cut during which a rollback to a newer snapshot does not cut again.
        rewarm_steps: Good steps over which the rate climbs from a tenth of its new value to all of it.
        recover_after_steps: Good steps without a rollback after which the scale grows by `1 / factor`,
            up to 1 or to what was found to train.
        prog_bar: Show the scale of the last logged step on the progress bar.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import LearningRateBackoff
        >>> backoff = LearningRateBackoff(factor=0.5, recover_after_steps=1000)
    """

    is_single = True

    def __init__(
        self,
        factor: float = 0.5,
        min_scale: float = 2**-20,
        cooldown_steps: int = 20,
        rewarm_steps: int = 50,
        recover_after_steps: int = 2000,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        self.settings = non_defaults(LearningRateBackoff, locals())
        self.prog_bar = arguments.flag("prog_bar", prog_bar)
        # part of the key in checkpoints: version 0.5 had another default
        self.state_arguments = {"factor": factor, "min_scale": 2**-8 if min_scale == 2**-20 else min_scale}
        self._backoff = Backoff(factor, min_scale, cooldown_steps, rewarm_steps, recover_after_steps)
        self._scale = 1.0
        self._counted = False
        self._saved_rates: list[float] = []
        self._found_rate: float | None = None
        self._is_first_batch = False
        self._has_updated = False
        self._has_diverged = False
        self._risen_loss = math.inf
        self._has_ended = False
        self._left: Counter[str] = Counter()
        self._rates: list[ScaledLearningRate] = []
        self._scheduled: dict[int, list[float | Tensor]] = {}

    @property
    def scale(self) -> float:
        """Factor on the learning rates in the running batch."""
        return self._scale

    @override
    def on_begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hooks into the optimizers of this fit."""
        self._rates = [ScaledLearningRate(optimizer) for optimizer in trainer.optimizers]
        if not self._initial_rates():
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            warnings.warn(
                f"LearningRateBackoff does not act: the parameter groups of {names} have no 'lr'.",
                stacklevel=2,
            )
        if trainer.global_step == 0 and self._has_ended:
            self._backoff.reset()  # the run before was another one
            self._found_rate = None
        self._has_ended = False
        self._backoff.begin(trainer.global_step)
        self._is_first_batch, self._has_updated = True, False
        self._left.clear()
        if self.prog_bar:
            self.suite.metrics.show_on_bar(tags.LR_SCALE)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the scale of this batch, after all incidents of the batch before."""
        if self._is_first_batch:
            self._is_first_batch = False
            if self._saved_rates not in ([], self._initial_rates()):
                self._backoff.reset()  # the rates were changed by hand since they were cut
                self._found_rate = None
        self._scale = self._backoff.scale
        self._counted = self._has_diverged = False
        self._risen_loss = math.inf
        for rate in self._rates:
            rate.scale = self._scale

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Counts a good step, once a batch; keeps the rates, which a schedule changes before its end."""
        if self.suite.is_logged:
            self._scheduled[step.optimizer_index] = self._rates[step.optimizer_index].scheduled()
        self._has_updated |= step.accepted
        if step.accepted and not self._counted:
            self._counted = True
            self._backoff.step(float(step.loss) if self._backoff.needs_loss else None)
            if self._backoff.has_returned:
                self.suite.rises_with_data.append(trainer.global_step)
                console.print_message(
                    trainer,
                    "The loss is as high with the weights before the divergence: it rises with the data."
                    f" The learning rate is set back to {self._backoff.level:.4g}x the configured rate.",
                )

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Backs off after a rollback, unless its cause is one that no rate avoids."""
        if incident.kind == "training_diverged":
            self._found_rate = None  # the run has ended at it
        self._has_diverged |= incident.kind in ("divergence", "gradient_collapse")
        if incident.kind == "divergence" and incident.value is not None:
            self._risen_loss = incident.value
        if incident.kind != "rollback" or incident.value is None:
            return
        if not self._initial_rates():
            self._left[tags.UNSCALED_ROLLBACKS] += 1
            return
        # one cut may keep numbers where an operation is finite; data and the optimizer's arguments fail alike
        fails_alike = AT_ANY_RATE if self._backoff.level < 1 else ("bad_input", *OF_OPTIMIZER)
        if incident.cause in fails_alike or not self._has_updated:
            self._left[tags.ROLLBACKS_AT_ANY_RATE] += 1
            return
        if self._backoff.on_rollback(
            int(incident.value), has_diverged=self._has_diverged, risen_loss=self._risen_loss
        ):
            self._found_rate = None
            facts: dict[str, Any] = {"step": incident.step, "batch_idx": incident.batch_idx}
            facts |= {"value": self._backoff.level, "action": "backed_off"}
            if incident.cause in AT_ANY_RATE:
                facts["advice"] = ""  # the rate is not at fault
            publish(trainer, pl_module, incident_now(trainer, "learning_rate_backoff", **facts))

    @override
    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Reports a rate that was found to train; logs the scale, and the rates that were used."""
        if self._counted and self._backoff.has_found:
            found_rate = self._initial_rates()[0] * self._backoff.level
            if found_rate > NO_CURE * largest_usual_rate(trainer.optimizers[0]):
                self._found_rate = found_rate
                found = incident_now(trainer, "learning_rate_found", batch_idx=batch_idx, value=found_rate)
                publish(trainer, pl_module, found)
        if not (self.suite.has_stepped and self.suite.is_logged):
            return
        values: dict[str, float | Tensor] = {tags.LR_SCALE: self._scale}
        rates, self._scheduled = self._scheduled, {}
        for index, scheduled in rates.items():
            tag = partial(tags.tag, optimizer=index, of=len(self._rates))
            for group, rate in enumerate(scheduled):
                values[tag(tags.SCHEDULED_LR, str(group))] = rate
                values[tag(tags.LR, str(group))] = rate * self._rates[index].of_all
        self.suite.metrics.add_scalars(values)
        if self.prog_bar:
            self.suite.metrics.publish_total(tags.LR_SCALE, self._scale)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._remove_hooks()

    @override
    def final_counts(self) -> dict[str, float]:
        """Returns the final scale, with the last change, a rate found, and the rollbacks without a cut."""
        counts = {tags.LR_SCALE: self._backoff.scale, **self._left}
        if self._found_rate is not None:
            counts[tags.FOUND_LR] = self._found_rate
        return counts

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and its counters, and the rates that they belong to."""
        rates = self._initial_rates() if self._rates else self._saved_rates
        return {**self._backoff.state_dict(), "initial_rates": rates, "found_rate": self._found_rate}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._backoff.load_state_dict(state_dict)
        self._has_ended = False
        self._saved_rates = state_dict.get("initial_rates", [])  # version 0.5 has neither
        self._found_rate = state_dict.get("found_rate")

    def _initial_rates(self) -> list[float]:
        """Returns the rate of each parameter group as the module has set it, ahead of any schedule."""
        return [rate for scaled in self._rates for rate in scaled.initial()]

    def _remove_hooks(self) -> None:
        self._has_ended |= bool(self._rates)
        for rate in self._rates:
            rate.remove()
        self._rates = []
