"""Programs generated as AUTOTRAINER's were: network, initialization, rate, optimizer, data."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import string
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits, make_blobs, make_circles
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

#: Optimizer steps of a run, programs of the benchmark, characters of a text.
STEPS, N_PROGRAMS, TIMES = 600, 240, 24
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
INITIALIZATIONS = ("default", "he", "normal 0.05", "normal 1")
#: Factors of the learning rate that trains a healthy network.
RATES = (1.0, 100.0, 0.001)
DATA = ("digits", "blobs", "circles", "images", "text")


@dataclass(frozen=True)
class Spec:
    """A program.

    Args:
        data: One of `DATA`, which decides the kind of network.
        depth: Hidden layers.
        width: Units of each.
        activation: After each.
        initialization: Of hidden weights.
        rate: Factor of the usual learning rate.
        optimizer: `adam` or `sgd`.
    """

    data: str
    depth: int
    width: int
    activation: str
    initialization: str
    rate: float
    optimizer: str

    @property
    def name(self) -> str:
        """All of it in a line."""
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())

    @property
    def twin(self) -> Spec:
        """The healthy program on the same data."""
        return Spec(self.data, 2 if self.data != "text" else 1, 32, "relu", "default", 1.0, "adam")


def specs() -> Iterator[Spec]:
    """Yields the programs in an order that is the same each time; any part of it is a sample."""
    draw = random.Random(0)
    seen: set[Spec] = set()
    while len(seen) < N_PROGRAMS:
        data = DATA[len(seen) % len(DATA)]
        spec = Spec(
            data,
            draw.choice((1, 2) if data == "text" else (2, 4, 8, 12)),
            draw.choice((8, 32)),
            draw.choice(("relu", "tanh") if data == "text" else tuple(ACTIVATIONS)),
            draw.choice(INITIALIZATIONS),
            draw.choice(RATES if draw.random() < 0.6 else (1.0,)),
            draw.choice(("adam", "sgd")),
        )
        if spec not in seen:
            seen.add(spec)
            yield spec


class Network(pl.LightningModule):
    """The network of a program, its optimizer and its accuracy."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        n_in, n_out = _sizes(spec.data)
        layers: list[nn.Module] = []
        if spec.data == "text":
            self.body: nn.Module = nn.RNN(
                n_in, spec.width, spec.depth, nonlinearity=spec.activation, batch_first=True
            )
            self.head = nn.Linear(spec.width, n_out)
        else:
            for i in range(spec.depth):
                size = n_in if i == 0 else spec.width
                is_image = spec.data == "images"
                layers += [
                    nn.Conv2d(size, spec.width, 3, padding=1) if is_image else nn.Linear(size, spec.width),
                    ACTIVATIONS[spec.activation](),
                ]
            if spec.data == "images":
                layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(spec.width * (4 if spec.data == "images" else 1), n_out)
        for name, weight in self.body.named_parameters():
            if weight.ndim > 1:
                _initialize(weight.data, spec.initialization)
            elif spec.initialization != "default" and "bias" in name:
                weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        hidden = self.body(x)
        out: Tensor = self.head(hidden[0][:, -1] if self.spec.data == "text" else hidden)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        if self.spec.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), 3e-3 * self.spec.rate)
        return torch.optim.SGD(self.parameters(), 0.05 * self.spec.rate, momentum=0.9)


class Data(pl.LightningDataModule):
    """Batches of 64 of a data set, and 320 samples for validation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        x, y = _data(name)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        held_out, rest = order[:320], order[320:]
        self.training, self.validation = (
            TensorDataset(x[rest], y[rest]),
            TensorDataset(x[held_out], y[held_out]),
        )

    def train_dataloader(self) -> Any:
        return DataLoader(self.training, 64, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, 64)


def _initialize(weight: Tensor, name: str) -> None:
    if name == "he":
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    elif name != "default":
        nn.init.normal_(weight, std=float(name.split()[1]))


def _sizes(data: str) -> tuple[int, int]:
    return {
        "digits": (64, 10),
        "blobs": (8, 4),
        "circles": (2, 2),
        "images": (1, 10),
        "text": (len(_ALPHABET), 2),
    }[data]


_ALPHABET = string.ascii_lowercase + " "


@cache
def _data(name: str) -> tuple[Tensor, Tensor]:
    if name in ("digits", "images"):
        x, y = load_digits(return_X_y=True)
        scaled = torch.tensor(x, dtype=torch.float32) / 16
        return (scaled.reshape(-1, 1, 8, 8) if name == "images" else scaled), torch.tensor(y)
    if name == "blobs":
        x, y = make_blobs(1600, n_features=8, centers=4, cluster_std=4.0, random_state=0)
        scaled = torch.tensor(x, dtype=torch.float32)
        return (scaled - scaled.mean(0)) / scaled.std(0), torch.tensor(y)
    if name == "circles":
        x, y = make_circles(1600, noise=0.1, factor=0.4, random_state=0)
        return torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return _text()


def _text() -> tuple[Tensor, Tensor]:
    """Returns pieces of text of the standard library: of its code (0), and of the Zen of Python (1)."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    zen = "".join(chr((ord(c) - 97 + 13) % 26 + 97) if c.islower() else c for c in this.s.lower())
    draw = random.Random(0)
    pieces, labels = [], []
    for label, text in enumerate((inspect.getsource(textwrap).lower(), zen)):
        plain = [c for c in text if c in _ALPHABET]
        for _ in range(800):
            start = draw.randrange(len(plain) - TIMES)
            pieces.append([_ALPHABET.index(c) for c in plain[start : start + TIMES]])
            labels.append(label)
    one_hot = functional.one_hot(torch.tensor(pieces), len(_ALPHABET)).float()
    return one_hot, torch.tensor(labels)
