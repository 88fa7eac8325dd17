"""What single changes of a module do for deep networks on digits: the table of docs/callbacks/treatment.md.

`python -m benchmarks.treatment.changes` prints it, in about 20 minutes on one core.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gradguard import Change
from lightning_gradguard.core.remedies.changes import apply, in_order

STEPS, BATCH, TRAINED, WIDTH = 300, 64, 1400, 64
SEEDS = (0, 1)
#: Activation, number of hidden layers after the first, optimizer, learning rate. Inputs are 0 to 16.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], int, str, float]] = {
    "10 sigmoids, Adam 0.001": (nn.Sigmoid, 10, "adam", 1e-3),
    "30 tanh, SGD 0.05": (nn.Tanh, 30, "sgd", 0.05),
}
_RELU = Change("replace_activation", {"to": "relu"})
_BATCH, _LAYER = (Change("add_normalization", {"norm": norm}) for norm in ("batch", "layer"))
CHANGES: Mapping[str, Sequence[Change]] = {
    "none": (),
    "`initialize`, `kaiming`": (Change("initialize"),),
    "`initialize`, `lsuv`": (Change("initialize", {"to": "lsuv"}),),
    "`replace_activation` and `initialize`": (_RELU, Change("initialize")),
    "`add_normalization`, `batch`": (_BATCH,),
    "`add_normalization`, `layer`": (_LAYER,),
    "`add_residual`": (Change("add_residual"),),
    "`add_residual`, weight 1": (Change("add_residual", {"weight": 1.0}),),
    "`add_residual`, weight 0.1": (Change("add_residual", {"weight": 0.1}),),
    "`add_residual`, weight 0": (Change("add_residual", {"weight": 0.0}),),
    "`add_residual` and `add_normalization`, `batch`": (_BATCH, Change("add_residual")),
    "`add_residual` and `add_normalization`, `layer`": (_LAYER, Change("add_residual")),
}


def digits() -> tuple[Tensor, Tensor]:
    """Returns images and classes in a fixed order."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images).float()[order], torch.tensor(classes)[order]


def network(activation: Callable[[], nn.Module], depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(nn.Linear(64, WIDTH), activation(), *hidden, nn.Linear(WIDTH, 10))


def accuracy(module: nn.Module, optimizer: str, rate: float, seed: int) -> float:
    """Trains a network, and returns its accuracy on held-out images."""
    images, classes = digits()
    torch.manual_seed(seed)
    parameters = module.parameters()
    stepped: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=rate)
        if optimizer == "adam"
        else torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(TRAINED, (BATCH,), generator=generator)
        stepped.zero_grad()
        nn.functional.cross_entropy(module(images[chosen]), classes[chosen]).backward()
        stepped.step()
    predicted = module.eval()(images[TRAINED:]).argmax(1)
    return float((predicted == classes[TRAINED:]).float().mean())


def changed(module: nn.Module, changes: Sequence[Change]) -> nn.Module:
    """Makes changes of a network, fitted to its first batch."""
    images, classes = (tensor[:BATCH] for tensor in digits())
    for change in in_order(changes):
        apply(module, change, lambda: nn.functional.cross_entropy(module(images), classes))
    return module


def main() -> None:
    """Prints the table, row by row."""
    print(f"| change | {' | '.join(NETWORKS)} |\n|---|{'---:|' * len(NETWORKS)}")
    for name, changes in CHANGES.items():
        cells = []
        for activation, depth, optimizer, rate in NETWORKS.values():
            scores = [
                accuracy(changed(network(activation, depth, seed), changes), optimizer, rate, seed)
                for seed in SEEDS
            ]
            cells.append(f"{statistics.mean(scores):.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
