"""Three small networks, three optimizers, and the rate that trains each pair best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, SIZE = 500, 32
Data = list[tuple[Tensor, Tensor]]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "Adam": torch.optim.Adam,
}


class LastHidden(nn.Module):
    """A recurrent network whose last state is read out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(x)[0][:, -1])
        return y


def deep(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def clusters(n: int, size: int, seed: int) -> Data:
    """Four classes around centres of their own."""
    centres = 1.2 * torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    targets = [torch.randint(4, (size,), generator=g) for _ in range(n)]
    return [(centres[y] + torch.randn(size, 20, generator=g), y) for y in targets]


def surface(n: int, size: int, seed: int) -> Data:
    """A smooth function of eight numbers."""
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 8, generator=g) for _ in range(n)]
    return [(x, x[:, :1] * x[:, 1:2] + 2 * x[:, 2:3]) for x in inputs]


def sequences(n: int, size: int, seed: int) -> Data:
    """Which of four symbols stands at the first of five places."""
    g = torch.Generator().manual_seed(seed)
    symbols = [torch.randint(4, (size, 5), generator=g) for _ in range(n)]
    return [(F.one_hot(s, 4).float(), s[:, 0]) for s in symbols]


def accuracy(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(1) == target).float().mean())


def explained(output: Tensor, target: Tensor) -> float:
    """R squared, from 0 up."""
    return max(0.0, 1 - float((output - target).square().mean() / target.var()))


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Args:
        network: Makes the network.
        data: Makes batches, by number, size and seed.
        loss: Of output and target.
        score: Of output and target on held-out data; 1 is best.
        rates: The rate by optimizer that gives the best score, by `python -m benchmarks.rates --part grid`.
    """

    network: Callable[[], nn.Module]
    data: Callable[[int, int, int], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    rates: dict[str, float]


TASKS = {
    "classifier": Task(
        lambda: deep(20, 64, 64, 64, 4), clusters, F.cross_entropy, accuracy,
        {"SGD": 0.3, "momentum": 0.03, "Adam": 0.003},
    ),
    "regression": Task(
        lambda: deep(8, 64, 64, 1), surface, F.mse_loss, explained,
        {"SGD": 0.1, "momentum": 0.01, "Adam": 0.01},
    ),
    "recurrent": Task(
        LastHidden, sequences, F.cross_entropy, accuracy, {"SGD": 1.0, "momentum": 0.3, "Adam": 0.01}
    ),
}  # fmt: skip
