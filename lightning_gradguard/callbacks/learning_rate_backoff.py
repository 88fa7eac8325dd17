"""The callback that lowers the learning rate after a rollback and lets it recover."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_gradguard.core.backoff import Backoff
from lightning_gradguard.core.incidents import Incident
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.core.tags import family
from lightning_gradguard.runtime.incidents.journal import incident_now, publish
from lightning_gradguard.runtime.optimizer_hooks import ScaledLearningRate
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback


class LearningRateBackoff(StepCallback):
    """Lowers the learning rate after a rollback, re-warms it, and lets it recover.

    The rate is scaled only while an optimizer steps and put back right after, so that every scheduler goes
    on as if nothing had happened. A rollback multiplies the scale by `factor`; a batch that is skipped
    changes nothing, for bad data is no reason to train slower.

    | tag | value |
    |---|---|
    | `lr_backoff/scale` | what learning rates are multiplied by |
    | `lr_backoff/scheduled_lr/<group>` | the learning rate that was asked for |
    | `lr_backoff/lr/<group>` | the learning rate that the optimizer used |

    Args:
        factor: The scale is multiplied by it after a rollback; in (0, 1).
        min_scale: The scale never falls below it (re-warming aside); in (0, 1].
        cooldown_steps: Good steps after a cut during which a further rollback does not cut again.
        rewarm_steps: Good steps over which the rate climbs from a tenth of its new value to all of it.
        recover_after_steps: Good steps without a rollback after which the scale grows by `1 / factor`,
            up to 1.
        progress_bar: Whether the progress bar shows the scale, as it was at the last logged step.

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
        progress_bar: bool = False,
    ) -> None:
        super().__init__()
        self.progress_bar = progress_bar
        self.state_arguments = {"factor": factor, "min_scale": min_scale}
        self._backoff = Backoff(factor, min_scale, cooldown_steps, rewarm_steps, recover_after_steps)
        self._scale = 1.0
        self._counted = False
        self._rates: list[ScaledLearningRate] = []
        self._scheduled: dict[int, list[float | Tensor]] = {}

    @property
    def scale(self) -> float:
        """What learning rates are multiplied by in the running batch."""
        return self._scale

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take hold of the optimizers of this fit."""
        super().on_train_start(trainer, pl_module)
        self._rates = [ScaledLearningRate(optimizer) for optimizer in trainer.optimizers]
        if self.progress_bar:
            self.suite.metrics.on_bar.add("lr_backoff/scale")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Settle the scale of this batch: incidents of the batch before have all been heard."""
        self._scale = self._backoff.scale
        self._counted = False
        for rate in self._rates:
            rate.scale = self._scale

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Count a good step, once a batch; remember the rates, which a schedule changes before its end."""
        if self.suite.is_logged:
            self._scheduled[step.optimizer_index] = self._rates[step.optimizer_index].scheduled()
        if step.accepted and not self._counted:
            self._counted = True
            self._backoff.step()

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Back off after a rollback."""
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

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Report the scale, and the rates that were used."""
        if not (self.suite.has_stepped and self.suite.is_logged):
            return
        values: dict[str, float | Tensor] = {"lr_backoff/scale": self._scale}
        rates, self._scheduled = self._scheduled, {}
        for index, scheduled in rates.items():
            name = family("lr_backoff", index, len(self._rates))
            for group, rate in enumerate(scheduled):
                values[f"{name}/scheduled_lr/{group}"] = rate
                values[f"{name}/lr/{group}"] = rate * self._scale
        self.suite.metrics.add_scalars(values)
        if self.progress_bar:
            self.suite.metrics.publish_total("lr_backoff/scale", self._scale)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the learning rates back."""
        self._let_go()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimizers."""
        super().on_train_end(trainer, pl_module)
        self._let_go()

    def final_counts(self) -> dict[str, float]:
        """The scale in the end, with what the last batch has changed."""
        return {"lr_backoff/scale": self._backoff.scale}

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters."""
        return self._backoff.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a saved scale."""
        self._backoff.load_state_dict(state_dict)

    def _let_go(self) -> None:
        for rate in self._rates:
            rate.remove()
        self._rates = []
