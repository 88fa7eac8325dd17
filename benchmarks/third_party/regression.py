"""The 17 faults of TheDeepChecker's regression network, and the network without a fault.

Ben Braiek, Khomh, Testing Feedforward Neural Networks Training Programs, 2022, arXiv:2204.00694. Cars with
nine columns are made here, by formulas of the kind and scale of the original table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.programs import Batch, Loss, Program, Task, r2, served, split
from benchmarks.third_party.programs import (
    EXPLODING,
    NOT_MOVING,
    RATE,
    STUCK,
    UNSCALED,
    Case,
    Softmax,
    fill,
    squared,
    stack,
)

STEPS, SIZE = 1000, 32


def cars(seed: int) -> Batch:
    """Nine columns of 392 cars, and miles per gallon."""
    g = torch.Generator().manual_seed(seed)
    n = 392
    cylinders = torch.tensor([4.0, 6.0, 8.0])[
        torch.multinomial(torch.tensor([0.52, 0.22, 0.26]), n, True, generator=g)
    ]
    noise = [torch.randn(n, generator=g) for _ in range(5)]
    displacement = 52 * cylinders - 90 + 25 * noise[0]
    horsepower = 0.3 * displacement + 46 + 14 * noise[1]
    weight = 7 * displacement + 1600 + 280 * noise[2]
    acceleration = 21 - 0.055 * horsepower + 1.8 * noise[3]
    year = 70.0 + torch.randint(13, (n,), generator=g)
    origin = torch.where(cylinders > 4, 0, torch.randint(3, (n,), generator=g))
    columns = [cylinders, displacement, horsepower, weight, acceleration, year]
    x = torch.cat([torch.stack(columns, 1), nn.functional.one_hot(origin, 3).float()], 1)
    miles = 46 - 0.0077 * weight - 0.02 * horsepower + 0.75 * (year - 76) + 1.5 * (origin > 0) + 3 * noise[4]
    return x, miles.clamp(min=9)[:, None]


#: What is changed, and the incidents that name it; of a change that does no harm, its would-be symptoms.
FAULTS: dict[str, tuple[str, frozenset[str]]] = {
    "flipped sign": ("the gradient's sign is flipped", EXPLODING | {"rollback", "stuck_loss"}),
    "constant weights": ("all weights are .01", frozenset({"poor_initialization"})),
    "rate .1": ("Adam .1", RATE),
    "unscaled inputs": ("inputs as they are", UNSCALED | EXPLODING),
    "rate 1e-5": ("Adam 1e-5", NOT_MOVING),
    "sigmoid": ("sigmoid as output, targets in [-1, 1]", STUCK | {"saturated_units"}),
    "softmax": ("softmax over the one output", STUCK),
    "broadcast": ("the loss broadcasts (n, 1) against (n,)", STUCK),
    "cross entropy": ("cross entropy for a regression", STUCK),
    "shuffled": ("inputs are shuffled, targets are not", STUCK),
    "scaled twice": ("inputs are scaled twice", UNSCALED),
    "epsilon": ("Adam with an epsilon of 1e-16", EXPLODING),
    "wide weights": ("weights of N(0, .25)", frozenset({"poor_initialization"}) | EXPLODING),
    "no decay": ("weight decay of 1e-12", frozenset({"weight_stagnation"})),
    "decay": ("weight decay of .1", NOT_MOVING),
    "large targets": ("targets times 10", UNSCALED),
    "summed": ("the loss is a sum", EXPLODING),
}


def _loss(fault: str) -> Loss:
    def broadcast(net: nn.Module, batch: Batch) -> Any:
        return (net(batch[0]) - batch[1][:, 0]).square().mean()

    def entropy(net: nn.Module, batch: Batch) -> Any:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def summed(net: nn.Module, batch: Batch) -> Any:
        return (net(batch[0]) - batch[1]).square().sum()

    return {"broadcast": broadcast, "cross entropy": entropy, "summed": summed}.get(fault, squared)


def _flip(net: nn.Module, step: int) -> None:
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.neg_()


def _weights(fault: str) -> Callable[[Tensor], Any]:
    return {
        "constant weights": lambda w: nn.init.constant_(w, 0.01),
        "wide weights": lambda w: nn.init.normal_(w, 0, 0.25),
    }.get(fault, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))


def _make(fault: str) -> Callable[[int], Program]:
    head = {"sigmoid": nn.Sigmoid, "softmax": Softmax}.get(fault)
    rate = {"rate .1": 0.1, "rate 1e-5": 1e-5}.get(fault, 1e-3)
    decay = {"no decay": 1e-12, "decay": 0.1}.get(fault, 1e-5)
    eps = 1e-16 if fault == "epsilon" else 1e-8

    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        net = fill(stack([9, 64, 64, 1], nn.ReLU, nn.ReLU, head), _weights(fault))
        x, y = cars(seed)
        low, high = y.min(), y.max()
        y = (y - low) / (high - low)
        if fault == "sigmoid":
            y = 2 * y - 1
        if fault == "large targets":
            y = 10 * y
        if fault != "unscaled inputs":
            x = (x - x.mean(0)) / x.std(0)
        if fault == "scaled twice":
            x = (x - x.min(0).values) / (x.max(0).values - x.min(0).values)
        train, test = split((x, y), 80, seed)
        if fault == "shuffled":
            train = train[0].roll(1, 0), train[1]
        task = Task(
            net,
            _loss(fault),
            lambda parameters: torch.optim.Adam(parameters, rate, eps=eps, weight_decay=decay),
            on_gradients=_flip if fault == "flipped sign" else None,
        )
        return Program(task, served(train, STEPS, SIZE, seed), r2(net, test))

    return make


def cases() -> list[Case]:
    """Returns the network without a fault, and with each."""
    healthy = Case("regression", "clean", "9-64-64-1, Adam .001", _make(""))
    return [
        healthy,
        *(Case("regression", name, title, _make(name), kinds) for name, (title, kinds) in FAULTS.items()),
    ]
