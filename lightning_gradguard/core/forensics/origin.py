"""The origin of a nonfinite value, and origins that follow from weights alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.core.backoff import groups_with_rate
from lightning_gradguard.core.forensics.location import Location
from lightning_gradguard.core.incidents import Cause
from lightning_gradguard.core.norms import local_shard
from lightning_gradguard.core.remedies import Present, advice_for_cause

#: An element is *out of range* if it is nonfinite, or this many times larger than any in a healthy state.
RANGE_RATIO = 10.0
#: Lower bound of a tensor's largest element in that comparison: biases start at zero.
MIN_LARGEST = 0.1
#: Up to this many elements out of range are corruption; more are an update that was too large.
MAX_CORRUPTED = 2
#: A flip of one of the three highest exponent bits of float32 changes a value at least by this factor.
FLIP = 2.0**15
#: Steps within which a rate that has destroyed the weights is seen, at deferred checks too.
_STEPS_BEFORE = 3
#: Keys under which optimizers keep the mean of squared gradients that they divide by.
_SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum", "exp_inf")


@dataclass(frozen=True)
class Origin:
    """The origin of the first nonfinite value of a step.

    Args:
        cause: The fault; `"transient"` if everything is finite the second time, as after a fault of the
            hardware; `"unknown"` if the batch could not be run again.
        phase: The pass that made the value; empty if none did.
        module: Name of the module whose code made it; empty for code of the training step outside of all
            modules.
        operation: The torch operation, in the backward pass with the name of the autograd node.
        where: The tensors at fault: parameters, or parts of the batch such as `batch[0]`.
        dtype: Dtype of the result of the operation.
        low: Smallest finite input of the operation; `None` without finite inputs.
        high: Largest finite input.
        detail: The same as one sentence.
        rows: The first ten rows at fault of the batch: with nonfinite values, or of which the operation made
            them.
        location: File, line and function of the user's code that ran the operation.
        code: That line.
        advice: Advice on the operation, if it is known.
        samples: The first of those rows, with their names or indices in the data set.
    """

    cause: Cause
    phase: Literal["", "forward", "backward"] = ""
    module: str = ""
    operation: str = ""
    where: tuple[str, ...] = ()
    dtype: str = ""
    low: float | None = None
    high: float | None = None
    detail: str = ""
    rows: tuple[int, ...] = ()
    location: str = ""
    code: str = ""
    advice: str = ""
    samples: str = ""

    def remedy(self, present: Collection[Present] = ()) -> str:
        """Returns advice in one or two sentences for a run with `present`; empty for an unknown cause."""
        return self.advice or advice_for_cause(self.cause, self.where, present)


def located(origin: Origin, location: Location | None) -> Origin:
    """Returns the origin with the user's line; in the step's own code that line is the place.

    Example:
        >>> located(Origin("loss", detail="A sentence"), Location("train.py", 7, "training_step")).where
        ('train.py:7 in training_step',)
    """
    if location is None:
        return replace(origin, detail=f"{origin.detail.rstrip('.')}.")
    code = f": `{location.code}`" if location.code else ""
    return replace(
        origin,
        where=origin.where or (str(location),),
        location=str(location),
        code=location.code,
        detail=f"{origin.detail.rstrip('.')}, at {location}{code}.",
    )


def in_rows(rows: Iterable[int], name: str = "row") -> str:
    """Returns the place of an error in a batch, to be appended; empty for no rows.

    Example:
        >>> in_rows([3]), in_rows([3, 5])
        (' in row 3', ' in rows 3, 5')
    """
    numbers = [*map(str, rows)]
    return f" in {name}{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else ""


def nonfinite_input(name: str, part: Tensor) -> Origin:
    """Returns the origin of a nonfinite value that is in a part of the batch.

    Example:
        >>> nonfinite_input("batch[0]", torch.tensor([1.0, float("nan")])).rows
        (1,)
    """
    rows: tuple[int, ...] = ()
    if part.ndim and part.layout == torch.strided:
        nonfinite = (~part.detach().isfinite()).reshape(len(part), -1).any(dim=1)
        rows = tuple(nonfinite.nonzero().flatten()[:10].tolist())
    place = in_rows(rows)
    if len(rows) > 1 and part.ndim == 2:
        columns = (~part.detach().isfinite()).all(dim=0).nonzero().flatten()[:10].tolist()
        place = f"{in_rows(columns, 'column')} of every row" if columns else place
    why = " as float16, which holds at most 65504" if part.dtype == torch.float16 else ""
    detail = f"{name} holds nonfinite values{place}{why}."
    return Origin("bad_input", where=(name,), rows=rows, detail=detail)


def corrupted_buffer(name: str, buffer: Tensor) -> Origin:
    """Returns the origin of a nonfinite value that is due to a buffer, nonfinite itself or far too large.

    Example:
        >>> corrupted_buffer("pos_weight", torch.tensor([3.0, float("inf")])).cause
        'forward_pass'
        >>> corrupted_buffer("scale", torch.tensor([3.0, 1e20])).detail
        'scale, a buffer, which no optimizer changes, holds values up to 1e+20.'
    """
    n, whose = int((~buffer.detach().isfinite()).sum()), "a buffer, which no optimizer changes"
    detail = f"{n} of {buffer.numel()} elements of {name} are nonfinite, {whose}."
    advice = "for a division by a count of 0 (x / y.clamp_min(1)), or for data that are not finite."
    if not n:
        detail = f"{name}, {whose}, holds values up to {float(buffer.detach().abs().amax()):.3g}."
        advice = "for a sum or product that grows from step to step (average there, as in x.lerp_(y, 0.1)), "
        advice += "or a mask of huge numbers (-1e4 is enough)."
    advice = f"Look at the code that computes {name}, {advice}"
    return Origin("forward_pass", where=(name,), detail=detail, advice=advice)


class OutOfRange(NamedTuple):
    """Elements of a tensor that are out of range.

    Args:
        n: Their number.
        of: Number of elements of the tensor.
        growth: Largest of them relative to the largest element of a healthy state; infinite if one is
            nonfinite; NaN if that state is nonfinite itself, as at the start of a run.
    """

    n: int
    of: int
    growth: float


def out_of_range_elements(named: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, OutOfRange]:
    """Finds the elements out of range, beside a healthy state, by the name of each tensor that has any.

    Example:
        >>> out_of_range_elements([("weight", torch.tensor([0.2, 1e30]), torch.tensor([0.1, 1.0]))])
        {'weight': OutOfRange(n=1, of=2, growth=1e+30)}
    """
    found = {}
    for name, now, before in named:
        now = local_shard(now.detach())
        if now.is_floating_point() and now.numel():
            healthy = max(MIN_LARGEST, float(before.abs().nan_to_num(math.inf, math.inf).amax()))
            if healthy == math.inf and (n := int((~now.isfinite()).sum())):
                found[name] = OutOfRange(n, now.numel(), math.nan)
                continue
            # a bound that the dtype cannot hold would become infinity, and infinity would pass
            bound = min(RANGE_RATIO * healthy, torch.finfo(now.dtype).max)
            beyond = now[~(now.abs() <= bound)].abs().double()
            if beyond.numel():
                growth = float(beyond.max()) / healthy if bool(beyond.isfinite().all()) else math.inf
                found[name] = OutOfRange(beyond.numel(), now.numel(), float(f"{growth:.3g}"))
    return found


def origin_in_weights(out_of_range: Mapping[str, OutOfRange]) -> Origin:
    """Returns the origin of a nonfinite value from a nonempty result of `out_of_range_elements`.

    An update moves all elements of a tensor. So one or two elements are corruption only if the others of
    their tensor are in range, and if they grew by more than updates do. Other tensors may follow: another
    optimizer may have stepped since.

    Example:
        >>> origin_in_weights({"head.weight": OutOfRange(1, 64, 1e30)}).cause
        'corrupted_weights'
        >>> origin_in_weights({"bias": OutOfRange(9, 9, 1e20), "head.weight": OutOfRange(1, 64, 1e30)}).where
        ('head.weight',)
        >>> origin_in_weights({"head.weight": OutOfRange(50, 64, 1e30)}).cause
        'update_too_large'
        >>> origin_in_weights({"head.bias": OutOfRange(1, 1, 12.0)}).cause
        'update_too_large'
        >>> origin_in_weights({"head.bias": OutOfRange(1, 1, math.nan)}).detail
        '1 of 1 elements of head.bias were nonfinite before the first step.'
    """
    at_start = tuple(name for name, found in out_of_range.items() if math.isnan(found.growth))
    if at_start:
        name, (n, of, _) = at_start[0], out_of_range[at_start[0]]
        return Origin(
            "corrupted_weights",
            where=at_start,
            detail=f"{n} of {of} elements of {name} were nonfinite before the first step.",
            advice=f"Give {name} values before training: torch.empty holds what was in memory. If they come "
            "from a checkpoint, take an earlier one.",
        )
    names = sorted(out_of_range, key=lambda name: -out_of_range[name].growth)
    (n, of, growth), *others = (out_of_range[name] for name in names)
    total = sum(found.n for found in out_of_range.values())
    are_single = total <= MAX_CORRUPTED and all(found.n < found.of for found in others)
    are_far_smaller = all(found.growth * FLIP < growth for found in others)
    # the range of optimizer state, "exp_avg of ...", ends where only corruption gets
    is_flip = growth >= FLIP or (are_single and " of " in names[0])
    if n <= MAX_CORRUPTED and n < of and is_flip and (are_single or are_far_smaller):
        return Origin(
            "corrupted_weights",
            where=tuple(names if are_single else names[:1]),
            detail=f"{n} of {of} elements of {names[0]} are out of range, by a factor of {growth:.3g}; the "
            "others, which an update would have moved too, are not.",
        )
    where = tuple(sorted(out_of_range, key=lambda name: -out_of_range[name].n))
    detail = (
        f"{total} elements of {len(out_of_range)} tensors are nonfinite, or {RANGE_RATIO:g} times larger "
        "than when the run was healthy."
    )
    if total <= MAX_CORRUPTED and growth >= FLIP:
        detail += " In tensors with so few elements, corrupted memory looks the same."
    return Origin("update_too_large", where=where, detail=detail)


def origin_in_learning_rate(
    optimizers: Iterable[torch.optim.Optimizer], schedules: Iterable[object]
) -> Origin | None:
    """Finds a nonfinite learning rate, and the function of a schedule that has set it.

    Returns:
        The origin; `None` if all rates are finite, those of the last steps too where a function gives them.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: float("nan"))
        >>> origin_in_learning_rate([sgd], [schedule]).cause
        'nonfinite_learning_rate'
    """
    schedules = list(schedules)
    rates = [float(group["lr"]) for o in optimizers for group in groups_with_rate(o)]
    rate = next((rate for rate in (*rates, *_rates_before(schedules)) if not math.isfinite(rate)), None)
    if rate is None:
        return None
    function = _function_of(schedules)
    names = [type(schedule).__name__ for schedule in schedules] or ["the code that sets lr"]
    detail = f"The learning rate was {rate}, and so are the weights that it has updated."
    origin = Origin("nonfinite_learning_rate", where=() if function else tuple(names), detail=detail)
    return located(origin, function)


def advice_on_schedules(schedules: Iterable[Any]) -> tuple[str, Location | None]:
    """Returns what to do about a schedule that has raised a learning rate, and where its function is.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(sgd, [lambda step: 10.0 ** (step + 1)])
        >>> advice_on_schedules([schedule])[0].partition(", at ")[0]
        'LambdaLR has raised the learning rate from 0.1 to 1: lower what its function returns'
    """
    for schedule in schedules:
        rates: list[float] = []
        with contextlib.suppress(Exception):  # one of the user's has no rates, or none before it steps
            rates = [*map(float, schedule.get_last_lr())]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=False):
            start = float(group.get("initial_lr", rate))
            if not start < rate < math.inf:
                continue
            function = _function_of([schedule])
            what = "what its function returns" if function else "its factors"
            what = "its max_lr" if "max_lr" in group else what
            what += f", at {function}" if function else ""
            name = type(schedule).__name__
            return (
                f"{name} has raised the learning rate from {start:.3g} to {rate:.3g}: lower {what}.",
                function,
            )
    return "", None


def advice_on_decay(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Returns what to do about a weight decay that enlarges weights by itself; empty if none does.

    One of at most 1, as usual ones are, does so at a learning rate alone that is far too high.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=30)
        >>> advice_on_decay([sgd]).partition(":")[0]
        'Lower weight_decay'
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW):  # others divide by its size
            for group in optimizer.param_groups:
                rate, decay = float(group["lr"]), float(group["weight_decay"])
                if decay > 1 and rate * decay > 2 * (1 + group.get("momentum", 0.0)):
                    return (
                        f"Lower weight_decay: {decay:g} at a learning rate of {rate:g} multiplies weights by "
                        f"{1 - rate * decay:.3g} in each step (usual: 0.99 to 1), whatever the loss is."
                    )
    return ""


def _rates_before(schedules: Iterable[Any]) -> Iterator[float]:
    """Yields the rates of a few steps before, from schedules that are a function of the step."""
    for schedule in schedules:
        with contextlib.suppress(Exception):  # of the user's function, or of a schedule of the user's own
            for function in getattr(schedule, "lr_lambdas", ()):
                steps = range(max(schedule.last_epoch - _STEPS_BEFORE, 0), schedule.last_epoch)
                yield from map(float, map(function, steps))


def _function_of(schedules: Iterable[object]) -> Location | None:
    """Returns where the function is that a schedule calls, if one does."""
    functions = (f for schedule in schedules for f in getattr(schedule, "lr_lambdas", ()))
    code = next((f.__code__ for f in functions if hasattr(f, "__code__")), None)
    return Location(code.co_filename, code.co_firstlineno, code.co_name) if code else None


def origin_in_epsilon(
    named: Iterable[tuple[str, Tensor]], optimizers: Iterable[torch.optim.Optimizer]
) -> Origin | None:
    """Finds nonfinite weights whose update was divided by a second moment and an epsilon that are 0.

    `None` unless this explains at least half of the nonfinite elements that no nonfinite gradient explains.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float16))
        >>> optimizer = torch.optim.Adam([weight], lr=1e-3, eps=1e-8)
        >>> weight.grad = torch.full_like(weight, 1e-4)
        >>> optimizer.step()
        >>> origin_in_epsilon([("weight", weight)], [optimizer]).cause
        'optimizer_epsilon'
    """
    names = {parameter: name for name, parameter in named}
    explained: dict[str, int] = {}
    total, eps, dtype = 0, 0.0, ""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = local_shard(parameter.detach())
                nonfinite = ~values.isfinite()
                state = optimizer.state.get(parameter, {})
                moment = next((state[key] for key in _SECOND_MOMENTS if key in state), None)
                if moment is None or moment.shape != parameter.shape or "eps" not in group:
                    total += int(nonfinite.sum())
                    continue
                moment = local_shard(moment)
                # a nonfinite moment is of a nonfinite gradient, as of another optimizer's weights
                nonfinite &= moment.isfinite()
                total += (count := int(nonfinite.sum()))
                if count and float(torch.tensor(group["eps"], dtype=moment.dtype)) == 0:
                    explained[names.get(parameter, "a parameter")] = int((moment[nonfinite] == 0).sum())
                    eps, dtype = group["eps"], str(moment.dtype).removeprefix("torch.")
    if not total or sum(explained.values()) * 2 < total:
        return None
    where = tuple(sorted(explained, key=lambda name: -explained[name]))
    detail = (
        f"In {sum(explained.values())} of {total} nonfinite weights the optimizer's second moment is 0, and "
        f"eps={eps:g} is 0 in {dtype}: their update was divided by 0."
    )
    return Origin("optimizer_epsilon", where=where, dtype=dtype, detail=detail)
