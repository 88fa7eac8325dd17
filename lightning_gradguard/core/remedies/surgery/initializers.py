"""Initialization of hidden layers for the activation after them, and of recurrence and attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.repair import draw_weights, scale_to_unit_variance
from lightning_gradguard.core.remedies.surgery.data_flow import RECURRENT, WEIGHTED, DataFlow, Layer

INITIALIZERS = ("kaiming", "xavier", "orthogonal", "small", "lsuv")
#: Modules of several weights, which are initialized as they are in torch's own recipes for any of the above.
_WHOLE = (*RECURRENT, nn.MultiheadAttention)


def initializable(module: nn.Module, flow: DataFlow, names: Collection[str]) -> list[Layer]:
    """Returns hidden layers whose weights are trained and no other module's, or those that are named.

    The layer that runs last is not hidden, also if the code multiplies its outputs by a weight, such as that
    of a tied embedding: they are the scale of the answers.
    """
    last = next(reversed(flow.layers.values()), None)
    holders = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    places = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    return [
        layer
        for layer in (flow.named(module, names) if names else flow.layers.values())
        if isinstance(layer.module, (*WEIGHTED, *_WHOLE))
        and (names or (layer.is_hidden and layer is not last) or isinstance(layer.module, _WHOLE))
        and (weights := _weights_of(layer.module))
        and all(weight.requires_grad for weight in weights)
        and not any(isinstance(weight, nn.parameter.UninitializedParameter) for weight in weights)
        and all(holders[id(weight)] == places[id(layer.module)] for weight in weights)
    ]


def _weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """Returns the weights of a layer; none for one whose weight is computed, as under a parametrization."""
    if isinstance(layer, WEIGHTED):
        return [weight] if (weight := layer._parameters.get("weight")) is not None else []
    return [weight for weight in layer.parameters() if weight.ndim > 1]


def initialize(
    module: nn.Module,
    names: Sequence[str],
    activations: Sequence[str],
    to: str,
    seed: int,
    run_loss: Callable[[], Tensor] | None,
) -> None:
    """Draws weights anew, with biases of zero; `"lsuv"` also scales outputs to unit variance on a batch.

    Recurrent modules get orthogonal recurrent weights and Xavier's for their inputs, attention Xavier's.
    `activations` are the functions after each layer, empty for none.

    Raises:
        ValueError: If `"lsuv"` has no batch.
    """
    if to == "lsuv" and run_loss is None:
        raise ValueError("initialize: to='lsuv' scales layers on a batch; give `run_loss`.")
    generator = torch.Generator().manual_seed(seed)
    layers: list[Any] = [module.get_submodule(name) for name in names]
    for layer, activation in zip(layers, activations, strict=True):
        if isinstance(layer, _WHOLE):
            _draw_whole(layer, generator)
        else:
            draw_weights(layer, activation, generator, None if to == "lsuv" else to)
    if run_loss is not None and to == "lsuv":
        scale_to_unit_variance(module, run_loss, [x for x in layers if isinstance(x, WEIGHTED)])


@torch.no_grad()
def _draw_whole(layer: nn.Module, generator: torch.Generator) -> None:
    """Initializes recurrence or attention, each gate or projection by itself."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim < 2:
            parameter.zero_()
            continue
        n_blocks = 1
        if isinstance(layer, RECURRENT):
            n_blocks = len(parameter) // layer.hidden_size
        elif name == "in_proj_weight":
            n_blocks = 3
        for block in torch.split(parameter, len(parameter) // max(n_blocks, 1)):
            drawn = torch.empty(block.shape)
            if "weight_hh" in name:
                nn.init.orthogonal_(drawn, generator=generator)
            else:
                nn.init.xavier_normal_(drawn, generator=generator)
            block.copy_(drawn)
