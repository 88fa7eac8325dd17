"""An optimizer step that is logged: its norms, the update that it makes, histograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core import tags
from lightning_gradguard.core.clipping import Scalar
from lightning_gradguard.core.norms import (
    Gradients,
    local_shard,
    norms_from_power_sums,
    power_sums,
    tensor_norms,
    total_norm_from_norms,
)
from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.logging.chart_groups import ChartGroups
from lightning_gradguard.runtime.logging.metrics import log_histogram
from lightning_gradguard.runtime.optimizer_hooks import after_next_step
from lightning_gradguard.runtime.steps.parameters import Selection
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.suite import Suite

#: Elements beyond which a matrix is large, and the interval of its columns from which an update is estimated.
LARGE_MATRIX, EVERY_COLUMN = 2**16, 17


@dataclass(frozen=True)
class LoggedNumbers:
    """Numbers of a logged step on the host.

    Args:
        nonfinite_fraction: Share of tensors with a nonfinite gradient since the last logged step.
        total_norm: Total norm of the gradients.
        loss: Mean loss of the step.
        grad_norms: By parameter.
        weight_norms: By parameter; empty if unknown.
        update_ratios: By parameter; empty if unknown.
        clipped_norm: Total norm that the optimizer got; `None` if it was not measured.
    """

    nonfinite_fraction: float
    total_norm: float
    loss: float
    grad_norms: Sequence[float]
    weight_norms: Sequence[float]
    update_ratios: Sequence[float]
    clipped_norm: float | None = None


class LoggedStep:
    """Norms of one optimizer step, on the device until `values` are moved to the host.

    Args:
        suite: Of the Trainer.
        trainer: The Trainer that fits.
        step: The step.
        norm_type: Of all norms.
        update_ratio: Measure the update as well.
        clipped_norm: Measure also the norm that the optimizer gets, where ranks hold whole gradients.
        exact: False to estimate the update of a large matrix from some of its columns, without a copy of all.

    Attributes:
        is_pending: True while the norms of the update are not yet summed over shards.
        is_late: True if the update was summed together with a later step.
    """

    def __init__(
        self,
        suite: Suite,
        trainer: pl.Trainer,
        step: Step,
        norm_type: float,
        update_ratio: bool,
        clipped_norm: bool = False,
        exact: bool = True,
    ) -> None:
        self.step = batches_that_stepped(trainer)
        self.optimizer_index = step.optimizer_index
        self.names = step.gradients.names
        self.is_matrix = step.selection.is_matrix
        self.accepted = step.accepted
        self.was_checked = step.is_checked
        self.is_pending = False
        self.is_late = False
        self._suite = suite
        self._loss: Scalar = step.loss if step.measurement is None else step.measurement.loss
        self._norm_type = norm_type
        self._grad_norms = step.tensor_norms[norm_type]
        self._weight_norms = step.weight_norms if step.accepted else None
        self._nonfinite_fraction: Scalar = 0.0
        self._update_norms: Tensor | None = None
        self._clipped_norm: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        if step.accepted and update_ratio:
            # copies all weights in one operation
            before = list(torch._foreach_mul(_weights(step.selection, exact), 1.0))
            measure = partial(self._measure_updates, step.selection, exact, before)
            self._handles.append(after_next_step(step.optimizer, measure))
        if step.accepted and clipped_norm and not step.selection.is_sharded:
            self._handles.append(
                after_next_step(step.optimizer, partial(self._measure_clipped, step.selection))
            )

    def close(self, nonfinite_fraction: Scalar) -> None:
        """Removes the hooks of the optimizer, which do not run where a GradScaler skips the step."""
        self._nonfinite_fraction = nonfinite_fraction
        self.is_late = self.is_pending
        for handle in self._handles:
            handle.remove()

    def total_norm(self) -> Tensor:
        """Returns the total norm of the gradients."""
        return total_norm_from_norms(self._grad_norms, self._norm_type)

    def values(self) -> Tensor:
        """Returns all numbers of the step in one tensor, which `read` takes apart on the host."""
        total = self.total_norm()
        fraction, loss = (
            number.to(total) if isinstance(number, Tensor) else torch.full_like(total, number)
            for number in (self._nonfinite_fraction, self._loss)
        )
        parts = [torch.stack([fraction, total, loss]), self._grad_norms]
        if self._weight_norms is not None:
            parts.append(self._weight_norms)
            if self._update_norms is not None:
                parts.append(self._update_norms / self._weight_norms.clamp(min=1e-300))
        if self._clipped_norm is not None:
            parts.append(self._clipped_norm.to(total).reshape(1))
        return torch.cat(parts)

    def read(self, host: Sequence[float]) -> LoggedNumbers:
        """Returns the numbers of the step, from its `values` on the host."""
        n = len(self.names)
        fraction, total, loss, *norms = host
        clipped = None if self._clipped_norm is None else norms.pop()
        return LoggedNumbers(fraction, total, loss, norms[:n], norms[n : 2 * n], norms[2 * n :], clipped)

    def scalars(
        self, numbers: LoggedNumbers, charts: ChartGroups, band: tuple[float, float] | None, n_optimizers: int
    ) -> dict[str, float]:
        """Returns the scalars of the step, by tag; a skipped step has no norm."""
        tag = partial(tags.tag, optimizer=self.optimizer_index, of=n_optimizers)
        scalars = {tag(tags.NONFINITE_FRACTION): numbers.nonfinite_fraction}
        if not self.accepted:
            return scalars
        total = numbers.total_norm
        if band is not None:
            low, high = band
            scalars |= {tag(tags.BAND_LOW): low, tag(tags.BAND_TOTAL): total, tag(tags.BAND_HIGH): high}
        charted = {tags.GRAD_NORM: charts.norms(self.names, numbers.grad_norms)}
        if numbers.weight_norms:
            charted[tags.WEIGHT_NORM] = charts.norms(self.names, numbers.weight_norms)
        if numbers.update_ratios:
            pairs = zip(numbers.update_ratios, numbers.weight_norms, strict=True)
            updates = [ratio * weight for ratio, weight in pairs]
            charted[tags.UPDATE_RATIO] = charts.norms(self.names, updates, numbers.weight_norms)
        for form, values in charted.items():
            scalars |= {tag(form, chart): value for chart, value in values.items()}
        if numbers.clipped_norm is not None:
            scalars[tag(tags.CLIPPED_NORM_TOTAL)] = numbers.clipped_norm
        scalars[tag(tags.GRAD_NORM_TOTAL)] = total  # also where a module is called `total`
        return scalars

    def _measure_updates(self, selection: Selection, exact: bool, before: list[Tensor]) -> None:
        torch._foreach_sub_(before, _weights(selection, exact))
        if exact and not selection.is_sharded:
            self._update_norms = selection.norms(before)
            return
        self.is_pending = True
        sums = power_sums(before)
        if not exact:
            of_all = [weight.numel() for weight in _weights(selection, exact=True)]
            sums *= sums.new_tensor(
                [n / max(part.numel(), 1) for n, part in zip(of_all, before, strict=True)]
            )
        self._suite.reduce_over_shards(sums, selection, self._set_update_norms)

    def _measure_clipped(self, selection: Selection) -> None:
        gradients = [p.grad for p in selection.parameters if p.grad is not None]
        if gradients:
            self._clipped_norm = total_norm_from_norms(
                tensor_norms(gradients, self._norm_type), self._norm_type
            )

    def _set_update_norms(self, sums: Tensor) -> None:
        self.is_pending = False
        self._update_norms = norms_from_power_sums(sums)


def _weights(selection: Selection, exact: bool) -> list[Tensor]:
    weights = [local_shard(parameter.detach()) for parameter in selection.parameters]
    return weights if exact else [_some_columns(weight) for weight in weights]


def _some_columns(weight: Tensor) -> Tensor:
    """Returns evenly spread columns of a large matrix, at least 8, so that each row is seen."""
    if weight.ndim < 2 or weight.numel() <= LARGE_MATRIX:
        return weight
    every = min(EVERY_COLUMN, max(weight.shape[1] // 8, 1))
    return weight[:, :: (every - 1) | 1]  # odd, as the columns of one-hot inputs repeat in powers of two


def log_gradient_histograms(trainer: pl.Trainer, gradients: Gradients, charts: ChartGroups) -> None:
    """Logs a histogram of each gradient that has a chart."""
    for i in charts.select(gradients.names):
        values = local_shard(gradients.tensors[i].detach())
        values = values.coalesce().values() if values.is_sparse else values
        finite = values[torch.isfinite(values)].float()
        if finite.numel():
            # TensorBoard takes the histogram of larger values for empty, and raises
            bounded = finite.clamp(-1e18, 1e18).cpu()
            tag = tags.tag(tags.GRAD_HISTOGRAM, gradients.names[i])
            log_histogram(trainer, tag, bounded, batches_that_stepped(trainer))
