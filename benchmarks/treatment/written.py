"""Failing programs written by hand, one of a kind that a user brings, each with the twin that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.treatment.casebook import Case

#: Optimizer steps of a run, samples that are held out, length of a sequence.
STEPS, N_HELD_OUT, TIMES = 500, 320, 50
#: Builds an optimizer of the parameters of a module.
Optimizer = Callable[[Any], Any]
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


class Classifier(pl.LightningModule):
    """A network with cross entropy, and its optimizer."""

    def __init__(self, net: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.net(x)
        return answers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> float:
        """Returns the accuracy."""
        return float((self(x).argmax(1) == y).float().mean())


class Regressor(Classifier):
    """The same with the squared error."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.mse_loss(self(batch[0]), batch[1]))

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> float:
        """Returns the explained share of the variance."""
        explained = 1 - float((self(x) - y).square().mean() / y.var())
        return max(explained, 0.0) if explained == explained else 0.0


class Loaders(pl.LightningDataModule):
    """Batches of 64 of a data set by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        x, y = data(name)
        self.training = TensorDataset(x[N_HELD_OUT:], y[N_HELD_OUT:])
        self.validation = TensorDataset(x[:N_HELD_OUT], y[:N_HELD_OUT])

    def train_dataloader(self) -> Any:
        return DataLoader(self.training, 64, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, 64)


@cache
def data(name: str) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets in a fixed random order."""
    drawn = torch.Generator().manual_seed(3)
    if name.startswith(("digits", "images")):
        x, y = map(torch.tensor, load_digits(return_X_y=True))
        x = x.float() / (1.0 if "raw" in name else 16.0)
        x = x.reshape(-1, 1, 8, 8) if name.startswith("images") else x
    elif name == "spirals":
        y = torch.randint(3, (2000,), generator=drawn)
        radius = torch.rand(2000, generator=drawn)
        angle = 5 * radius + 2.1 * y + 0.15 * torch.randn(2000, generator=drawn)
        x = 2 * torch.stack([radius * angle.sin(), radius * angle.cos()], 1)
    elif name == "sequences":  # the class is the sign of the mean of the first values
        x = 0.3 * torch.randn(2000, TIMES, 2, generator=drawn)
        y = torch.randint(2, (2000,), generator=drawn)
        x[:, :4, 0] += (2.0 * y - 1)[:, None]
    elif name == "tokens":  # the class is the token that is met most often
        y = torch.randint(4, (2000,), generator=drawn)
        x = torch.randint(12, (2000, 16), generator=drawn)
        x = torch.where(torch.rand(x.shape, generator=drawn) < 0.35, y[:, None], x)
    else:
        x, y = map(torch.tensor, make_friedman1(2000, 8, noise=0.5, random_state=3))
        x, y = x.float(), y.float()[:, None]
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
        if "units" in name:
            x, y = x * torch.tensor([1e4, 1.0, 1e2, 1e-2, 1e3, 1.0, 10.0, 1.0]) + 50, y * 1e3 + 5e3
    order = torch.randperm(len(x), generator=drawn)
    return x[order], y[order]


def perceptron(
    sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU, start: Callable[[Tensor], Any] | None = None
) -> nn.Sequential:
    """Returns layers with an activation between each two; `start` initializes their weights."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*_started(layers[:-1], start))


def convolutions(
    depth: int, activation: type[nn.Module] = nn.ReLU, start: Callable[[Tensor], Any] | None = None
) -> nn.Sequential:
    """Returns convolutions of 16 channels, pooling and a linear layer."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(16 if i else 1, 16, 3, padding=1), activation()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*_started(layers, start))


def _started(layers: list[nn.Module], start: Callable[[Tensor], Any] | None) -> list[nn.Module]:
    for layer in layers:
        if start is not None and isinstance(layer, nn.Linear | nn.Conv2d):
            start(layer.weight.data)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return layers


class LastState(nn.Module):
    """A recurrent network that answers from its last state."""

    def __init__(self, recurrent: nn.RNNBase, n_out: int = 2) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, n_out)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return answers


class Encoder(nn.Module):
    """A transformer that answers from the mean over its tokens."""

    def __init__(self, depth: int, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
            for _ in range(depth)
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        for layer in self.layers:
            hidden = layer(hidden)
        answers: Tensor = self.head(hidden.mean(1))
        return answers


Made = Callable[[], Classifier]


def made(net: Callable[[], nn.Module], optimizer: Optimizer, kind: type[Classifier] = Classifier) -> Made:
    """Returns what builds a module from what builds its network."""
    return lambda: kind(net(), optimizer)


def open_gates(recurrent: nn.RNNBase, value: float) -> nn.RNNBase:
    """Sets the forget gates of an LSTM."""
    n = recurrent.hidden_size
    for name, bias in recurrent.named_parameters():
        if name.startswith("bias"):
            bias.data[n : 2 * n] = value / 2
    return recurrent


_rnn = partial(nn.RNN, 2, 32, batch_first=True)
_adam, _sgd = partial(ADAM, lr=2e-3), partial(SGD, lr=0.1, momentum=0.9)
_normal: Callable[[float], Callable[[Tensor], Any]] = lambda std: partial(nn.init.normal_, std=std)  # noqa: E731


def _dead() -> nn.Module:
    net = perceptron((64, 64, 64, 10))
    for layer in net:
        if isinstance(layer, nn.Linear) and layer.out_features == 64:
            nn.init.constant_(layer.bias, -6.0)
    return net


#: Data, the failing program and its twin, by name.
PROGRAMS: Mapping[str, tuple[str, Made, Made]] = {
    "ten convolutions with sigmoids": (
        "images",
        made(lambda: convolutions(10, nn.Sigmoid), _sgd),
        made(lambda: convolutions(3), _adam),
    ),
    "twenty ReLU layers": (
        "digits",
        made(lambda: perceptron((64, *[32] * 20, 10)), _sgd),
        made(lambda: perceptron((64, 32, 32, 10)), _adam),
    ),
    "a rate of 20 with SGD": (
        "digits",
        made(lambda: perceptron((64, 64, 64, 10)), partial(SGD, lr=20.0)),
        made(lambda: perceptron((64, 64, 64, 10)), partial(SGD, lr=0.2)),
    ),
    "a rate of 2e-6 with Adam": (
        "spirals",
        made(lambda: perceptron((2, 64, 64, 3)), partial(ADAM, lr=2e-6)),
        made(lambda: perceptron((2, 64, 64, 3)), partial(ADAM, lr=5e-3)),
    ),
    "weights of 1e-3": (
        "digits",
        made(lambda: perceptron((64, 64, 64, 64, 10), start=_normal(1e-3)), _sgd),
        made(lambda: perceptron((64, 64, 64, 64, 10)), _sgd),
    ),
    "biases of -6 before ReLU": (
        "digits",
        made(_dead, _adam),
        made(partial(perceptron, (64, 64, 64, 10)), _adam),
    ),
    "values and targets in their units": (
        "friedman units",
        made(lambda: perceptron((8, 64, 64, 1)), partial(SGD, lr=1e-2), Regressor),
        made(
            lambda: nn.Sequential(nn.BatchNorm1d(8), *perceptron((8, 64, 64, 1)), _Units()), _adam, Regressor
        ),
    ),
    "a plain recurrence over 50 steps": (
        "sequences",
        made(lambda: LastState(_rnn()), _adam),
        made(lambda: LastState(open_gates(nn.LSTM(2, 32, batch_first=True), 4.0)), _adam),
    ),
    "a post-norm transformer of twelve layers": (
        "tokens",
        made(lambda: Encoder(12, norm_first=False), partial(ADAM, lr=5e-3)),
        made(lambda: Encoder(2, norm_first=True), partial(ADAM, lr=1e-3)),
    ),
}


class _Units(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * x + 5e3


def cases(programs: Mapping[str, tuple[str, Made, Made]], prefix: str = "written") -> Iterator[Case]:
    """Yields programs as cases, each with its twin."""
    for name, (source, failing, healthy) in programs.items():
        case, twin = (
            Case(title, make, partial(Loaders, source), {"max_steps": STEPS}, _scored(source))
            for title, make in ((f"{prefix}: {name}", failing), (f"twin of {name}", healthy))
        )
        case.twin = twin
        yield case


def _scored(source: str) -> Callable[[Any], float]:
    def score(module: Any) -> float:
        x, y = data(source)
        module.eval()
        return float(module.score(x[:N_HELD_OUT], y[:N_HELD_OUT]))

    return score
