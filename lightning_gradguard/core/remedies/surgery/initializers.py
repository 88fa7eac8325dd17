"""Initialization of hidden layers for the activation after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.probe import RECTIFIERS
from lightning_gradguard.core.initialization.repair import repair
from lightning_gradguard.core.remedies.surgery.data_flow import DataFlow, Layer

INITIALIZERS = ("kaiming", "xavier", "orthogonal", "lsuv")


def initializable(module: nn.Module, flow: DataFlow, names: Collection[str]) -> list[str]:
    """Returns hidden layers whose weight is trained and no other module's, or those that are named."""
    holders = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    places = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    return [
        layer.name
        for layer in flow.weighted()
        if (layer.name in names if names else layer.is_hidden)
        and (weight := layer.module._parameters.get("weight")) is not None
        and weight.requires_grad
        and not isinstance(weight, nn.parameter.UninitializedParameter)
        and holders[id(weight)] == places[id(layer.module)]
    ]


def initialize(
    module: nn.Module,
    flow: DataFlow,
    names: Collection[str],
    to: str,
    seed: int,
    run_loss: Callable[[], Tensor] | None,
) -> list[str]:
    """Draws weights anew, with biases of zero; `"lsuv"` also scales outputs to unit variance on a batch.

    Raises:
        ValueError: If `"lsuv"` has no batch.
    """
    if to == "lsuv":
        if run_loss is None:
            raise ValueError("initialize: to='lsuv' scales layers on a batch; give `run_loss`.")
        done = repair(module, run_loss, names=names, seed=seed)
        return [name for name in done.changed if name in names]
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        _draw(flow.layers[name], to, generator)
    return list(names)


@torch.no_grad()
def _draw(layer: Layer, to: str, generator: torch.Generator) -> None:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    drawn = torch.empty(weight.shape)
    gain = nn.init.calculate_gain("tanh") if layer.activation == "tanh" else 1.0
    if to == "kaiming":
        nonlinearity = "relu" if layer.activation in RECTIFIERS else "linear"
        nn.init.kaiming_normal_(drawn, nonlinearity=nonlinearity, generator=generator)  # type: ignore[arg-type]
    elif to == "xavier":
        nn.init.xavier_normal_(drawn, gain=gain, generator=generator)
    else:
        nn.init.orthogonal_(drawn, gain=gain, generator=generator)
    weight.copy_(drawn)
    if isinstance(layer.module.bias, Tensor):
        layer.module.bias.zero_()
