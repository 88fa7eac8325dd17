"""Networks that can and cannot train, and the loss of digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gradguard.core.initialization import Finding, check


def digits() -> tuple[Tensor, Tensor]:
    inputs, target = load_digits(return_X_y=True)
    return torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(target)


def mlp(
    depth: int = 12,
    activation: type[nn.Module] = nn.ReLU,
    initialize: Callable[[Tensor], object] | None = None,
) -> Any:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), activation())]
    network = nn.Sequential(*layers, nn.Linear(64, 10))
    if initialize is not None:
        for layer in network:
            if isinstance(layer, nn.Linear):
                initialize(layer.weight)
    return network


def he(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def loss_of(network: nn.Module) -> Callable[[], Tensor]:
    inputs, target = digits()
    return lambda: nn.functional.cross_entropy(network(inputs[:128]), target[:128])


def fails(network: nn.Module) -> list[Finding]:
    return [f for f in check(network, loss_of(network))[0] if f.severity == "fail"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + branch


def convolutions() -> nn.Sequential:
    block = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *block,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNN] | type[nn.LSTM]) -> None:
        super().__init__()
        self.rnn = kind(8, 32, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh") and kind is nn.RNN:
                nn.init.orthogonal_(weight)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])
        return output


def planted(network: Any, plant: Callable[[Any], object]) -> Any:
    with torch.no_grad():
        plant(network)
    return network
