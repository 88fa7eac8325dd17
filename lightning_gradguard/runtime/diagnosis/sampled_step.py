"""A step of which a diagnosis takes a sample: its training step is traced, its update measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core import tags
from lightning_gradguard.core.backoff import groups_with_rate
from lightning_gradguard.core.detectors.diagnosis import (
    CLIPPED_AT_ALL,
    Coverage,
    LossBaselines,
    Sample,
    Steps,
    StepTrace,
    TargetDependence,
    Update,
    coverage,
    is_constant,
)
from lightning_gradguard.core.norms import default_norm, local_shard, power_sums, tensor_norms
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.configured_rates import initial_rate
from lightning_gradguard.runtime.diagnosis.permutation import inputs_of, target_of
from lightning_gradguard.runtime.optimizer_hooks import after_next_step, is_scale_free
from lightning_gradguard.runtime.other_clipping import clips_in_code, describe_other_clipper
from lightning_gradguard.runtime.steps.logged_step import LoggedStep
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.suite import Suite
from lightning_gradguard.runtime.training_step import TrainingStep, replace_step, restore_step


class SampledStep:
    """A sample on its way: traced in the training step, completed by the optimizers' steps.

    Attributes:
        now: Step and epoch for incidents.
        uses_targets: True if the training step has used the targets of the batch.
        left: If gradients and weights are as the step before had left them, as `FollowedSteps` has found, and
            the ends of epochs in a row at which weights were reset.

    Args:
        trainer: The Trainer that fits.
        pl_module: Its module.
        batch: The batch that is about to be trained on.
        baselines: Sums over targets.
        dependence: Rows of the batches so far.
        permuted: Losses with the targets, and with permuted ones; `None` if they were not measured.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        baselines: LossBaselines,
        dependence: TargetDependence,
        permuted: Tensor | None,
    ) -> None:
        self.step = lightning_api.batches_that_stepped(trainer)
        self.now = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        self.uses_targets = self._uses_inputs = False
        self.left = torch.zeros(3)
        self._pl_module = pl_module
        self._target = target_of(batch)
        self._inputs = inputs_of(batch, self._target)
        # of more tensors, the last may be a weight or an index
        known = self._inputs if len(tree_leaves(batch)) == 2 else []
        self._of_data = is_constant(self._inputs, self._target), dependence.add(known, self._target)
        self._permuted = permuted
        self._trace: StepTrace | None = None
        self._traced: TrainingStep | None = None
        self._numbers: Tensor | None = None
        self._updates: list[_SampledUpdate] = []
        self._covered: Coverage | None = None
        if not lightning_api.is_compiled(pl_module):
            self._trace = StepTrace(pl_module, batch, baselines)
            self._traced = replace_step(pl_module, partial(self._tracing, self._trace))

    def cover(self, trainer: pl.Trainer, optimizer: Optimizer, steps: Steps | None) -> None:
        """Reads which parameters are trained, right before an optimizer steps; `steps` are of all of them."""
        if not lightning_api.flattens_parameters(trainer):
            called, unregistered = (
                ([], {}) if self._trace is None else (self._trace.layers, self._trace.unregistered)
            )
            self._covered = coverage(
                self._pl_module, optimizer, trainer.optimizers, called, steps, unregistered
            )

    def add_update(self, suite: Suite, trainer: pl.Trainer, step: Step, wants_largest: bool) -> None:
        """Measures the update that an optimizer is about to make, and the largest element if wanted."""
        self._updates.append(_SampledUpdate(suite, trainer, step, wants_largest))

    @property
    def has_stepped(self) -> bool:
        """True if an optimizer has stepped since the sample was begun."""
        return self._covered is not None or bool(self._updates)

    @property
    def is_pending(self) -> bool:
        """True while the norms of an update are not yet summed over shards."""
        return any(update.logged.is_pending for update in self._updates)

    def end_batch(self) -> None:
        """Stops tracing; called at the end of the batch that was traced, or without one."""
        if self._trace is not None and self._numbers is None:
            self._restore()
            trace = self._trace
            numbers = trace.close(self._pl_module.device)
            if self._target is not None:
                self.uses_targets = trace.uses(self._target)
            self._uses_inputs = any(trace.uses(tensor) for tensor in self._inputs)
            self._target, self._inputs = None, []
            self._numbers = numbers

    def close(self) -> None:
        """Stops measuring updates."""
        for update in self._updates:
            update.close()

    def values(self) -> Tensor:
        """Returns all numbers of the sample, on the device."""
        device = self._pl_module.device
        permuted = torch.full((2,), torch.nan, device=device) if self._permuted is None else self._permuted
        permuted = torch.cat([permuted, *(part.to(permuted) for part in (*self._of_data, self.left))])
        traced = torch.zeros(0, device=device) if self._numbers is None else self._numbers
        # with tensor parallelism, numbers of sharded layers are replicated
        parts = [local_shard(part) for part in (permuted, traced, *(u.values() for u in self._updates))]
        self._sizes = [len(part) for part in parts]
        return torch.cat([part.to(device, torch.float64) for part in parts])

    def read(self, host: Sequence[float]) -> Sample:
        """Returns the sample, from its `values` on the host."""
        parts, start = [], 0
        for size in self._sizes:
            parts.append(host[start : start + size])
            start += size
        (plain, permuted, constant, depends, n_rows, keeps, undone, resets), traced, *updates = parts
        sample = Sample(self.step) if self._trace is None else self._trace.sample(self.step, traced)
        sample.permuted = (permuted - plain) / permuted if permuted > 0 else math.nan
        sample.n_updates = self.now["step"]
        sample.n_resets = int(resets)
        sample.keeps_gradients, sample.updates_are_undone = keeps > 0, undone > 0
        sample.inputs_are_constant = self._uses_inputs and constant > 0
        if self._uses_inputs and self.uses_targets and math.isfinite(depends):
            sample.dependence = depends, n_rows
        for update, numbers in zip(self._updates, updates, strict=True):
            update.read_into(sample, numbers)
        if self._covered is not None:
            sample.coverage = self._covered
        return sample

    def nonfinite(self) -> tuple[tuple[str, ...], float]:
        """Returns the parameters with a nonfinite gradient that no callback checks, and their share.

        The sample has been read; updates with a nonfinite norm are not in it.
        """
        if any(update.logged.was_checked for update in self._updates):
            return (), 0.0
        norms = {name: norm for update in self._updates for name, norm in update.norms.items()}
        found = tuple(name for name, norm in norms.items() if not math.isfinite(norm))
        return found[:5], len(found) / max(len(norms), 1)

    def _tracing(self, trace: StepTrace, training_step: TrainingStep) -> TrainingStep:
        def traced(*args: Any, **kwargs: Any) -> Any:
            self._restore()  # a closure that is called again is not traced
            with trace:
                result = training_step(*args, **kwargs)
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if isinstance(loss, Tensor) and loss.requires_grad:
                trace.losses.add_total(loss)
            return result

        return traced

    def _restore(self) -> None:
        if self._traced is not None:
            restore_step(self._pl_module, self._traced)


class _SampledUpdate:
    """The update of one optimizer, and by how much clipping has scaled its gradients."""

    def __init__(self, suite: Suite, trainer: pl.Trainer, step: Step, wants_largest: bool) -> None:
        self.logged = LoggedStep(suite, trainer, step, 2.0, update_ratio=True, exact=False)
        groups = groups_with_rate(step.optimizer)
        self._rates = [float(group["lr"]) for group in groups]
        self._initial_rates = [initial_rate(group) for group in groups]
        self._decay = max(float(group.get("weight_decay", 0)) for group in step.optimizer.param_groups)
        is_sgd = isinstance(step.optimizer, torch.optim.SGD)
        momenta = [float(group["momentum"]) for group in step.optimizer.param_groups if is_sgd]
        self._momentum = max(momenta, default=math.nan)
        self._suite = suite
        self._clipper = describe_other_clipper(trainer)
        self._clips_in_code = clips_in_code(trainer.lightning_module)
        scaler = lightning_api.gradient_scaler(trainer)
        self._loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._resolution = min(torch.finfo(p.dtype).eps / 2 for p in step.selection.parameters)
        self._default_norms = [default_norm([p]) for p in step.selection.parameters]
        self._before = step.gradients.total_norm
        self._largest = torch.full_like(self._before, math.nan)
        if wants_largest and step.accepted and not step.selection.is_sharded:
            largest = tensor_norms(step.gradients.tensors, math.inf).max().to(self._before)
            self._largest = largest / lightning_api.scale_of_gradients(trainer, step.optimizer)
        self._after: Tensor | None = None
        #: Gradient norms by parameter, once they are read.
        self.norms: dict[str, float] = {}
        self._handle: RemovableHandle | None = None
        if not (is_scale_free(step.optimizer) or step.selection.is_sharded or scaler):
            # not before the step: the hook at which gradients are measured runs within its closure
            self._handle = after_next_step(step.optimizer, partial(self._measure_clipped, step))

    def close(self) -> None:
        self.logged.close(0.0)
        if self._handle is not None:
            self._handle.remove()

    def values(self) -> Tensor:
        factor = torch.ones_like(self._before) if self._after is None else self._before / self._after
        return torch.cat([torch.stack([factor, self._largest]), self.logged.values().to(factor)])

    def read_into(self, sample: Sample, numbers: Sequence[float]) -> None:
        factor, largest, *rest = numbers
        found = self.logged.read(rest)
        self.norms = dict(zip(self.logged.names, found.grad_norms, strict=True))
        unclipped = factor if factor >= 1 and math.isfinite(factor) else 1.0
        is_clipped, clipper = unclipped > CLIPPED_AT_ALL, self._clipper
        suite_clips = is_clipped and self._suite_has_clipped()
        if is_clipped and not clipper and (self._clips_in_code or not suite_clips):
            clipper = "code of yours"
        update = Update(
            names=self.logged.names,
            is_matrix=self.logged.is_matrix,
            gradients=found.grad_norms,
            weights=found.weight_norms,
            default_norms=self._default_norms,
            ratios=found.update_ratios,
            unclipped=unclipped,
            rates=self._rates,
            initial_rates=self._initial_rates,
            resolution=self._resolution,
            total_norm=found.total_norm,
            loss=found.loss,
            largest=largest,
            loss_scale=self._loss_scale,
            decay=self._decay,
            momentum=self._momentum,
            clipper=clipper,
            suite_clips=suite_clips,
        )
        if math.isnan(sample.loss):
            sample.loss = found.loss
        if found.weight_norms and math.isfinite(found.total_norm):
            sample.updates.append(update)

    def _suite_has_clipped(self) -> bool:
        return any(member.final_counts().get(tags.CLIPPED_FRACTION, 0) > 0 for member in self._suite.members)

    def _measure_clipped(self, step: Step) -> None:
        gradients = [local_shard(p.grad) for p in step.selection.parameters if p.grad is not None]
        if gradients:
            self._after = power_sums(gradients).sum().sqrt().to(self._before)
