"""A step of which a diagnosis takes a sample: its training step is traced, its update measured."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core.detectors.diagnosis import (
    Coverage,
    LossBaselines,
    Sample,
    Steps,
    StepTrace,
    Symptom,
    Update,
    coverage,
    is_constant,
)
from lightning_gradguard.core.norms import default_norm, local_shard, power_sums, tensor_norms
from lightning_gradguard.core.snapshots import preserve_state, rng_state, set_rng_state
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.replay import training_loss, without_logging
from lightning_gradguard.runtime.optimizer_hooks import after_step
from lightning_gradguard.runtime.other_clipping import describe_other_clipper, suite_clips
from lightning_gradguard.runtime.steps.logged_step import LoggedStep
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.suite import Suite
from lightning_gradguard.runtime.training_step import (
    TrainingStep,
    is_replaced_by_others,
    replace_step,
    restore_step,
)

#: Steps that are sampled, before every `every_n_steps`-th one.
FIRST_STEPS = (0, 1, 2, 5, 10, 20, 35)
#: Interval at the start of training, and the step at which it ends.
DENSE_INTERVAL, DENSE_UNTIL = 25, 250
#: Bytes in which the symptoms of rank 0 reach the other ranks.
MESSAGE_BYTES = 2048
#: Permutations of the targets that are averaged.
N_PERMUTATIONS = 3
#: Keys of targets in a batch that is a dictionary.
_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
#: Optimizers whose update does not depend on the scale of the gradient.
_SCALE_FREE = ("Ada", "NAdam", "RAdam", "RMSprop", "Rprop", "Lion", "Muon", "Shampoo", "SOAP")


def is_sampled(step: int, every_n_steps: int) -> bool:
    """True for the steps of which samples are taken: dense at the start, then at an interval.

    Example:
        >>> [step for step in range(400) if is_sampled(step, 100)]
        [0, 1, 2, 5, 10, 20, 25, 35, 50, 75, 100, 125, 150, 175, 200, 225, 250, 300]
    """
    if step <= DENSE_UNTIL:
        return step in FIRST_STEPS or (step > 0 and step % DENSE_INTERVAL == 0)
    return step % every_n_steps == 0


def next_sample(step: int, every_n_steps: int) -> int:
    """Returns the first of the sampled steps from a step on.

    Example:
        >>> next_sample(36, 100), next_sample(50, 100)
        (50, 50)
    """
    return next(later for later in itertools.count(step) if is_sampled(later, every_n_steps))


def is_compiled(pl_module: nn.Module) -> bool:
    """True if a part of the module is compiled: hooks would change what it computes."""
    return getattr(pl_module, "_compiler_ctx", None) is not None or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in pl_module.modules()
    )


def is_wrapped(pl_module: pl.LightningModule) -> bool:
    """True if the `training_step` of the object has been replaced, by what may count its calls."""
    return is_replaced_by_others(pl_module) and not is_compiled(pl_module)


def is_scale_free(optimizer: Optimizer) -> bool:
    """True if the update of an optimizer does not depend on the scale of the gradient, as far as is known."""
    return type(optimizer).__name__.startswith(_SCALE_FREE)


class SampledStep:
    """A sample on its way: traced in the training step, completed by the optimizers' steps.

    Attributes:
        now: Step and epoch for incidents.
        uses_targets: True if the training step has used the targets of the batch.

    Args:
        trainer: The Trainer that fits.
        pl_module: Its module.
        batch: The batch that is about to be trained on.
        baselines: Sums over targets.
        permuted: Losses with the targets, and with permuted ones; `None` if they were not measured.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        baselines: LossBaselines,
        permuted: Tensor | None,
    ) -> None:
        self.step = lightning_api.batches_that_stepped(trainer)
        self.now = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        self.uses_targets = self._uses_inputs = False
        self._pl_module = pl_module
        self._target = target_of(batch)
        self._inputs = inputs_of(batch, self._target)
        self._is_constant = is_constant(self._inputs, self._target)
        self._permuted = permuted
        self._trace: StepTrace | None = None
        self._traced: TrainingStep | None = None
        self._numbers: Tensor | None = None
        self._updates: list[_SampledUpdate] = []
        self._covered: Coverage | None = None
        if not is_compiled(pl_module):
            self._trace = StepTrace(pl_module, batch, baselines)
            self._traced = replace_step(pl_module, partial(self._tracing, self._trace))

    def cover(self, trainer: pl.Trainer, optimizer: Optimizer, steps: Steps | None) -> None:
        """Reads which parameters are trained, right before an optimizer steps.

        Args:
            trainer: The Trainer that fits.
            optimizer: About to step.
            steps: Of all optimizers; `None` if the fit has just begun.
        """
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
        permuted = torch.cat([permuted, self._is_constant.to(permuted)])
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
        (plain, permuted, constant), traced, *updates = parts
        sample = Sample(self.step) if self._trace is None else self._trace.sample(self.step, traced)
        sample.permuted = (permuted - plain) / permuted if permuted > 0 else math.nan
        sample.inputs_are_constant = self._uses_inputs and constant > 0
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
                return training_step(*args, **kwargs)

        return traced

    def _restore(self) -> None:
        if self._traced is not None:
            restore_step(self._pl_module, self._traced)


class _SampledUpdate:
    """The update of one optimizer, and by how much clipping has scaled its gradients."""

    def __init__(self, suite: Suite, trainer: pl.Trainer, step: Step, wants_largest: bool) -> None:
        self.logged = LoggedStep(suite, trainer, step, 2.0, update_ratio=True)
        self._rates = [float(group["lr"]) for group in step.optimizer.param_groups if "lr" in group]
        self._decay = max(float(group.get("weight_decay", 0)) for group in step.optimizer.param_groups)
        self._clipper = describe_other_clipper(trainer)
        self._suite_clips = suite_clips(trainer)
        scaler = lightning_api.gradient_scaler(trainer)
        self._loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._default_norm = default_norm(step.selection.parameters)
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
            self._handle = after_step(step.optimizer, partial(self._measure_clipped, step))

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
        update = Update(
            names=self.logged.names,
            is_matrix=self.logged.is_matrix,
            gradients=found.grad_norms,
            weights=found.weight_norms,
            default_norm=self._default_norm,
            ratios=found.update_ratios,
            unclipped=factor if factor >= 1 and math.isfinite(factor) else 1.0,
            rates=self._rates,
            total_norm=found.total_norm,
            largest=largest,
            loss_scale=self._loss_scale,
            decay=self._decay,
            clipper=self._clipper,
            suite_clips=self._suite_clips,
        )
        if math.isnan(sample.loss):
            sample.loss = found.loss
        if found.weight_norms and math.isfinite(found.total_norm):
            sample.updates.append(update)

    def _measure_clipped(self, step: Step) -> None:
        gradients = [local_shard(p.grad) for p in step.selection.parameters if p.grad is not None]
        if gradients:
            self._after = power_sums(gradients).sum().sqrt().to(self._before)


def target_of(batch: Any) -> Tensor | None:
    """Returns the targets of a batch that is a pair or has a key for them; `None` if unknown."""
    if isinstance(batch, dict):
        found = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    else:
        found = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) and found.ndim > 0 and len(found) > 1 else None


def inputs_of(batch: Any, target: Tensor | None) -> list[Tensor]:
    """Returns the tensors of a batch that have a row for each target."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf is not target]
    return [leaf for leaf in leaves if target is not None and leaf.ndim > 0 and len(leaf) == len(target)]


def losses_of_permuted(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
) -> Tensor | None:
    """Returns the loss, and the mean loss with permuted targets: alike if they do not depend on each other.

    The passes leave no trace: weights, buffers, random numbers, attributes and logs are as before.

    Returns:
        Shape `(2,)`; `None` where it cannot be measured, NaN for targets that are all alike.
    """
    target = target_of(batch)
    if target is None or not lightning_api.allows_extra_pass(trainer):
        return None
    if is_compiled(pl_module) or is_wrapped(pl_module):
        return None
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(target), generator=generator) for _ in range(N_PERMUTATIONS)]
    is_alike = torch.stack([(target[order] == target).float().mean() > 0.95 for order in orders]).any()
    weights = [(p, p._version, p.detach().clone()) for p in pl_module.parameters()]
    rng = rng_state()

    def loss(order: Tensor | None) -> Tensor:
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        if order is not None:
            chosen = target_of(copied)
            assert chosen is not None
            chosen.copy_(target[order])
        set_rng_state(rng)
        return training_loss(pl_module, copied, batch_idx).detach()

    try:
        with ExitStack() as stack:
            for context in (preserve_state(pl_module), without_logging(pl_module), torch.no_grad()):
                stack.enter_context(context)
            stack.enter_context(trainer.precision_plugin.train_step_context())
            plain = loss(None)
            permuted = torch.stack([loss(order) for order in orders]).mean()
    except Exception:  # a step that needs gradients, or a batch that is no pair
        return None
    finally:
        with torch.no_grad():
            for weight, version, saved in weights:
                if weight._version != version:
                    weight.copy_(saved)
    return torch.where(is_alike, torch.nan, torch.stack([plain, permuted]).float())


def encoded(symptoms: Sequence[Symptom], device: torch.device) -> Tensor:
    """Returns symptoms as a vector of fixed length, for the other ranks."""
    message: list[Any] = []
    for symptom in symptoms:
        fields = [symptom.kind, symptom.cause, symptom.where, symptom.value, symptom.evidence]
        fields += [symptom.tier, symptom.since]
        if len(json.dumps([*message, fields]).encode()) <= MESSAGE_BYTES:
            message.append(fields)
    raw = json.dumps(message).encode().ljust(MESSAGE_BYTES)
    return torch.tensor(list(raw), dtype=torch.float64, device=device)


def decoded(numbers: Sequence[float]) -> list[Symptom]:
    """Returns the symptoms of a vector.

    Example:
        >>> symptom = Symptom("stuck_loss", "unknown", ("head",), 1.0, "flat", "stuck", since=7)
        >>> decoded(encoded([symptom], torch.device("cpu")).tolist()) == [symptom]
        True
    """
    message = json.loads(bytes(int(round(number)) for number in numbers))
    return [
        Symptom(kind, cause, tuple(where), value, evidence, tier, since=since)
        for kind, cause, where, value, evidence, tier, since in message
    ]
