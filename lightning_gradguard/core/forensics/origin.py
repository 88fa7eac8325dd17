"""The origin of a nonfinite value, and the origins that weights alone reveal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_gradguard.core.incidents import Cause
from lightning_gradguard.core.norms import local_shard

#: An element is *out of range* if it is this many times larger than any of its tensor was in a finite state.
GROWTH = 10.0
#: What a tensor's largest element counts as at least, in that comparison: biases start at zero.
LEAST = 0.1
#: Up to this many elements of one tensor out of range are corruption; more are an update that was too large.
CORRUPTED = 2


@dataclass(frozen=True)
class Origin:
    """Where the first nonfinite value of a step came from.

    Args:
        cause: What is at fault; `"transient"` if everything is finite the second time, as after a fault of
            the hardware; `"unknown"` if the batch could not be run again.
        phase: The pass in which the value was made; empty where nothing was made.
        module: Name of the module whose code made it; empty for code of the network's own step, outside of
            all its modules.
        operation: The torch operation, in the backward pass with the name of the autograd node.
        where: The tensors at fault: parameters, or places in the batch such as `batch[0]`.
        dtype: Of what the operation returned.
        low: Smallest finite value that the operation was given; `None` if there was none.
        high: The largest.
        detail: The same in one sentence, for people.
        rows: Of the part of the batch that is at fault, the first ten that hold nonfinite values: samples,
            where its first dimension counts them.
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


def out_of_range_elements(named: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, int]:
    """Tensors with elements that are absurd beside what they were when the run was well.

    Args:
        named: Name, tensor now, and the tensor as it was then.

    Returns:
        For each tensor that has any: the number of elements that are nonfinite, or ten times larger than the
        largest was (which counts as 0.1 at least).

    Example:
        >>> grown_elements([("weight", torch.tensor([0.2, 1e30]), torch.tensor([0.1, 0.3]))])
        {'weight': 1}
    """
    found = {}
    for name, now, before in named:
        now = local_shard(now.detach())
        if now.is_floating_point() and now.numel():
            bound = GROWTH * max(float(before.abs().amax()), LEAST)
            # one that the type cannot hold would become infinity, and let infinity pass
            bound = min(bound, torch.finfo(now.dtype).max)
            count = int((~(now.abs() <= bound)).sum())
            if count:
                found[name] = count
    return found


def origin_in_weights(out_of_range: Mapping[str, int]) -> Origin:
    """What has happened to weights, from the tensors that are absurd.

    Args:
        out_of_range: At least one tensor; see `out_of_range_elements`.

    Example:
        >>> origin_in_weights({"head.weight": 1}).cause, origin_in_weights({"head.weight": 50}).cause
        ('weights', 'update_too_large')
    """
    where = tuple(sorted(out_of_range, key=lambda name: -out_of_range[name]))
    if sum(out_of_range.values()) <= CORRUPTED:
        return Origin("corrupted_weights", where=where, detail=f"Single elements of {where[0]} are absurd.")
    return Origin(
        "update_too_large",
        where=where,
        detail=f"{sum(out_of_range.values())} elements of {len(out_of_range)} tensors are nonfinite, or "
        f"{GROWTH:g} times larger than when the run was healthy.",
    )
