"""Repair of layers by the initialization that the activation after them requires."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.propagation import LAYERS, RECTIFIERS, WeightedLayer, propagate
from lightning_gradguard.core.snapshots import preserve_state


@dataclass(frozen=True)
class Repair:
    """The changes of a repair.

    Args:
        lines: A line for each layer that was changed: its name and its initialization.
        left_alone: Hidden layers that were not changed, as they do not hold their default initialization.
    """

    lines: tuple[str, ...]
    left_alone: tuple[str, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the layers that were changed."""
        return tuple(line.partition(":")[0] for line in self.lines)

    @property
    def summary(self) -> tuple[str, ...]:
        """The lines, of which neighbours with the same initialization are one."""
        runs = [[*run] for _, run in groupby(self.lines, key=lambda line: line.partition(":")[2])]
        return tuple(
            run[0]
            if len(run) == 1
            else f"{run[0].partition(':')[0]} to {run[-1].replace(':', f' ({len(run)} layers):', 1)}"
            for run in runs
        )


def repair(
    module: nn.Module, run_loss: Callable[[], Tensor], *, names: Collection[str] = (), seed: int = 0
) -> Repair:
    """Initializes layers for the activation after them, then scales them to unit variance.

    He initialization before a rectifier, orthogonal before tanh, Xavier before a sigmoid or no activation.
    The scaling is that of LSUV, in one forward pass. The output layer is not changed, nor are layers whose
    weights are not the default initialization of their class, unless they are named.

    Args:
        module: The network.
        run_loss: Computes the training loss of one batch with it.
        names: Modules that are repaired whatever weights they hold.
        seed: The same seed gives the same weights; global random number generators are not used.

    Returns:
        The layers that were changed, and those that were not.

    References:
        Mishkin, Matas, All you need is a good init, 2015, arXiv:1511.06422.
    """
    layers = propagate(module, run_loss).layers
    chosen = {
        id(layer.module): layer
        for layer in layers
        if layer.name in names or (layer is not layers[-1] and holds_default_initialization(layer.module))
    }
    generator = torch.Generator().manual_seed(seed)
    schemes = [f"{x.name}: {draw_weights(x.module, x.activation, generator)}" for x in chosen.values()]
    scale_to_unit_variance(module, run_loss, [layer.module for layer in chosen.values()])
    alone = tuple(layer.name for layer in layers[:-1] if id(layer.module) not in chosen)
    return Repair(tuple(f"{scheme}, scaled to unit variance" for scheme in schemes), alone)


def holds_default_initialization(layer: nn.Module) -> bool:
    """Returns True if a layer's weights look like the default initialization of its class.

    For linear and convolutional layers it is uniform within `1 / sqrt(fan_in)`, for recurrent ones within
    `1 / sqrt(hidden_size)`.
    """
    if isinstance(layer, nn.RNNBase):
        weight = nn.utils.parameters_to_vector(layer.parameters()).detach().float()
        bound = 1 / math.sqrt(layer.hidden_size)
    elif isinstance(layer, LAYERS):
        weight = layer.weight.detach().float()
        bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(weight)[0])
    else:
        return False
    largest, spread = float(weight.abs().max()), float(weight.std())
    tolerance = 0.05 + 3 / math.sqrt(weight.numel())
    uniform = abs(spread / (bound / math.sqrt(3)) - 1) < tolerance
    return largest <= bound * (1 + 1e-5) and largest > bound * (1 - tolerance) and uniform


def frozen_layers(module: nn.Module) -> list[str]:
    """Returns names of layers that hold their default initialization, of which no parameter is trained."""
    return [
        name
        for name, layer in module.named_modules()
        if (own := list(layer.parameters(recurse=False)))
        and not any(parameter.requires_grad for parameter in own)
        and holds_default_initialization(layer)
    ]


def draw_weights(
    layer: WeightedLayer, activation: str | None, generator: torch.Generator, scheme: str | None = None
) -> str:
    """Draws the weights of a layer by a scheme, or by that for the activation after it; returns its name."""
    if scheme is None:
        scheme = "kaiming" if activation in RECTIFIERS else "orthogonal" if activation == "tanh" else "xavier"
    drawn = torch.empty(layer.weight.shape)
    gain = nn.init.calculate_gain("tanh") if activation == "tanh" else 1.0
    if scheme == "kaiming":
        nonlinearity = "relu" if activation in RECTIFIERS else "linear"
        nn.init.kaiming_normal_(drawn, nonlinearity=nonlinearity, generator=generator)  # type: ignore[arg-type]
    elif scheme == "xavier":
        nn.init.xavier_normal_(drawn, gain=gain, generator=generator)
    elif scheme == "small":
        nn.init.normal_(drawn, std=0.02, generator=generator)
    else:
        nn.init.orthogonal_(drawn, gain=gain, generator=generator)
    layer.weight.data.copy_(drawn)
    if layer.bias is not None:
        layer.bias.data.zero_()
    return {"kaiming": "He normal", "xavier": "Xavier normal"}.get(scheme, scheme)


def scale_to_unit_variance(
    module: nn.Module, run_loss: Callable[[], Tensor], layers: Sequence[WeightedLayer]
) -> None:
    """Divides weights so that each layer's output on a batch has unit variance (LSUV), in one pass."""

    def scale(layer: WeightedLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        deviation = output.detach().float().std()
        if not (bool(torch.isfinite(deviation)) and deviation > 0):
            return None
        layer.weight.data.div_(deviation.to(layer.weight))
        return output / deviation.to(output)

    handles = [layer.register_forward_hook(scale) for layer in layers]
    try:
        with preserve_state(module), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run_loss()
    finally:
        for handle in handles:
            handle.remove()
