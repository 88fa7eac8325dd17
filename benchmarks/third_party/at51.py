"""AT-51: the 31 failing and 20 healthy networks of AUTOTRAINER's archive that can be rebuilt.

Zhang, Zhai, Ma, Shen, AUTOTRAINER: An Automatic DNN Training Problem Detection and Repair System, 2021.
Layers of five units on two inputs; depths, activations and initializers are facts of the archive, as are its
300 epochs. Circles and blobs come from scikit-learn, as theirs do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.datasets import make_blobs, make_circles
from torch import Tensor, nn

from benchmarks.evidence.programs import Batch, Program, Task, adam
from benchmarks.third_party.programs import (
    DYING,
    EXPLODING,
    VANISHING,
    Case,
    Exponential,
    binary,
    epochs,
    fill,
    he_uniform,
    rounded,
    small_uniform,
    stack,
)

EPOCHS, WIDTH = 300, 5
Init = Callable[[Tensor], Any]

#: Identifier and number of layers by data set and family.
FAILING = {
    "exponential": {
        "Circle": "01bb8f27 11, 0ae2cd88 9, 0eb8d545 12, 169a3fa1 11, 205c07d5 9, 636bde2e 12, 9e7361d4 10, "
        "d064a5da 10",
        "Blob": "0448d813 9, 0b6f114d 10, 661b4e86 11, 9b8bdaab 10, e73037c2 9",
    },
    "sigmoid": {
        "Circle": "5ab0aeda 12, c632dcbd 13, dd8c879b 14, ebc164bf 12, f476c610 13",
        "Blob": "2569b90f 12, bd4e58b7 13, e706e7cd 12",
    },
    "small ReLU": {
        "Circle": "10702695 9, 14989730 9, 8de47bdc 9, c54b3d2e 10",
        "Blob": "384108d9 9, f7e7b91b 10",
    },
    "deep ReLU": {"Circle": "46edb7df 16, 8e28bdef 17, e8a6e959 18", "Blob": "84c77206 16"},
}
_PARTS: dict[str, tuple[Callable[[], nn.Module], Init, frozenset[str]]] = {
    "exponential": (Exponential, he_uniform, EXPLODING),
    "sigmoid": (nn.Sigmoid, he_uniform, VANISHING),
    # with biases of 0 a layer may have no unit that is above 0
    "small ReLU": (nn.ReLU, small_uniform, VANISHING | {"dead_units"}),
    "deep ReLU": (nn.ReLU, he_uniform, DYING),
}


def _scaled(scale: float, by_average: bool = False, normal: bool = False) -> Init:
    """An initializer of a variance of `scale` by the inputs, or by the mean of inputs and outputs."""

    def init(weight: Tensor) -> Any:
        n_in, n_out = (len(weight), len(weight)) if weight.ndim == 1 else (weight.shape[1], len(weight))
        std = (scale / ((n_in + n_out) / 2 if by_average else n_in)) ** 0.5
        return (
            nn.init.normal_(weight, 0, std)
            if normal
            else nn.init.uniform_(weight, -std * 3**0.5, std * 3**0.5)
        )

    return init


_NORMAL = partial(nn.init.normal_, std=0.05)
_TRUNCATED = partial(nn.init.trunc_normal_, std=0.05, a=-0.1, b=0.1)
#: Number of layers of tanh, initializers of the last layer's weight and bias.
HEALTHY: dict[str, dict[str, tuple[int, Init, Init]]] = {
    "Circle": {
        "simplednn": (6, he_uniform, nn.init.zeros_),
        "mi_7": (6, _scaled(1), nn.init.zeros_),
        "ma_7": (6, he_uniform, nn.init.zeros_),
        "al_10": (9, he_uniform, nn.init.zeros_),
        "mi_al_10": (9, _scaled(1, normal=True), _scaled(1, True, True)),
        "al_13": (12, he_uniform, nn.init.zeros_),
        "mi_al_13": (12, _scaled(1, True), _NORMAL),
        "mi_al_16": (15, _TRUNCATED, _scaled(1, True)),
        "al_19": (18, he_uniform, nn.init.zeros_),
        "mi_al_19": (18, _scaled(1, True, True), _scaled(1)),
    },
    "Blob": {
        "simplednn_blob": (6, he_uniform, nn.init.zeros_),
        "mi_7": (6, nn.init.zeros_, _scaled(1)),
        "mi_7#2": (6, small_uniform, _scaled(1, True, True)),
        "ma_mi_7": (6, _scaled(2, normal=True), _scaled(2, normal=True)),
        "mi_al_10": (9, nn.init.zeros_, nn.init.zeros_),
        "al_13": (12, he_uniform, nn.init.zeros_),
        "mi_al_13": (12, nn.init.ones_, small_uniform),
        "mi_al_16": (15, _scaled(1, True), _scaled(2, normal=True)),
        "al_19": (18, he_uniform, nn.init.zeros_),
        "mi_al_19": (18, _scaled(1, normal=True), _scaled(1, True, True)),
    },
}


def _circles() -> Batch:
    x, y = make_circles(1000, noise=0.1, random_state=1)
    return torch.tensor(x).float(), torch.tensor(y).float()[:, None]


def _blobs() -> Batch:
    x, y = make_blobs(1000, centers=3, n_features=2, cluster_std=2, random_state=2)
    return torch.tensor(x).float(), torch.tensor(y)


def _shares(net: nn.Module, batch: Batch) -> Any:
    """Cross entropy of sigmoids that are divided by their sum, as Keras does it."""
    shares = net(batch[0])
    shares = (shares / shares.sum(1, keepdim=True)).clamp(1e-7, 1 - 1e-7)
    return nn.functional.nll_loss(shares.log(), batch[1])


def _accuracy(net: nn.Module, batch: Batch) -> Callable[[], float]:
    def score() -> float:
        with torch.no_grad():
            return float((net(batch[0]).argmax(1) == batch[1]).float().mean())

    return score


def _make(
    data: str,
    number: int,
    depth: int,
    activation: Callable[[], nn.Module],
    init: Init,
    head: tuple[Init, Init],
) -> Callable[[int], Program]:
    def make(seed: int) -> Program:
        torch.manual_seed(1000 * seed + number)
        is_circle = data == "Circle"
        sizes = [2] + [WIDTH] * (depth - 1) + [1 if is_circle else 3]
        net = fill(stack(sizes, *[activation] * (depth - 1), nn.Sigmoid), init)
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        head[0](last.weight)
        head[1](last.bias)
        batch = _circles() if is_circle else _blobs()
        train, test = tuple(part[:700] for part in batch), tuple(part[700:] for part in batch)
        task = Task(net, binary if is_circle else _shares, adam(1e-3, eps=1e-7))
        score = rounded(net, test) if is_circle else _accuracy(net, test)
        return Program(task, epochs(train, EPOCHS, 128 if is_circle else 256, seed), score)

    return make


def cases() -> list[Case]:
    """Returns all 51 networks."""
    found = list[Case]()
    for family, by_data in FAILING.items():
        activation, init, kinds = _PARTS[family]
        for data, listed in by_data.items():
            for entry in listed.split(", "):
                name, depth = entry.split()
                make = _make(data, len(found), int(depth), activation, init, (he_uniform, nn.init.zeros_))
                found.append(Case("at51", f"{data} {name}", f"{family}, {depth} layers", make, kinds))
    for data, by_name in HEALTHY.items():
        for name, (layers, weight, bias) in by_name.items():
            make = _make(data, len(found), layers, nn.Tanh, he_uniform, (weight, bias))
            found.append(Case("at51", f"{data} {name}", f"tanh, {layers} layers", make))
    return found
