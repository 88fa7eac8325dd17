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
#: Values per unit of which more do not make it surer that all are negative, or far out.
ENOUGH = 1024
#: Activations by the name of the function; forms that end in `_` work in place.
RECTIFIERS = frozenset({"relu", "relu6", "threshold"})
SMOOTH_RECTIFIERS = frozenset({"gelu", "silu", "mish", "hardswish", "softplus", "hardshrink", "softshrink"})
#: Those that pass a part of small inputs: their units are dead only where inputs are far below zero.
PASS_SMALL = frozenset({"gelu", "silu", "mish", "hardswish"})
#: Value beyond which an output is saturated, after sigmoids are scaled to -1 .. 1.
SATURATING = {"tanh": 0.97, "hardtanh": 0.99, "softsign": 0.85, "sigmoid": 0.97, "hardsigmoid": 0.99}
#: All of them, and those of which nothing is measured.
ACTIVATIONS = frozenset({*RECTIFIERS, *SMOOTH_RECTIFIERS, *SATURATING, "leaky_relu", "elu"})
#: Share of the largest gradient below which a unit gets none, or hardly any, and the distance from 0 beyond
#: which its inputs are far out.
NO_GRADIENT, HARDLY_ANY, FAR_OUT = 1e-12, 1e-6, 5.0
#: Output below which a unit of a smooth rectifier is zero.
NEAR_ZERO = 1e-3
#: Share of the samples for which a saturated unit is saturated.
MOST_SAMPLES = 0.95
#: Share of the outputs from which on the activation is saturated, whatever single units do.
NEARLY_ALL = 0.8
#: Share of the saturated outputs on the other side up to which gates are saturated on one side.
ONE_SIDED = 0.1


def heights(output: Tensor, dim: int, *, smooth: bool = False) -> tuple[Tensor, float] | None:
    """Returns the highest output of each unit, and the height up to which a unit is dead.

    `None` for too few samples. A smooth activation is never exactly zero.
    """
    others = _others(output, dim)
    if others is None:
        return None
    return (output.abs().amax(others), NEAR_ZERO) if smooth else (output.amax(others), 0.0)


class DeadShares:
    """Shares of dead units, computed for all activations at once.

    Example:
        >>> shares = DeadShares()
        >>> shares.add(*heights(torch.eye(32)[:, :2].relu() * torch.tensor([1.0, 0.0]), 1))
        0
        >>> shares.values(torch.device("cpu"))
        tensor([0.5000])
    """

    def __init__(self) -> None:
        self._highest: list[Tensor] = []
        self._bounds: list[float] = []

    def __len__(self) -> int:
        return len(self._highest)

    def add(self, highest: Tensor, bound: float) -> int:
        """Adds the units of an activation; returns its index."""
        self._highest.append(highest)
        self._bounds.append(bound)
        return len(self._highest) - 1

    def values(self, device: torch.device) -> Tensor:
        """Returns the share of units that are at most as high as the bound, by activation, shape `(n,)`."""
        sizes = [len(part) for part in self._highest]
        bounds = torch.tensor(self._bounds, device=device)
        activation = _owners(sizes, device)
        dead = torch.cat([part.to(device) for part in self._highest]) <= bounds[activation]
        return _shares(dead[None], activation, sizes)[0]


def saturated_shares(
    output: Tensor, dim: int, function: str, *, is_gate: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Returns the shares of units that are saturated for most samples, and of outputs that are saturated.

    Where nearly all outputs are saturated, both are the share of these: units may change sides. `None` for
    too few samples. Gates do no harm if all of the saturated ones are on one side: the state passes or, if it
    does not, the gradient through time shows it.
    """
    others = _others(output, dim)
    if others is None:
        return None
    centred = 2 * output - 1 if function.endswith("sigmoid") else output
    flat = (centred.abs() > SATURATING[function]).float().mean(others)
    by_unit, by_output = (flat > MOST_SAMPLES).float().mean(), flat.mean()
    if is_gate:
        low = (centred < -SATURATING[function]).float().mean()
        counts = torch.minimum(low, by_output - low) > ONE_SIDED * by_output
        by_unit, by_output = by_unit * counts, by_output * counts
    return torch.where(by_output > NEARLY_ALL, by_output, by_unit), by_output


def extremes(output: Tensor, dim: int) -> tuple[Tensor, Tensor] | None:
    """Returns the highest output of each unit and the one nearest to 0; `None` for too few samples.

    Of many values, those of evenly spread rows are read: the gradients, which are read in whole, decide too.
    """
    others = _others(output, dim)
    if others is None:
        return None
    if 0 in others:
        output = output[:: max(output.numel() // output.shape[dim] // ENOUGH, 1)]
    return output.amax(others), output.abs().amin(others)


class UnitGradients:
    """Gradients of units; which units are blocked is computed for all layers at once.

    An activation that is no function of its own is known by its effect: no gradient passes for inputs that
    are all negative, or, on both sides, all far out.

    Example:
        >>> x = torch.cat([torch.ones(16, 1), -torch.ones(16, 1)], 1)
        >>> gradients = UnitGradients()
        >>> gradients.add(torch.cat([torch.ones(16, 1), torch.zeros(16, 1)], 1), 1, *extremes(x, 1), 0)
        0
        >>> gradients.blocked_shares(torch.ones(1))
        tensor([[0.5000],
                [0.0000]])
    """

    def __init__(self) -> None:
        self._sizes: list[tuple[Tensor, Tensor]] = []
        self._highest: list[Tensor] = []
        self._nearest: list[Tensor] = []
        self._arrived: list[int] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, gradient: Tensor, dim: int, highest: Tensor, nearest: Tensor, arrived: int) -> int:
        """Adds a layer, with the gradient at its output and the extremes of its units; returns its index.

        So many gradients had `arrived` at layers before.
        """
        others = [d for d in range(gradient.ndim) if d != dim % gradient.ndim]
        self._sizes.append((gradient.amax(others), gradient.amin(others)))  # faster than that of `abs()`
        self._highest.append(highest)
        self._nearest.append(nearest)
        self._arrived.append(arrived)
        return len(self._sizes) - 1

    def blocked_shares(self, largest: Tensor) -> Tensor:
        """Returns the shares of dead and of saturated units of each layer, shape `(2, layers)`.

        `largest` is the largest rms of the gradients so far, for each that has arrived.
        """
        device, sizes = largest.device, [len(part) for part in self._highest]
        high, low, highest, nearest = (
            torch.cat([part.to(device) for part in parts])
            for parts in (*zip(*self._sizes, strict=True), self._highest, self._nearest)
        )
        size = torch.maximum(high, -low)
        layers = _owners(sizes, device)
        arrives = largest[self._arrived]  # of those between the loss and each layer
        negative = (size <= NO_GRADIENT * arrives[layers]) & (highest <= 0)
        far_out = (size <= HARDLY_ANY * arrives[layers]) & (nearest > FAR_OUT)
        masks = torch.stack([negative, far_out, far_out & (highest > 0)])
        shares = _shares(masks, layers, sizes)
        dead, both, positive = (shares * (arrives > 0)).unbind()
        is_saturated = positive * 4 > dead
        return torch.stack([torch.where(is_saturated, 0.0, dead), torch.where(is_saturated, both, 0.0)])


def is_rectifier(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True for a call of `hardtanh` that cuts at 0, as `nn.ReLU6` calls it."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    return float(bound.arguments.get("min_val", -1.0)) == 0


def _others(output: Tensor, dim: int) -> list[int] | None:
    if isinstance(output, DTensor) or output.ndim < 2 or output.numel() / output.shape[dim] < MIN_ROWS:
        return None  # a shard of the units would need a collective
    return [d for d in range(output.ndim) if d != dim % output.ndim]


def _owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns the index of the layer of each unit, for layers of some sizes."""
    counts = torch.tensor(sizes, device=device)
    return torch.arange(len(sizes), device=device).repeat_interleave(counts, output_size=sum(sizes))


def _shares(masks: Tensor, owners: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the share of true values by layer, shape `(k, layers)`, of masks of shape `(k, units)`."""
    sums = torch.zeros(len(masks), len(sizes), device=masks.device).index_add_(1, owners, masks.float())
    return sums / torch.tensor(sizes, device=masks.device)
