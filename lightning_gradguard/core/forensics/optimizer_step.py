"""Code around the step of an optimizer that makes NaN where gradients are 0."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.core.forensics.faults import FAULTS
from lightning_gradguard.core.forensics.operations import known_fault, short_name
from lightning_gradguard.core.forensics.origin import FLIP, Origin, located
from lightning_gradguard.core.forensics.records import OperationRecord, nonfinite_sources
from lightning_gradguard.core.forensics.trace import OperationTrace, is_nonfinite
from lightning_gradguard.core.snapshots import preserve_weights, rng_state, set_rng_state

#: Optimizers whose updates are about as long as the learning rate, whatever the gradient is.
_BOUNDED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


def origin_in_optimizer_step(
    healthy: Iterable[tuple[str, Tensor, Tensor]],
    optimizers: Iterable[Optimizer],
    hooks: Mapping[str, Callable[[Optimizer], Any]] | None = None,
    frameworks: Sequence[str] = (),
) -> Origin | None:
    """Finds code of the user's own that wrote NaN in an optimizer's step, by a trial with gradients of 0.

    Args:
        healthy: Name, current value and healthy value of parameters.
        optimizers: Those that train them. A copy of one that is not torch's own makes the trial.
        hooks: What is run before a step, by name; it may write gradients.
        frameworks: Folders with code that is never the user's.

    Returns:
        The origin; `None` unless weights are NaN throughout, and the trial makes one of them or its gradient
        nonfinite.

    Example:
        >>> class Normed(Optimizer):
        ...     def step(self, closure=None):
        ...         for p in self.param_groups[0]["params"]:
        ...             p.data -= 0.1 * p.grad / p.grad.norm()
        >>> weight = nn.Parameter(torch.full((2,), torch.nan))
        >>> found = origin_in_optimizer_step([("weight", weight, torch.ones(2))], [Normed([weight], {})])
        >>> found.cause, found.operation
        ('optimizer_step', 'aten::div')
    """
    values = {id(now): (name, before) for name, now, before in healthy}
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in values]
        at_fault = [p for p in parameters if bool(p.detach().isnan().all())]
        trials: dict[str, Callable[[], Iterable[Tensor | None]]] = {
            name: partial(_gradients_after, hook, optimizer, parameters, values)
            for name, hook in (hooks or {}).items()
        }
        if not type(optimizer).__module__.startswith("torch."):
            name = f"{type(optimizer).__name__}.step"
            trials[name] = partial(_weights_after_step, optimizer, parameters, values)
        for name, trial in trials.items() if at_fault else ():
            source = _nonfinite_source(trial, frameworks)
            if source is not None:
                return _origin(source, name, tuple(values[id(p)][0] for p in at_fault))
    return None


def origin_beyond_updates(
    healthy: Iterable[tuple[str, Tensor, Tensor]],
    optimizers: Iterable[Optimizer],
    steps: int,
    largest_norm: float,
) -> Origin | None:
    """Finds weights that so many steps cannot have moved.

    Args:
        healthy: Name, current value and healthy value of parameters.
        optimizers: Those that train them.
        steps: Number of steps between the two.
        largest_norm: Of the gradients in steps of this run, to which the steps of SGD are proportional.

    Example:
        >>> weight = nn.Parameter(torch.full((2,), 1e30))
        >>> adam = torch.optim.Adam([weight], lr=1e-3)
        >>> origin_beyond_updates([("weight", weight, torch.ones(2))], [adam], 5, 1.0).cause
        'corrupted_weights'
    """
    found = {}
    bounds = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
            length = rate if isinstance(optimizer, _BOUNDED) else 0.0
            if type(optimizer) is torch.optim.SGD and group["momentum"] < 1 > rate * group["weight_decay"]:
                length = rate * largest_norm / (1 - group["momentum"])
            bounds.update({p: (length, rate, type(optimizer).__name__) for p in group["params"] if length})
    for name, now, before in healthy:
        moved = float((now.detach() - before.to(now)).abs().amax()) if now in bounds and now.numel() else 0.0
        if bounds.get(now, (0.0,))[0] * max(steps, 1) * FLIP < moved < math.inf:
            found[name] = (moved, *bounds[now])
    if not found:
        return None
    name = max(found, key=lambda n: found[n][0])
    moved, _, rate, optimizer_name = found[name]
    return Origin(
        "corrupted_weights",
        where=tuple(found),
        detail=f"{name} has moved by {moved:.3g} in {max(steps, 1)} steps or fewer, farther than "
        f"{optimizer_name} can move it at a learning rate of {rate:.3g}.",
        advice=f"Look for code that writes {name} (.data, copy_, a hook or callback); else suspect memory. A "
        "lower learning rate does not help.",
    )


def _nonfinite_source(
    trial: Callable[[], Iterable[Tensor | None]], frameworks: Sequence[str]
) -> OperationRecord | None:
    """Returns the operation of a trial that made its first nonfinite result; `None` if there is none."""
    states = rng_state()
    try:
        with OperationTrace(nn.Module(), {}, frameworks) as trace:
            results = list(trial())
    except Exception:  # an optimizer that cannot be copied, or that needs more than gradients
        return None
    finally:
        set_rng_state(states)
    made = next((result for result in results if result is not None and is_nonfinite(result)), None)
    record = None if made is None else trace.record_of(made)
    source = None if record is None else nonfinite_sources(record)[0]
    return source if isinstance(source, OperationRecord) else None


def _gradients_after(
    hook: Callable[[Optimizer], Any],
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    values: Mapping[int, tuple[str, Tensor]],
) -> list[Tensor | None]:
    """Returns the gradients that a hook leaves of zeros; weights and gradients are restored."""
    with preserve_weights(nn.ParameterList(parameters)):
        for parameter in parameters:
            parameter.detach().copy_(values[id(parameter)][1])
            parameter.grad = torch.zeros_like(parameter)
        hook(optimizer)
        return [p.grad for p in parameters]


def _weights_after_step(
    optimizer: Optimizer, parameters: Sequence[Tensor], values: Mapping[int, tuple[str, Tensor]]
) -> list[Tensor]:
    """Returns the weights that a step of a copy of the optimizer makes with gradients of 0."""
    memo: dict[int, Any] = {}
    clone = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name not in ("state", "step"):  # the step may be that of a schedule, which counts
            clone.__dict__[name] = OrderedDict() if "hook" in name else copy.deepcopy(value, memo)
    clone.state = defaultdict(dict)
    copies: list[Tensor] = [memo[id(parameter)] for parameter in parameters]
    for parameter, copied in zip(parameters, copies, strict=True):
        copied.detach().copy_(values[id(parameter)][1])
        copied.grad = torch.zeros_like(copied)
    with torch.enable_grad():
        type(optimizer).step(clone, lambda: 0.0)
    return copies


def _origin(source: OperationRecord, step: str, where: tuple[str, ...]) -> Origin:
    fault, location = known_fault(source, FAULTS), source.location
    advice = "Correct it for gradients of 0; a lower learning rate does not help."
    if fault is not None:
        code = location.called_code if location else ""
        advice = f"{fault.advice(short_name(source), code)} A lower learning rate does not help."
    detail = f"{step} makes NaN where gradients are 0, as a trial of it shows: {source.operation} "
    detail += "" if source.low is None else f"given {source.low:.4g} to {source.high:.4g} "
    detail += f"returned {source.made}"
    origin = Origin(
        "optimizer_step",
        operation=source.operation,
        where=where,
        dtype=source.dtype,
        detail=detail,
        advice=advice,
    )
    return located(origin, location)
