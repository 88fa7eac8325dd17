"""Side effects of forward passes (buffers, metrics, hidden states, weight averages), saved and restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from lightning_gradguard.core.snapshots import (
    SEEN,
    BufferCopies,
    FiniteBuffers,
    has_jumped,
    has_outlying_row,
    is_out_of_range,
    running_variances,
)
from lightning_gradguard.runtime import lightning_api

#: Attributes of torch and Lightning themselves, which no forward pass writes.
_INTERNAL = frozenset(vars(pl.LightningModule()))


@dataclass(slots=True)
class ForwardState:
    """State that a forward pass writes, apart from buffers.

    Args:
        epoch: Its epoch: epoch means start again in each.
        metrics: States of torchmetrics and epoch means, by the metric's identity: its hash follows its state.
        hidden: Tensors that modules carry from batch to batch as plain attributes, such as the hidden state
            in truncated backpropagation through time.
    """

    epoch: int
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    hidden: list[tuple[nn.Module, str, Any]] = field(default_factory=list)


class SideEffects:
    """Buffers, torchmetrics states, epoch means and weight averages around one optimizer step.

    Attributes:
        buffers: Copies of the buffers.
        finite_buffers: Those that must stay finite.
        has_statistics: True if there are running statistics of normalization.
        has_averages: True if a callback averages weights.
        forward_state: The other state from before the step.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.buffers = BufferCopies(pl_module)
        self.finite_buffers = FiniteBuffers(pl_module)
        self._normalizing = self.finite_buffers.statistics()
        self.has_statistics = bool(self._normalizing)
        variances = running_variances(pl_module.modules())
        self._variances = [place for place in variances if isinstance(place[0], _NormBase)]
        #: Of a normalization of the user's own, which may begin with anything, or be set to it.
        self._own_variances = [place for place in variances if not isinstance(place[0], _NormBase)]
        self._epoch_means = lightning_api.epoch_mean_metrics(trainer)
        self._had_jumped: Tensor | None = None
        self._n_scans = 0
        self.has_averages = lightning_api.has_weight_averages(trainer)
        self._trainer = trainer
        self._modules: list[nn.Module] = []
        self._metrics: list[Metric] = []
        self._carriers = [
            (module, name)
            for module in pl_module.modules()
            if not isinstance(module, Metric)
            for name, value in vars(module).items()
            if name not in _INTERNAL and _is_hidden(value)
        ]
        self.forward_state = ForwardState(trainer.current_epoch)
        self.save()

    def save(self, *, within_step: bool = False) -> None:
        """Saves the state ahead of the forward passes of a step, or between two steps on one batch."""
        self.buffers.refresh(within_step=within_step)
        if self.buffers.modules is not self._modules:
            self._modules = self.buffers.modules
            self._metrics = [module for module in self._modules if isinstance(module, Metric)]
        if not (self._metrics or self._epoch_means or self._carriers):
            return
        state = self.forward_state = ForwardState(self._trainer.current_epoch)
        # by identity: to compare metrics makes another metric
        state.metrics = {id(metric): _metric_state(metric) for metric in self._all_metrics()}
        for module, name in self._carriers:
            if _is_hidden(value := getattr(module, name, None)):
                state.hidden.append((module, name, value))

    def corrupted_statistics(self, batches: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Scans running statistics of normalization, without a host synchronization; `None` without any.

        They are corrupted if they are nonfinite, or if the batches of this step have raised a variance out of
        proportion and those of the one before have not: what lasts is the data. Without the tensors of the
        batches, no variance is out of proportion in the first steps, nor one of the user's own at any.
        """
        statistics, _ = self.buffers.now_and_saved(self._normalizing)
        if not statistics:
            return None
        flag = is_out_of_range(statistics)
        self._n_scans += 1
        found = []
        own = self._own_variances if self._n_scans > 1 else []  # the first batch may set it
        for places, needs_outlier in ((self._variances, self._n_scans <= SEEN), (own, True)):
            variances, before = self.buffers.now_and_saved(places)
            if variances and (batches or not needs_outlier):
                jumped = has_jumped(variances, before)
                if needs_outlier:
                    jumped = jumped & has_outlying_row(chain.from_iterable(batches)).to(jumped.device)
                found.append(jumped)
        if not found:
            return flag
        jumped = found[0] if len(found) == 1 else found[0] | found[1]
        had_jumped, self._had_jumped = self._had_jumped, jumped
        return flag | (jumped if had_jumped is None else jumped & ~had_jumped)

    def restore(self) -> None:
        """Restores everything to the last `save`, as the step does not take place."""
        self.buffers.restore()
        self.restore_forward_state(self.forward_state)

    def restore_forward_state(self, saved: ForwardState) -> None:
        """Restores what is not a buffer, and excludes the running batch from weight averages."""
        for metric in self._all_metrics():
            state = saved.metrics.get(id(metric))
            if state is None or saved.epoch != self._trainer.current_epoch:
                metric.reset()
            else:
                _restore_metric(metric, state)
        for module, name, value in saved.hidden:
            setattr(module, name, value)
        lightning_api.pause_weight_averages(self._trainer)

    def _all_metrics(self) -> list[Metric]:
        return [*self._metrics, *self._epoch_means.values()]


def _is_hidden(value: Any) -> bool:
    if not isinstance(value, tuple):
        return value is None or isinstance(value, Tensor)
    return bool(value) and all(part is None or isinstance(part, Tensor) for part in value)


def _metric_state(metric: Metric) -> dict[str, Any]:
    states = {
        name: value.clone() if isinstance(value, Tensor) else list(value)
        for name, value in metric.metric_state.items()
    }
    return {
        "states": states,
        "count": metric._update_count,
        "computed": metric._computed,
        "last": getattr(metric, "_forward_cache", None),
    }


def _restore_metric(metric: Metric, state: dict[str, Any]) -> None:
    if state["count"] == 0:
        metric.reset()  # Lightning omits a mean that was reset, and warns of one without a value
        return
    for name, value in state["states"].items():
        setattr(metric, name, value.clone() if isinstance(value, Tensor) else list(value))
    metric._forward_cache = state["last"]  # what was logged of the step alone
    metric._update_count = state["count"]
    metric._computed = state["computed"]
