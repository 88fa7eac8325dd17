"""Runs one batch through `training_step` again, without a trace in the Trainer."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import filterfalse
from operator import attrgetter
from statistics import fmean, median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_gradguard.core.backoff import AS_HIGH
from lightning_gradguard.core.forensics import Origin, OutOfRange, investigate
from lightning_gradguard.core.forensics.trace import is_nonfinite
from lightning_gradguard.core.snapshots import (
    Snapshot,
    StepRandomness,
    preserve_state,
    preserve_weights,
    set_rng_state,
)
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import gather_objects, world_size
from lightning_gradguard.runtime.incidents.invalid_batches import is_check_of_values
from lightning_gradguard.runtime.incidents.lost_batches import tensors_of
from lightning_gradguard.runtime.lightning_packages import FRAMEWORKS
from lightning_gradguard.runtime.training_step import own_step

_VERSION = attrgetter("_version")
#: Times the loss at a snapshot that the loss of a batch has with its weights if the data have become harder.
HARDER = 2.0


@dataclass(slots=True)
class SeenBatch:
    """A batch as `training_step` gets it.

    Args:
        batch: From the data loader, on the device; a dictionary as a copy, of which a step may take entries.
        batch_idx: Its place in the epoch.
        rng: State of the random number generators just before, from `core.snapshots.StepRandomness`.
        step: `trainer.global_step` then.
        indices: Of its samples in the data set; empty if unknown.
        tensors: In the batch; empty if unknown.
        versions: Their version counters.
    """

    batch: Any
    batch_idx: int
    rng: dict[str, Any]
    step: int
    indices: Sequence[int] = ()
    tensors: Sequence[Tensor] = ()
    versions: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Keeps entries that the step takes out of the batch."""
        self.batch = copy.copy(self.batch) if isinstance(self.batch, dict) else self.batch

    @property
    def is_unchanged(self) -> bool:
        """True if the batch holds the same tensors, and none of them has been written to since."""
        if not self.tensors:
            return True
        present = tensors_of(self.batch)
        is_same = list(map(id, present)) == list(map(id, self.tensors))
        return is_same and self.versions == versions_of(present)


def versions_of(tensors: Sequence[Tensor]) -> Sequence[int]:
    """Returns the version counters of tensors, as far as they have one."""
    return list(map(_VERSION, filterfalse(Tensor.is_inference, tensors)))


def obstacle(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    """Returns why no batch can be run again, as a sentence; `None` if it can."""
    if lightning_api.takes_iterator(pl_module):
        return "The batch was not run again: training_step takes it from the iterator."
    if not lightning_api.allows_extra_pass(trainer):
        return f"The batch was not run again: {type(trainer.strategy).__name__} shards the network."
    if world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.modules()):
        return "The batch was not run again: SyncBatchNorm synchronizes with the other ranks."
    return None


def replay(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    seen: SeenBatch,
    out_of_range: Mapping[str, OutOfRange],
) -> Origin:
    """Runs a batch again, forward and backward, and finds the origin of its first nonfinite value.

    Nothing is logged, no optimizer steps, and weights, gradients, buffers and random numbers are restored. If
    the step could not be run, the origin is `"unknown"`, with the reason.
    """
    if not seen.is_unchanged:
        return Origin("unknown", detail="The step changes its batch in place: it could not be run again.")
    scaler = lightning_api.gradient_scaler(trainer)
    scale = scaler.get_scale() if scaler is not None else 1.0
    parameters = [p for p in pl_module.parameters() if p.requires_grad]
    randomness = StepRandomness()

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        set_rng_state(seen.rng)
        randomness.before_step()
        results = run_step()
        randomness.after_step()
        return results

    def run_step() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        for parameter in parameters:
            parameter.grad = None
        with trainer.precision_plugin.train_step_context():
            if pl_module.automatic_optimization:
                loss = training_loss(pl_module, seen.batch, seen.batch_idx)
                gradients = _accumulate(loss * scale, parameters)
                if not any(map(is_nonfinite, gradients)):
                    pl_module.on_after_backward()  # which may write gradients
                return [loss], [*gradients, *_accumulated(parameters)]
            with _manual_optimization(pl_module, scale) as (losses, gradients):
                _training_step(pl_module, seen.batch, seen.batch_idx)
                return losses, [*gradients, *_accumulated(parameters)]

    try:
        with without_logging(pl_module), _gradients_restored(pl_module), _at_step(trainer, seen.step):
            # of several ranks, only those with finite batches would run theirs once more
            origin = investigate(
                pl_module,
                run,
                seen.batch,
                out_of_range=out_of_range,
                repeats_finite=world_size() == 1,
                frameworks=FRAMEWORKS,
            )
    except Exception as error:
        return Origin("unknown", detail=f"The batch could not be run again: {error!r}")
    if origin.cause == "transient" and randomness.draws_on_host and "numpy" not in seen.rng:
        return Origin(
            "unknown", detail="The step has begun to draw from NumPy or Python: it could not be run again."
        )
    return origin


def rises_with_data(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loss: float,
    window: Sequence[SeenBatch],
    snapshot: Snapshot,
) -> bool:
    """True if the loss of a step is as high with the weights of a snapshot, on its batches. Collective.

    Then a rollback would not lower it. Where these batches are harder than those of then, it is enough if the
    data explain half of the rise, in decades. False where no batch is kept, or none can be run again.
    """
    may_run = pl_module.automatic_optimization and obstacle(trainer, pl_module) is None
    # of one rank alone, a step that communicates would wait for ever
    if not all(gather_objects(may_run and all(seen.is_unchanged for seen in window))):
        return False
    losses = _losses_at(trainer, pl_module, window, snapshot)
    by_rank: list[list[float]] = gather_objects(losses)
    if not all(by_rank):
        return False
    before = fmean(fmean(losses) for losses in by_rank) / trainer.accumulate_grad_batches
    usual = median(snapshot.losses) if snapshot.losses else math.inf
    is_harder = 0 < HARDER * usual < before
    return before >= (min(AS_HIGH * loss, math.sqrt(usual * loss)) if is_harder else AS_HIGH * loss)


@contextmanager
def without_logging(pl_module: pl.LightningModule) -> Iterator[None]:
    """Discards what `training_step` logs and prints."""
    nowhere: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with _patched(pl_module, log=nowhere, log_dict=nowhere, print=nowhere):
        yield


def training_loss(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Returns the one loss that `training_step` returns for a batch, shape `()`.

    Raises:
        TypeError: If it returns something else.
    """
    output = _training_step(pl_module, batch, batch_idx)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"training_step returned {type(output).__name__}, and not one loss")
    return loss.reshape(())


def training_loss_or_nan(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Returns the loss of a batch, shape `()`; NaN if a function rejects what the network gives it.

    The layers have run by then, so that what follows which layer can be traced.

    Raises:
        TypeError: If the step returns something else than one loss.
    """
    try:
        return training_loss(pl_module, batch, batch_idx)
    except Exception as error:
        if not is_check_of_values(error):
            raise
        return torch.full((), torch.nan, device=pl_module.device)


def loss_without_trace(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Returns the loss of a batch, shape `()`; under manual optimization the sum of those differentiated.

    Nothing steps; buffers, random numbers and logs are the caller's to preserve.

    Raises:
        TypeError: If the step has no loss.
    """
    if pl_module.automatic_optimization:
        return training_loss_or_nan(pl_module, batch, batch_idx).detach()
    with torch.enable_grad(), _manual_optimization(pl_module, 1.0) as (losses, _):
        _training_step(pl_module, batch, batch_idx)
    if not losses:
        raise TypeError("training_step calls manual_backward with no loss")
    return torch.stack([loss.detach().reshape(()) for loss in losses]).sum()


def _losses_at(
    trainer: pl.Trainer, pl_module: pl.LightningModule, window: Sequence[SeenBatch], snapshot: Snapshot
) -> list[float]:
    """Returns the losses of batches with the trained weights of a snapshot; none where they cannot be run.

    Frozen weights and buffers are as they are, as those of a network that makes the targets. The passes leave
    no trace.
    """
    losses: list[float] = []
    try:
        with preserve_weights(pl_module), preserve_state(pl_module), without_logging(pl_module):
            trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
            for _, now, before in snapshot.compare(trained, ()):
                now.detach().copy_(before)
            for seen in window:
                set_rng_state(seen.rng)
                with _at_step(trainer, seen.step), trainer.precision_plugin.train_step_context():
                    losses.append(float(training_loss(pl_module, seen.batch, seen.batch_idx).detach()))
    except Exception:  # a step that differs the second time, or memory that is short
        return []
    return losses


def _training_step(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Any:
    step = own_step(pl_module)
    wants = inspect.signature(step).parameters
    batch = tree_map(lambda leaf: leaf, batch)  # a step may take entries out of a batch that is run again
    return step(batch, batch_idx) if len(wants) > 1 else step(batch)


def _accumulate(loss: Tensor, parameters: Sequence[nn.Parameter], **options: Any) -> list[Tensor]:
    """Adds the gradients of a loss to those of the parameters, and returns them."""
    # not `backward`, which would trigger the hooks of DistributedDataParallel
    found = torch.autograd.grad(loss, parameters, allow_unused=True, **options)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return [gradient for gradient in found if gradient is not None]


def _accumulated(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


@contextmanager
def _manual_optimization(
    pl_module: pl.LightningModule, scale: float
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Runs manual optimization in which losses are differentiated and nothing steps.

    Weights that the step itself writes, and gradients, are restored.
    """
    losses: list[Tensor] = []
    gradients: list[Tensor] = []

    def manual_backward(loss: Tensor, *_: Any, **options: Any) -> None:
        options = {k: v for k, v in options.items() if k in ("retain_graph", "create_graph")}
        losses.append(loss)
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        gradients.extend(_accumulate(loss * scale, trained, **options))

    def idle(found: Any) -> Any:
        return [_Idle(one) for one in found] if isinstance(found, list) else _Idle(found)

    optimizers, schedulers = pl_module.optimizers, pl_module.lr_schedulers
    with (
        preserve_weights(pl_module),
        _patched(
            pl_module,
            manual_backward=manual_backward,
            optimizers=lambda *a, **k: idle(optimizers(*a, **k)),
            lr_schedulers=lambda *a, **k: idle(schedulers(*a, **k)),
            clip_gradients=lambda *_, **__: None,
        ),
    ):
        yield losses, gradients


class _Idle:
    """An optimizer or a scheduler that does not step."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return closure() if closure is not None else None


@contextmanager
def _at_step(trainer: pl.Trainer, step: int) -> Iterator[None]:
    before = lightning_api.set_global_step(trainer, step)
    try:
        yield
    finally:
        lightning_api.set_global_step(trainer, before)


@contextmanager
def _gradients_restored(pl_module: nn.Module) -> Iterator[None]:
    before = [(p, p.grad, p.requires_grad) for p in pl_module.parameters()]
    try:
        yield
    finally:
        for parameter, gradient, requires_grad in before:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)


@contextmanager
def _patched(pl_module: nn.Module, **methods: Any) -> Iterator[None]:
    own = pl_module.__dict__
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)
