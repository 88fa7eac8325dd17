"""The callback that lowers the learning rate after a rollback and lets it recover."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from typing_extensions import override

from lightning_gradguard.core import arguments, tags
from lightning_gradguard.core.backoff import Backoff, ScaledLearningRate
from lightning_gradguard.core.incidents import Incident
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.runtime.incidents.journal import incident_now, publish
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback


class LearningRateBackoff(StepCallback):
    """Lowers the learning rate after a rollback, re-warms it, and lets it recover.

    The rate is scaled only while an optimizer steps and restored right after, so that schedulers are not
    affected. A rollback multiplies the scale by `factor`; a skipped batch changes nothing, for bad data is
    no reason to train slower.

    | tag | value |
    |---|---|
    | `lr_backoff/scale` | factor on the learning rates |
    | `lr_backoff/scheduled_lr/<group>` | the learning rate as scheduled |
    | `lr_backoff/lr/<group>` | the learning rate that the optimizer used |

    Args:
        factor: Factor on the scale after a rollback; in (0, 1).
        min_scale: The scale never falls below it (re-warming aside); in (0, 1].
        cooldown_steps: Good steps after a cut during which a further rollback does not cut again.
        rewarm_steps: Good steps over which the rate climbs from a tenth of its new value to all of it.
        recover_after_steps: Good steps without a rollback after which the scale grows by `1 / factor`,
            up to 1.
        prog_bar: Show the scale of the last logged step on the progress bar.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import LearningRateBackoff
        >>> backoff = LearningRateBackoff(factor=0.5, recover_after_steps=1000)
    """

    def __init__(
        self,
        factor: float = 0.5,
        min_scale: float = 2**-8,
        cooldown_steps: int = 20,
        rewarm_steps: int = 50,
        recover_after_steps: int = 2000,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        self.settings = non_defaults(LearningRateBackoff, locals())
        self.prog_bar = arguments.flag("prog_bar", prog_bar)
        self.state_arguments = {"factor": factor, "min_scale": min_scale}
        self._backoff = Backoff(factor, min_scale, cooldown_steps, rewarm_steps, recover_after_steps)
        self._scale = 1.0
        self._counted = False
        self._rates: list[ScaledLearningRate] = []
        self._scheduled: dict[int, list[float | Tensor]] = {}

    @property
    def scale(self) -> float:
        """Factor on the learning rates in the running batch."""
        return self._scale

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hooks into the optimizers of this fit."""
        super().on_train_start(trainer, pl_module)
        if not self.suite.is_running:
            return
        self._rates = [ScaledLearningRate(optimizer) for optimizer in trainer.optimizers]
        if self.prog_bar:
            self.suite.metrics.show_on_bar(tags.LR_SCALE)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the scale of this batch, after all incidents of the batch before."""
        self._scale = self._backoff.scale
        self._counted = False
        for rate in self._rates:
            rate.scale = self._scale

    @override
    def pending_rate_scale(self, optimizer_index: int) -> float:
        """Returns the scale, unless the optimizer has begun to step and its rates are scaled already."""
        return self._rates[optimizer_index].pending

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Counts a good step, once a batch; keeps the rates, which a schedule changes before its end."""
        if self.suite.is_logged:
            self._scheduled[step.optimizer_index] = self._rates[step.optimizer_index].scheduled()
        if step.accepted and not self._counted:
            self._counted = True
            self._backoff.step()

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Backs off after a rollback."""
        if incident.kind == "rollback" and self._backoff.reduce():
            facts = incident_now(
                trainer,
                "learning_rate_backoff",
                batch_idx=incident.batch_idx,
                value=self._backoff.scale,
                action="backed_off",
                advice=advice("learning_rate_backoff"),
            )
            publish(trainer, pl_module, facts)

    @override
    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Logs the scale, and the rates that were used."""
        if not (self.suite.has_stepped and self.suite.is_logged):
            return
        values: dict[str, float | Tensor] = {tags.LR_SCALE: self._scale}
        rates, self._scheduled = self._scheduled, {}
        for index, scheduled in rates.items():
            tag = partial(tags.tag, optimizer=index, of=len(self._rates))
            for group, rate in enumerate(scheduled):
                values[tag(tags.SCHEDULED_LR, str(group))] = rate
                values[tag(tags.LR, str(group))] = rate * self._scale
        self.suite.metrics.add_scalars(values)
        if self.prog_bar:
            self.suite.metrics.publish_total(tags.LR_SCALE, self._scale)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restores the learning rates."""
        self._remove_hooks()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the hooks from the optimizers."""
        super().on_train_end(trainer, pl_module)
        self._remove_hooks()

    @override
    def final_counts(self) -> dict[str, float]:
        """Returns the final scale, with the change of the last batch."""
        return {tags.LR_SCALE: self._backoff.scale}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and its counters."""
        return self._backoff.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the scale and its counters."""
        self._backoff.load_state_dict(state_dict)

    def _remove_hooks(self) -> None:
        for rate in self._rates:
            rate.remove()
        self._rates = []
