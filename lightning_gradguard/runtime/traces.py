"""What a forward pass leaves behind besides gradients, and taking it back."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics import Metric

from lightning_gradguard.core.snapshots import BufferCopies
from lightning_gradguard.runtime import lightning_api


class Traces:
    """Buffers, torchmetrics states, epoch means and weight averages around one optimizer step.

    Args:
        trainer: The Trainer that runs.
        pl_module: The module in training.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.buffers = BufferCopies(pl_module)
        self._trainer = trainer
        self._module = pl_module
        # by identity: the hash of a metric follows its state
        self._metrics: dict[int, dict[str, Any]] = {}

    def keep(self) -> None:
        """Remember the state from before the forward passes of a step."""
        self.buffers.refresh()
        self._metrics = {id(metric): _state(metric) for metric in self._all_metrics()}

    def accept(self) -> None:
        """The step takes place: averages may take it in."""
        lightning_api.resume_weight_averages(self._trainer)

    def undo(self) -> None:
        """The step does not take place: put everything back as `keep` found it."""
        self.buffers.restore()
        for metric in self._all_metrics():
            if (state := self._metrics.get(id(metric))) is not None:
                _put_back(metric, state)
            else:
                metric.reset()
        lightning_api.pause_weight_averages(self._trainer)

    def let_go(self) -> None:
        """Leave the Trainer's other callbacks as they were."""
        lightning_api.resume_weight_averages(self._trainer)

    def _all_metrics(self) -> list[Metric]:
        own = [module for module in self._module.modules() if isinstance(module, Metric)]
        return own + lightning_api.epoch_mean_metrics(self._trainer)


def _state(metric: Metric) -> dict[str, Any]:
    states = {
        name: value.clone() if isinstance(value, Tensor) else list(value)
        for name, value in metric.metric_state.items()
    }
    return {"states": states, "count": metric._update_count, "computed": metric._computed}


def _put_back(metric: Metric, state: dict[str, Any]) -> None:
    if state["count"] == 0:
        metric.reset()  # Lightning leaves out a mean that was reset, and warns of one without a value
        return
    for name, value in state["states"].items():
        setattr(metric, name, value.clone() if isinstance(value, Tensor) else list(value))
    metric._update_count = state["count"]
    metric._computed = state["computed"]
