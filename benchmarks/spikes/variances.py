"""Measures by how much a batch raises a running variance in healthy runs: the margin of `snapshots.JUMP`.

`python -m benchmarks.spikes.variances` takes some minutes on one core. It prints each run, and the largest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gradguard.core.snapshots import SEEN

STEPS, CLASSES, WIDTH = 300, 10, 64


def mlp() -> nn.Sequential:
    """Normalizes its input, and twice between layers."""
    block = [nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    more = [nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
    return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), *block, *more)


def cnn() -> nn.Sequential:
    """Normalizes after each of three convolutions."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for n, m, stride in ((1, 16, 1), (16, 16, 2), (16, 32, 1)):
        layers += [nn.Conv2d(n, m, 3, stride, padding=1), nn.BatchNorm2d(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES))


def deep() -> nn.Sequential:
    """Ten layers, none of which normalizes the input."""
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH)]
    for _ in range(8):
        layers += [nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def growth(net: nn.Module, make: Callable[..., Any], x: Tensor, y: Tensor, size: int) -> float:
    """Trains a network; returns the largest growth in one step after the first ones."""
    optimizer = make(net.parameters())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for step in range(STEPS):
        rows = torch.randint(0, len(x), (size,), generator=generator)
        then = torch.cat([n.running_var.clone() for n in norms if n.running_var is not None])
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = torch.cat([n.running_var for n in norms if n.running_var is not None])
        if step >= SEEN:
            largest = max(largest, float((now / torch.maximum(then, then.mean())).max()))
    return largest


def main() -> None:
    """Prints the growth of each run, and the largest of all."""
    torch.set_num_threads(1)
    digits, classes = load_digits(return_X_y=True)
    raw, y = torch.tensor(digits).float(), torch.tensor(classes)
    standard = (raw - raw.mean(0)) / raw.std(0).clamp_min(1e-3)
    torch.manual_seed(0)
    tails = torch.distributions.StudentT(2.0).sample((len(raw), 1)).abs()
    data = {
        "standardized": standard,
        "raw": raw,
        "tails of a t distribution": standard * tails,
        "columns of 1e-3 to 1e6": standard * torch.logspace(-3, 6, WIDTH),
    }
    optimizers: dict[str, Callable[..., Any]] = {
        "SGD 0.1, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "Adam 1e-2": lambda p: torch.optim.Adam(p, lr=1e-2),
        "SGD 1": lambda p: torch.optim.SGD(p, lr=1.0),
    }
    found = []
    for net, (kind, x), (name, make), size in itertools.product(
        (mlp, cnn, deep), data.items(), optimizers.items(), (8, 64)
    ):
        torch.manual_seed(0)
        value = growth(net(), make, x, y, size)
        found.append(value)
        print(f"{net.__name__}, {kind}, {name}, batches of {size}: {value:.3g}", flush=True)
    print(f"{len(found)} runs, at most {max(found):.3g}-fold")


if __name__ == "__main__":
    main()
