"""Dead and saturated units of one activation, over the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Values per unit below which a share over the batch means nothing.
MIN_ROWS = 16
#: Activations by the name of the function; forms that end in `_` work in place.
RECTIFIERS = frozenset({"relu", "relu6", "threshold"})
SMOOTH_RECTIFIERS = frozenset({"gelu", "silu", "mish", "hardswish", "softplus", "hardshrink", "softshrink"})
#: Value beyond which an output is saturated, after sigmoids are scaled to -1 .. 1.
SATURATING = {"tanh": 0.97, "hardtanh": 0.99, "softsign": 0.85, "sigmoid": 0.97, "hardsigmoid": 0.99}
#: Share of the largest gradient below which a unit gets none, or hardly any, and the distance from 0 beyond
#: which its inputs are far out.
NO_GRADIENT, HARDLY_ANY, FAR_OUT = 1e-12, 1e-6, 5.0
#: Output below which a unit of a smooth rectifier is zero.
NEAR_ZERO = 1e-3
#: Share of the samples for which a saturated unit is saturated.
MOST_SAMPLES = 0.95
#: Share of the outputs from which on the activation is saturated, whatever single units do.
NEARLY_ALL = 0.85


def dead_share(output: Tensor, dim: int, *, smooth: bool = False) -> Tensor | None:
    """Returns the share of units that are zero for every sample; `None` for too few samples.

    Args:
        output: Of the activation.
        dim: Dimension of the units.
        smooth: True for an activation that is never exactly zero.

    Example:
        >>> dead_share(torch.eye(32)[:, :2].relu() * torch.tensor([1.0, 0.0]), 1)
        tensor(0.5000)
    """
    others = _others(output, dim)
    if others is None:
        return None
    return ((output.abs().amax(others) < NEAR_ZERO) if smooth else (output.amax(others) <= 0)).float().mean()


def saturated_share(output: Tensor, dim: int, function: str) -> Tensor | None:
    """Returns the share of units that are saturated for most samples; `None` for too few samples.

    Where nearly all outputs are saturated, it is the share of these: units may change sides.

    Args:
        output: Of the activation.
        dim: Dimension of the units.
        function: Name of the activation.
    """
    others = _others(output, dim)
    if others is None:
        return None
    centred = 2 * output - 1 if function.endswith("sigmoid") else output
    flat = (centred.abs() > SATURATING[function]).float().mean(others)
    by_unit, by_output = (flat > MOST_SAMPLES).float().mean(), flat.mean()
    return torch.where(by_output > NEARLY_ALL, by_output, by_unit)


def extremes(output: Tensor, dim: int) -> tuple[Tensor, Tensor] | None:
    """Returns the highest output of each unit and the one nearest to 0; `None` for too few samples.

    Args:
        output: Of a layer, before the activation.
        dim: Dimension of the units.
    """
    others = _others(output, dim)
    return None if others is None else (output.amax(others), output.abs().amin(others))


def blocked_shares(
    gradient: Tensor, dim: int, highest: Tensor, nearest: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the share of units that are dead, and of those that are saturated, by their gradients.

    An activation that is no function of its own is known by its effect: no gradient passes for inputs that
    are all negative, or, on both sides, all far out.

    Args:
        gradient: At the output of a layer.
        dim: Dimension of the units.
        highest: Highest output of each unit.
        nearest: Output of each unit that is nearest to 0, without its sign.
        largest: Largest root mean square of a gradient, of all layers so far.

    Example:
        >>> x = torch.cat([torch.ones(16, 1), -torch.ones(16, 1)], 1)
        >>> gradient = torch.cat([torch.ones(16, 1), torch.zeros(16, 1)], 1)
        >>> blocked_shares(gradient, 1, *extremes(x, 1), torch.tensor(1.0))
        (tensor(0.5000), tensor(0.))
    """
    others = [d for d in range(gradient.ndim) if d != dim % gradient.ndim]
    size = gradient.abs().amax(others)
    negative = (size <= NO_GRADIENT * largest) & (largest > 0) & (highest <= 0)
    far_out = (size <= HARDLY_ANY * largest) & (largest > 0) & (nearest > FAR_OUT)
    positive = far_out & (highest > 0)
    dead, both = negative.float().mean(), far_out.float().mean()
    is_saturated = positive.sum() * 4 > negative.sum()
    return torch.where(is_saturated, 0.0, dead), torch.where(is_saturated, both, 0.0)


def is_rectifier(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True for a call of `hardtanh` that cuts at 0, as `nn.ReLU6` calls it."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    return float(bound.arguments.get("min_val", -1.0)) == 0


def _others(output: Tensor, dim: int) -> list[int] | None:
    if isinstance(output, DTensor) or output.ndim < 2 or output.numel() / output.shape[dim] < MIN_ROWS:
        return None  # a shard of the units would need a collective
    return [d for d in range(output.ndim) if d != dim % output.ndim]
