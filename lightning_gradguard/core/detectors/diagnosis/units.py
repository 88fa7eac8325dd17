"""Dead and saturated units of one activation, over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

#: Values per unit below which a share over the batch means nothing.
MIN_ROWS = 16
#: Activations by the name of the function; forms that end in `_` work in place.
RECTIFIERS = frozenset({"relu", "relu6", "threshold"})
SMOOTH_RECTIFIERS = frozenset({"gelu", "silu", "mish", "hardswish"})
#: Value beyond which an output is saturated, after sigmoids are scaled to -1 .. 1.
SATURATING = {"tanh": 0.97, "hardtanh": 0.99, "softsign": 0.97, "sigmoid": 0.97, "hardsigmoid": 0.99}
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


def _others(output: Tensor, dim: int) -> list[int] | None:
    if output.ndim < 2 or output.numel() / output.shape[dim] < MIN_ROWS:
        return None
    return [d for d in range(output.ndim) if d != dim % output.ndim]
