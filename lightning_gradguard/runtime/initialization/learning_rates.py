"""The learning rate that a run is configured with, and a trial of it before step 1."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradguard.core.forensics import parts_of, parts_out_of_scale, standardizing
from lightning_gradguard.core.initialization import Finding
from lightning_gradguard.core.initialization.rate_trial import (
    HELD_OUT,
    LEFT,
    NOISE,
    SHARES_ABOVE,
    SHARES_BELOW,
    SHRUNK,
    TRIAL_STEPS,
    USUAL_SHRUNK,
    RateTrial,
    largest_stable_factor,
    optimizer_copy,
    rate_finding,
    rises,
    shrunk,
)
from lightning_gradguard.core.snapshots import preserve_randomness
from lightning_gradguard.runtime.configured_rates import initial_rate
from lightning_gradguard.runtime.diagnosis.traced_pass import traced_pass
from lightning_gradguard.runtime.incidents.replay import training_loss, without_logging
from lightning_gradguard.runtime.lightning_api import (
    REPEATS_CLOSURE,
    allows_extra_pass,
    batch_on_device,
    is_compiled,
    overrides,
    takes_iterator,
)
from lightning_gradguard.runtime.optimizer_hooks import NO_CURE, largest_usual_rate

#: Factor on the largest usual rate from which on numbers may overflow before a loss rises.
OVERFLOWS = 1e3
#: Steps of a schedule that are followed.
MAX_SCHEDULED = 100_000
#: Batches that are accumulated in a step of the trial, at most; those that are held, and beyond so many of
#: them their bytes.
MAX_ACCUMULATED, MAX_HELD, FEW, MAX_BYTES = 8, 100, 16, 2**30
#: Losses along the steps of a trial, and the gradients at layers before and after them.
_Followed = tuple[list[float], list[dict[str, float]]]


def reason_against_trial(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Returns what forbids to try rates on a copy; empty if nothing does."""
    optimizers = trainer.optimizers
    if not pl_module.automatic_optimization:
        return "manual optimization"
    if len(optimizers) != 1:
        return f"{len(optimizers)} optimizers"
    if trainer.world_size > 1 or not allows_extra_pass(trainer):
        return f"{type(trainer.strategy).__name__} with {trainer.world_size} processes"
    if takes_iterator(pl_module):
        return "training_step(dataloader_iter), which takes its batches itself"
    kind = type(optimizers[0]).__name__
    if isinstance(optimizers[0], REPEATS_CLOSURE):
        return f"{kind}, which evaluates the loss several times a step"
    if overrides(pl_module, "optimizer_step"):
        return "an optimizer_step of the module's own"
    if not all(isinstance(group.get("lr"), float | int | Tensor) for group in optimizers[0].param_groups):
        return f"{kind} without a learning rate"
    return ""


def peak_rates(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[float]:
    """Returns the highest learning rate of each parameter group of the one optimizer.

    Copies of the schedulers step as often as the run will, at most 100,000 times. A scheduler that lowers the
    rate on a plateau, or that cannot be copied, or that the module steps by a hook of its own, is not
    followed: the rate is that at the start.
    """
    optimizer = trainer.optimizers[0]
    peaks = _rates(optimizer)
    configs = [c for c in trainer.lr_scheduler_configs if not c.reduce_on_plateau]
    if overrides(pl_module, "lr_scheduler_step") or not configs:
        return peaks
    followed = optimizer_copy(optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer does not step in between
            schedulers = copy.deepcopy([config.scheduler for config in configs], {id(optimizer): followed})
            for config, scheduler in zip(configs, schedulers, strict=True):
                n = planned_steps(trainer)
                if config.interval == "epoch":
                    n /= max(trainer.num_training_batches / trainer.accumulate_grad_batches, 1)
                for _ in range(int(min(n / config.frequency, MAX_SCHEDULED))):
                    scheduler.step()
                    peaks = [*map(max, peaks, _rates(followed))]
    except Exception:
        return _rates(optimizer)
    return peaks


def try_rates(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
) -> tuple[list[Finding], dict[str, float], str]:
    """Tries rates before the first step; returns findings, and the peak and the largest stable rate by name.

    Weights, optimizer, buffers and random numbers are as before afterwards. The third is the reason if there
    is no largest stable rate.
    """
    rates = peak_rates(trainer, pl_module)
    if not max(rates, default=0.0) > 0:
        return [], {}, "the learning rate is 0" if rates else "there is no optimizer"
    trial = _trial(trainer, pl_module, batch, batch_idx, rates)

    @cache
    def follow(factor: float) -> _Followed:
        seen: list[dict[str, float]] = []
        return trial.path(factor, partial(_watch, trainer, pl_module, trial, seen)), seen

    def is_stable(factor: float) -> bool:
        path, seen = follow(factor)
        is_cut_off = len(seen) == 2 and path[-1] >= LEFT * path[0] and shrunk(*seen) > USUAL_SHRUNK
        return not (rises(path) or is_cut_off)

    path, _ = follow(1.0)
    losses = path[0], path[-1]
    if not math.isfinite(losses[0]):
        return [], {}, "the loss of the next batches is nonfinite, or cannot be computed"
    factor = largest_stable_factor(is_stable)
    group = max(range(len(rates)), key=lambda i: rates[i])
    name, rate = f"optimizer.param_groups[{group}]", rates[group]
    values = {"learning_rate": rate}
    usual = largest_usual_rate(trainer.optimizers[0]) / rate
    reason = _without_end(trial, factor, usual)
    if factor is not None and not reason:
        values["largest_stable_rate"] = rate * factor
    warms_up = _rates(trainer.optimizers[0])[group] < rate / 2
    steps = planned_steps(trainer)
    finding = rate_finding(name, rate, factor, losses, steps, warms_up=warms_up)
    if finding is None:
        finding = None if warms_up else _shrinking(follow, name, rate)
        if finding is None:
            return [], values, reason
        values.pop("largest_stable_rate", None)
        reason = "the loss does not rise at those that cut the first layers off either"
        factor = 4 / 10
    if scales := parts_out_of_scale(parts_of(batch)):
        # a rate that fits this scale does not fit all that does not depend on it
        return [replace(finding, cure=f"{standardizing(scales)}; then check again")], values, reason
    is_high = finding.criterion == "learning_rate_too_high"
    if factor is not None and factor < NO_CURE * usual:
        cure = (
            f"no rate as low as that: the loss ({losses[0]:.3g}) or its gradient is out of scale; look for a "
            "sum where the loss needs a mean, for a power, exp or division in it, and for what the step "
            "multiplies"
        )
        return [replace(finding, cure=cure)], values, reason
    factors = [share * (factor or 1.0) for share in (SHARES_BELOW if is_high else SHARES_ABOVE)]
    # a rate that is not usual has to be better than those that are
    best = trial.best(f for f in {*factors, usual} if f <= usual and (f < 1 if is_high else f > 1))
    if best is None or not best[1] < -NOISE:
        best = trial.best(factors) or best
    if not is_high and (best is None or not best[1] < -NOISE):
        return [], values, reason  # a higher rate does not help either
    if best is not None:
        finding = replace(
            finding,
            expected=f"about {rate * best[0]:.1g} ({TRIAL_STEPS} steps on a copy)",
            cure=_cure(pl_module, trainer.optimizers[0], group, rate, best[0]),
            is_tried=True,
        )
    return [finding], values, reason


def _without_end(trial: RateTrial, factor: float | None, usual: float) -> str:
    """Returns why rates are not stable up to a factor and unstable beyond; empty if they are."""
    if factor is None:
        return "the loss rises at all that were tried"
    if factor == math.inf:
        return "the loss rises at none that was tried"
    is_overflow = factor > OVERFLOWS * usual and not math.isfinite(trial.losses(factor * 2**0.5)[1])
    return "numbers overflow before the loss rises" if is_overflow else ""


def _shrinking(follow: Callable[[float], _Followed], name: str, rate: float) -> Finding | None:
    """Returns a finding if the steps shrink the gradient at the first layer, and those at a tenth do not."""
    path, gradients = follow(1.0)
    if len(gradients) < 2 or path[-1] < LEFT * path[0] or shrunk(*gradients) < SHRUNK:
        return None
    _, gradients = follow(0.1)
    if len(gradients) < 2 or shrunk(*gradients) > USUAL_SHRUNK:
        return None
    return Finding("learning_rate_too_high", name, rate, f"at most about {rate / 10:.1g}", "warn")


def _watch(
    trainer: pl.Trainer, pl_module: pl.LightningModule, trial: RateTrial, found: list[dict[str, float]]
) -> None:
    """Adds the gradient at each layer's output on a held-out batch; nothing of compiled code."""
    if is_compiled(pl_module):
        return
    batch = copy.deepcopy(trial.held_out[0])
    sample = traced_pass(pl_module, batch, lambda: trial.loss_of(batch), backward=True)
    found.append(sample.output_gradients())


def _trial(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, rates: Sequence[float]
) -> RateTrial:
    """Returns a trial on the first batch and those that follow, clipped as in training."""

    def loss_of(one: Any) -> Tensor:
        with without_logging(pl_module), trainer.precision_plugin.train_step_context():
            return training_loss(pl_module, one, batch_idx)

    def clip(copied: Optimizer) -> None:
        value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        pl_module.configure_gradient_clipping(copied, value, algorithm)

    per_step = min(trainer.accumulate_grad_batches, MAX_ACCUMULATED)
    batches = [batch, *_further_batches(trainer, min(TRIAL_STEPS * per_step + HELD_OUT, MAX_HELD) - 1)]
    n_held_out = min(HELD_OUT, max(len(batches) // 3, 1))
    held_out, rest = batches[-n_held_out:], batches[:-n_held_out] or batches
    steps = [[rest[(i * per_step + j) % len(rest)] for j in range(per_step)] for i in range(TRIAL_STEPS)]
    return RateTrial(pl_module, trainer.optimizers[0], loss_of, steps, held_out, rates, clip)


def _cure(pl_module: pl.LightningModule, optimizer: Optimizer, group: int, peak: float, factor: float) -> str:
    """Returns the argument of the user's that sets the peak of a rate to that times a factor."""
    of_group = optimizer.param_groups[group]
    if "max_lr" in of_group:
        return f"max_lr={peak * factor:.1g}  # of the scheduler, in place of {peak:g}"
    rate = initial_rate(of_group)
    named = (
        name for name, value in pl_module.hparams.items() if value == rate and not isinstance(value, bool)
    )
    name = next(named, "lr")
    owner = type(pl_module).__name__ if name in pl_module.hparams else type(optimizer).__name__
    return f"{name}={rate * factor:.1g}  # of {owner}, in place of {rate:g}"


def planned_steps(trainer: pl.Trainer) -> float:
    """Returns the number of steps of the run; infinity if it is unknown."""
    try:
        return float(trainer.estimated_stepping_batches)
    except Exception:  # of a loader without a length, or without a limit
        return math.inf


def _further_batches(trainer: pl.Trainer, n: int) -> list[Any]:
    """Returns batches of another order of the data, at most `n`; none of data that cannot be indexed.

    They are read here and not by the loader, whose workers may be those of the running epoch.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return []
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    is_known = all(type(s).__module__ == "torch.utils.data.sampler" for s in (sampler, loader.sampler))
    found: list[Any] = []
    n_bytes = 0
    with preserve_randomness(loader.sampler):
        for indices in islice(sampler, n) if is_known else ():
            if len(found) >= FEW and n_bytes > MAX_BYTES:
                break
            found.append(batch_on_device(trainer, _collated(loader, indices)))
            n_bytes += sum(leaf.nbytes for leaf in tree_leaves(found[-1]) if isinstance(leaf, Tensor))
    return found


def _collated(loader: DataLoader[Any], indices: Any) -> Any:
    if loader.batch_sampler is None:
        return loader.collate_fn(loader.dataset[indices])
    return loader.collate_fn([loader.dataset[i] for i in indices])


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]
