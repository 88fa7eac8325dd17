"""A small network with buffers, and optimizers that train it."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("large", torch.zeros(100_000))


def steps(net: Net, optimizer: torch.optim.Optimizer, n: int) -> list[torch.Tensor]:
    for _ in range(n):
        optimizer.zero_grad()
        net.body(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    return [*(p.detach().clone() for p in net.parameters()), *(b.clone() for b in net.buffers())]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}
