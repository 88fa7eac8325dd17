"""Parts of the zoo: activations, initializers, and networks of several families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.casebook.healthy import Residual

WIDTH = 32
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": nn.Hardtanh,
}
INITIALIZERS: dict[str, Callable[[Tensor], Any]] = {
    "default": lambda weight: weight,
    "xavier": nn.init.xavier_normal_,
    "he": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "normal 1": lambda weight: nn.init.normal_(weight, 0, 1),
    "normal .3": lambda weight: nn.init.normal_(weight, 0, 0.3),
    "normal .02": lambda weight: nn.init.normal_(weight, 0, 0.02),
    "zeros": nn.init.zeros_,
    "constant": lambda weight: nn.init.constant_(weight, 1 / math.sqrt(weight[0].numel())),
}


def initialized(network: nn.Module, init: str) -> nn.Module:
    """Initializes every matrix of a network but those of normalization."""
    for name, weight in network.named_parameters():
        if weight.ndim > 1 and "place" not in name:
            INITIALIZERS[init](weight.data)
        elif init not in ("default", "zeros") and name.endswith("bias"):
            nn.init.zeros_(weight)
    return network


def mlp(depth: int, activation: str, kind: str = "plain", width: int = WIDTH) -> nn.Module:
    """Linear layers on digits; `kind` is `plain`, `bn`, `ln`, `residual`, `pre` or `zero`."""
    layers: list[nn.Module] = [nn.Linear(64, width), ACTIVATIONS[activation]()]
    for _ in range(depth - 1):
        linear, act = nn.Linear(width, width), ACTIVATIONS[activation]()
        if kind == "zero":
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            layers.append(Residual(nn.Sequential(linear, act, last)))
        elif kind == "residual":
            layers.append(Residual(nn.Sequential(linear, act)))
        elif kind == "pre":
            layers.append(Residual(nn.Sequential(nn.LayerNorm(width), linear, act, nn.Linear(width, width))))
        elif kind == "bn":
            layers += [linear, nn.BatchNorm1d(width), act]
        elif kind == "ln":
            layers += [linear, nn.LayerNorm(width), act]
        else:
            layers += [linear, act]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(depth: int, kind: str, channels: int = 4) -> nn.Module:
    """Convolutions on 8 x 8 images of digits; `kind` is `plain`, `bn`, `residual` or `residual bn`."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
    for i in range(depth - 1):
        if i == 1:
            layers.append(nn.MaxPool2d(2))
        body: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1)]
        body += [nn.BatchNorm2d(channels)] if kind.endswith("bn") else []
        body.append(nn.ReLU())
        layers += [Residual(nn.Sequential(*body))] if kind.startswith("residual") else body
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


class Transformer(nn.Module):
    """An encoder over tokens, or over the rows of an image, whose mean is classified."""

    def __init__(self, depth: int, norm_first: bool, rows: bool = False, width: int = 16) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Linear(8, width) if rows else nn.Embedding(8, width)
        self.rows = rows
        self.place = nn.Parameter(torch.randn(8, width) * (0.1 if rows else 1.0))
        layer = nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        # copies of one layer would have the same weights
        for child in self.body.modules():
            if isinstance(child, nn.Linear):
                child.reset_parameters()
            elif isinstance(child, nn.MultiheadAttention):
                child._reset_parameters()
        self.head = nn.Linear(width, 10 if rows else 8)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        h = self.embed(x.view(-1, 8, 8) if self.rows else x) + self.place
        out: Tensor = self.head(self.body(h).mean(1))
        return out


class Mixer(nn.Module):
    """Layers that mix the rows of an image, and then its columns."""

    def __init__(self, depth: int, norm: bool, skip: bool, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2 * depth))
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.columns = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.skip, self.head = skip, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        h = self.embed(x.view(-1, 8, 8))
        for i, (row, column) in enumerate(zip(self.rows, self.columns, strict=True)):
            y = row(self.norms[2 * i](h).transpose(1, 2)).transpose(1, 2).relu()
            h = h + y if self.skip else y
            y = column(self.norms[2 * i + 1](h)).relu()
            h = h + y if self.skip else y
        out: Tensor = self.head(h.mean(1))
        return out


class Recurrent(nn.Module):
    """A recurrent module whose last output is classified."""

    def __init__(self, kind: str, init: str, times: int, width: int = 24) -> None:
        super().__init__()
        makers: dict[str, Callable[[], nn.RNNBase]] = {
            "rnn": lambda: nn.RNN(4, width, batch_first=True),
            "rnn relu": lambda: nn.RNN(4, width, batch_first=True, nonlinearity="relu"),
            "gru": lambda: nn.GRU(4, width, batch_first=True),
            "lstm": lambda: nn.LSTM(4, width, batch_first=True),
        }
        self.rnn, self.head = makers[kind](), nn.Linear(width, 4)
        weight: Tensor = self.rnn.get_parameter("weight_hh_l0").data
        for part in torch.split(weight, width):
            if init == "orthogonal":
                nn.init.orthogonal_(part)
            elif init == "identity":
                nn.init.eye_(part)
            elif init == "normal .6":
                nn.init.normal_(part, 0, 0.6)
        if init == "gate":
            self.rnn.get_parameter("bias_hh_l0").data[width : 2 * width] = math.log(times)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


class CellLoop(nn.Module):
    """A cell that is called at each time, and its last state classified."""

    cell: nn.RNNCell | nn.GRUCell

    def __init__(self, kind: str, scale: float, width: int = 24) -> None:
        super().__init__()
        makers: dict[str, Callable[[], nn.RNNCell | nn.GRUCell]] = {
            "cell": lambda: nn.RNNCell(4, width),
            "gru cell": lambda: nn.GRUCell(4, width),
        }
        self.cell, self.head = makers[kind](), nn.Linear(width, 4)
        for part in torch.split(self.cell.weight_hh.data, width):
            nn.init.orthogonal_(part, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        out: Tensor = self.head(h)
        return out
