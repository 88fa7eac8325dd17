"""The largest stable learning rate, measured by a few real steps after which everything is restored."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_gradguard.core.initialization.findings import Finding, Severity
from lightning_gradguard.core.snapshots import preserve_state, preserve_weights

#: Steps of a trial, those after which the loss is compared each time, and the batches on which it is. With
#: momentum, a step has its full length after about 1 / (1 - momentum) steps.
TRIAL_STEPS, COMPARED_EVERY, HELD_OUT = 36, 12, 4
#: Share of the loss by which it may rise: where there is nothing to learn in a few steps, any rate raises it;
#: and the share of the progress so far that it may lose: that of a dead network is not above its start.
NOISE, LOST = 0.01, 0.5
#: Ratios of the configured to the largest stable rate from which on it is too high, warn and fail, if the
#: loss rises by half at least. Of 123 pairs of a cell and a rate beyond the first (docs/stable_rate.md), 3
#: train, and of 76 beyond the second none.
TOO_HIGH, RISE = (4.0, 8.0), 1.5
#: Factor on these ratios for a rate that is warmed up: its stable peak is up to 3 times as high.
WARMED_UP = 3.0
#: Ratio below which a rate is too low, if all planned steps, or a thousand where these are fewer, would lower
#: the loss by less than this share.
TOO_LOW, MIN_PROGRESS, FEW_STEPS = 1e-3, 0.01, 1000
#: Rates are tried within so many powers of 2 of the configured one.
MAX_EXPONENT = 130
#: Shares of the largest stable rate that are tried for one that is too high, and too low.
SHARES_BELOW, SHARES_ABOVE = (1 / 4, 1 / 40), (1 / 30, 1 / 300, 1 / 3000)
#: Decades by which the steps of a trial shrink the gradient at the first layer, relative to that at the last,
#: where the rate is too high; those at a tenth of it, where that helps; and the share of the loss left.
SHRUNK, USUAL_SHRUNK, LEFT = 1.0, 0.5, 0.9


@dataclass(frozen=True)
class RateTrial:
    """Real steps of an optimizer at other learning rates than its own.

    Args:
        module: The network.
        optimizer: Its optimizer; a copy of it steps.
        loss_of: Computes the training loss of a batch, shape `()`.
        batches: Batches of the steps; of each step as many as it accumulates.
        held_out: Batches on which the loss is compared with that before the steps.
        rates: Learning rate of each parameter group that a factor of 1 stands for.
        clip: Clips the gradients of an optimizer, as the run will.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> loss = lambda x: (network(x) - x.sum(1, keepdim=True)).square().mean()
        >>> held_out, batches = torch.randn(4, 64, 2), torch.randn(8, 1, 64, 2)
        >>> sgd = torch.optim.SGD(network.parameters(), 1.0)
        >>> trial = RateTrial(network, sgd, loss, batches, held_out, [1.0])
        >>> rises(trial.path(0.1)), rises(trial.path(10.0))
        (False, True)
    """

    module: nn.Module
    optimizer: Optimizer
    loss_of: Callable[[Any], Tensor]
    batches: Sequence[Sequence[Any]]
    held_out: Sequence[Any]
    rates: Sequence[float]
    clip: Callable[[Optimizer], None] = lambda optimizer: None

    def best(self, factors: Iterable[float]) -> tuple[float, float] | None:
        """Returns the largest factor whose loss is the lowest but for noise, and by how much it changes.

        `None` if all raise it.
        """
        tried = ((self.path(factor), factor) for factor in factors)
        ends = [(path[-1], factor, path[0]) for path, factor in tried if not rises(path)]
        if not ends:
            return None
        lowest = min(after for after, _, _ in ends)
        after, factor, before = max(
            (e for e in ends if e[0] <= lowest + NOISE * abs(e[2])), key=lambda e: e[1]
        )
        return factor, (after - before) / max(abs(before), 1e-45)

    def losses(self, factor: float) -> tuple[float, float]:
        """Returns the first and the last loss of a path."""
        path = self.path(factor)
        return path[0], path[-1]

    def path(self, factor: float, watch: Callable[[], None] = lambda: None) -> list[float]:
        """Returns the mean losses of the held-out batches before the steps, and after every 12 of them.

        It ends where the loss has risen; NaN if it diverged. `watch` runs before the steps, and after them
        before all is restored: weights, gradients, buffers, optimizer state and random numbers.
        """
        with preserve_weights(self.module), preserve_state(self.module), torch.enable_grad():
            path: list[float] = []
            try:
                path.append(self._held_out_loss())
                watch()
                for loss in self._losses_after_steps(factor):
                    path.append(loss)
                    if rises(path):
                        break
                watch()
            except Exception:  # of code that does not take what weights at this rate give
                path += [math.nan] * max(2 - len(path), 1)
            return path

    def _losses_after_steps(self, factor: float) -> Iterator[float]:
        optimizer = optimizer_copy(self.optimizer)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            is_tensor = isinstance(group["lr"], Tensor)
            group["lr"] = torch.full_like(group["lr"], rate * factor) if is_tensor else rate * factor
        torch.manual_seed(0)
        for number, batches in enumerate(self.batches, 1):
            for parameter in self.module.parameters():
                parameter.grad = None
            for batch in batches:
                loss = self.loss_of(_fresh(batch)) / len(batches)
                if not bool(loss.isfinite()):
                    yield math.nan
                    return
                loss.backward()  # type: ignore[no-untyped-call]
            self.clip(optimizer)
            _step_of(optimizer)(optimizer)
            if number % COMPARED_EVERY == 0 or number == len(self.batches):
                yield self._held_out_loss()

    def _held_out_loss(self) -> float:
        """Returns the mean loss of the held-out batches, with the same random numbers at each call."""
        torch.manual_seed(0)
        losses = [float(self.loss_of(_fresh(batch)).detach()) for batch in self.held_out]
        return sum(losses) / len(losses)


def rises(path: Sequence[float]) -> bool:
    """True if the last loss is above the lowest before it, by more than noise and half of the progress."""
    *before, last = path
    lowest = min(before)
    return not last <= lowest + NOISE * abs(path[0]) + LOST * (path[0] - lowest)


def largest_stable_factor(is_stable: Callable[[float], bool]) -> float | None:
    """Returns about the largest factor that is stable, from a few trials.

    Gaps double until an answer differs from that for 1; then they are halved, down to a factor of 2. The
    geometric mean of the last stable and the first unstable factor is returned; infinity if all are stable,
    and `None` if none is.

    Example:
        >>> f"{largest_stable_factor(lambda factor: factor < 100):.3g}"
        '90.5'
    """
    starts_stable = is_stable(1.0)
    sign = 1 if starts_stable else -1
    near, gap = 0, 1
    while True:
        far = near + sign * gap
        if abs(far) > MAX_EXPONENT:
            return math.inf if starts_stable else None
        if is_stable(2.0**far) is not starts_stable:
            break
        near, gap = far, 2 * gap
    stable, unstable = (near, far) if starts_stable else (far, near)
    while unstable - stable > 1:
        middle = (stable + unstable) // 2
        stable, unstable = (middle, unstable) if is_stable(2.0**middle) else (stable, middle)
    return float(2 ** (stable + 0.5))


def rate_finding(
    name: str,
    rate: float,
    factor: float | None,
    losses: tuple[float, float],
    n_steps: float,
    *,
    warms_up: bool = False,
) -> Finding | None:
    """Returns a finding if a learning rate is too high, or far too low; `None` where that is not certain.

    Args:
        name: The parameter group that has it.
        rate: The configured one, at the peak of its schedule.
        factor: The largest stable rate over this one, from `largest_stable_factor`.
        losses: Before and after a trial at this rate, from `RateTrial.losses`.
        n_steps: Planned steps of the run; infinity if unknown.
        warms_up: True if the schedule begins well below its peak.

    Example:
        >>> finding = rate_finding("param_groups[0]", 0.1, 0.044, (2.3, 90.0), 1000)
        >>> finding.describe()
        'learning_rate_too_high of param_groups[0]: 0.1, usual: at most about 0.0044 (36 steps on a copy)'
    """
    if factor is None or factor == math.inf:
        return None
    before, after = losses
    bound = f"about {rate * factor:.2g} ({TRIAL_STEPS} steps on a copy)"
    warn, fail = (ratio * (WARMED_UP if warms_up else 1.0) for ratio in TOO_HIGH)
    rises = not after <= before + (RISE - 1) * abs(before)
    if rises and factor <= 1 / warn:
        severity: Severity = "fail" if factor <= 1 / fail else "warn"
        return Finding("learning_rate_too_high", name, rate, f"at most {bound}", severity)
    progress = (before - after) * max(n_steps, FEW_STEPS) / TRIAL_STEPS
    if factor >= 1 / TOO_LOW and progress < MIN_PROGRESS * abs(before):
        return Finding("learning_rate_too_low", name, rate, f"closer to {bound}", "warn")
    return None


def shrunk(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Returns by how many decades steps have shrunk the gradient at the first layer more than at the last.

    Args:
        before: Gradient at each layer's output, in the order of their calls.
        after: The same after the steps.

    Example:
        >>> shrunk({"first": 1e-3, "last": 1e-2}, {"first": 1e-6, "last": 1e-3})
        2.0
    """
    common = [name for name in before if before[name] > 0 and name in after]
    if len(common) < 2:
        return 0.0
    first, last = (math.log10(before[name] / max(after[name], 1e-45)) for name in (common[0], common[-1]))
    return round(first - last, 6)


def optimizer_copy(optimizer: Optimizer) -> Optimizer:
    """Returns an optimizer with the same parameters and a state of its own, without hooks and schedulers."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memo = {id(parameter): parameter for parameter in parameters}
    found = type(optimizer).__new__(type(optimizer))
    # not by `copy.deepcopy` of the whole, which omits what a subclass adds, and keeps a patched `step`
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            found.__dict__[name] = OrderedDict()
        elif name != "step":
            found.__dict__[name] = copy.deepcopy(value, memo)
    return found


def _step_of(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    """Returns the step of an optimizer's class, without what torch wraps around it to call global hooks."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def _fresh(batch: Any) -> Any:
    """Returns a copy of a batch, into which a step may write."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
