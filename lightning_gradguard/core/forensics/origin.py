"""The origin of a nonfinite value, and origins that follow from weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_gradguard.core.incidents import Cause
from lightning_gradguard.core.norms import local_shard

#: An element is *out of range* if it is nonfinite, or this many times larger than any in a healthy state.
RANGE_RATIO = 10.0
#: Lower bound of a tensor's largest element in that comparison: biases start at zero.
MIN_LARGEST = 0.1
#: Up to this many elements out of range are corruption; more are an update that was too large.
MAX_CORRUPTED = 2


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
        rows: The first ten rows with nonfinite values in the part of the batch at fault: samples, if its
            first dimension is that of the batch.
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
    """Counts the elements that are out of range, by the name of each tensor that has any.

    Args:
        named: Name, current tensor, and the tensor in a healthy state.

    Example:
        >>> out_of_range_elements([("weight", torch.tensor([0.2, 1e30]), torch.tensor([0.1, 0.3]))])
        {'weight': 1}
    """
    found = {}
    for name, now, before in named:
        now = local_shard(now.detach())
        if now.is_floating_point() and now.numel():
            bound = RANGE_RATIO * max(float(before.abs().amax()), MIN_LARGEST)
            # a bound that the dtype cannot hold would become infinity, and infinity would pass
            bound = min(bound, torch.finfo(now.dtype).max)
            count = int((~(now.abs() <= bound)).sum())
            if count:
                found[name] = count
    return found


def origin_in_weights(out_of_range: Mapping[str, int]) -> Origin:
    """Returns the origin of a nonfinite value from a nonempty result of `out_of_range_elements`.

    Example:
        >>> origin_in_weights({"head.weight": 1}).cause, origin_in_weights({"head.weight": 50}).cause
        ('corrupted_weights', 'update_too_large')
    """
    where = tuple(sorted(out_of_range, key=lambda name: -out_of_range[name]))
    if sum(out_of_range.values()) <= MAX_CORRUPTED:
        detail = f"Single elements of {where[0]} are out of range."
        return Origin("corrupted_weights", where=where, detail=detail)
    return Origin(
        "update_too_large",
        where=where,
        detail=f"{sum(out_of_range.values())} elements of {len(out_of_range)} tensors are nonfinite, or "
        f"{RANGE_RATIO:g} times larger than when the run was healthy.",
    )
