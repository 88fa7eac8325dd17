"""Networks and optimizers, and the batches that they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.entries import digits, recall, tokens
from benchmarks.zoo.networks import Recurrent, Transformer, cnn, mlp

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=0.1),
}


def plane(
    n: int, size: int, generator: torch.Generator, scale: float = 1.0, shift: float = 0.0
) -> list[Batch]:
    """A smooth function of eight numbers, of variance `scale`² around `shift`."""
    xs = torch.randn(n, size, 8, generator=generator)
    return [(x, scale * (x[:, :1] * x[:, 1:2] + x[:, 2:3]) / 2**0.5 + shift) for x in xs]


def regression() -> nn.Module:
    """Two hidden layers on eight numbers."""
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


@dataclass(frozen=True)
class Network:
    """A network, its batches and its loss.

    Args:
        make: Builds it after a seed was set.
        data: Makes batches, by number, size and generator.
        loss: Of output and target.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int, int, torch.Generator], list[Batch]] = field(default=digits)
    loss: Loss = functional.cross_entropy


short = partial(recall, times=8)
NETWORKS = {
    "MLP, ReLU": Network(lambda: mlp(3, "relu")),
    "MLP, ReLU, 8 layers": Network(lambda: mlp(8, "relu")),
    "MLP, tanh": Network(lambda: mlp(3, "tanh")),
    "MLP, tanh, 8 layers": Network(lambda: mlp(8, "tanh")),
    "MLP, sigmoid": Network(lambda: mlp(2, "sigmoid")),
    "MLP, GELU, layer norm": Network(lambda: mlp(4, "gelu", "ln")),
    "MLP, batch norm": Network(lambda: mlp(4, "relu", "bn")),
    "residual MLP": Network(lambda: mlp(6, "relu", "pre")),
    "CNN": Network(lambda: cnn(3, "plain")),
    "CNN, batch norm": Network(lambda: cnn(4, "bn")),
    "RNN": Network(lambda: Recurrent("rnn", "orthogonal", 8), short),
    "GRU": Network(lambda: Recurrent("gru", "default", 8), short),
    "LSTM": Network(lambda: Recurrent("lstm", "default", 8), short),
    "transformer, pre-norm": Network(lambda: Transformer(2, True), tokens),
    "transformer, post-norm": Network(lambda: Transformer(2, False), tokens),
    "regression": Network(regression, plane, functional.mse_loss),
    "regression, unscaled": Network(regression, partial(plane, scale=30.0, shift=50.0), functional.mse_loss),
}
