"""Parts that programs of the casebook are composed of: networks, data, a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

#: Steps of a run.
STEPS = 200
Step = Callable[[Any, Any], Tensor]
Data = Callable[[int], list[Any]]


class Program(pl.LightningModule):
    """A network, the loss of a batch, and an optimizer."""

    def __init__(self, net: nn.Module, step: Step, optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = net
        self._step, self._optimizer = step, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        return self._step(self.net, batch)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of the program."""
        return self._optimizer(self.net)


@dataclass
class Case:
    """A program, and what a diagnosis should find in it.

    Args:
        name: Unique in the casebook.
        make: Builds the module.
        data: Builds the batches.
        kinds: Symptoms of which one should be named; empty for a healthy program.
        where: Prefixes of modules of which one should be among the first three; empty if any will do.
        trainer: Arguments of the Trainer.
    """

    name: str
    make: Callable[[], pl.LightningModule]
    data: Data
    kinds: frozenset[str] = frozenset()
    where: tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)


def adam(rate: float = 1e-3) -> Callable[[nn.Module], Any]:
    """Returns a maker of Adam over all parameters."""
    return lambda net: torch.optim.Adam(net.parameters(), rate)


def sgd(rate: float = 0.05, momentum: float = 0.9) -> Callable[[nn.Module], Any]:
    """Returns a maker of SGD over all parameters."""
    return lambda net: torch.optim.SGD(net.parameters(), rate, momentum=momentum)


def mlp(
    depth: int = 3,
    act: Callable[[], nn.Module] = nn.ReLU,
    init: Callable[[Tensor], Any] | None = None,
    *,
    n_out: int = 4,
    width: int = 48,
    norm: bool = False,
    head: nn.Module | None = None,
) -> nn.Sequential:
    """Linear layers with an activation after each but the last; `init` fills the hidden weights."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(20 if i == 0 else width, width))
        if init is not None:
            init(layers[-1].weight)  # type: ignore[arg-type]
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers.append(act())
    layers.append(nn.Linear(width, n_out))
    return nn.Sequential(*layers, *([] if head is None else [head]))


def cnn(
    depth: int = 3, act: Callable[[], nn.Module] = nn.ReLU, init: Callable[[Tensor], Any] | None = None
) -> nn.Sequential:
    """Convolutions of 12 channels on 12 x 12 images, pooled to four classes."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Conv2d(1 if i == 0 else 12, 12, 3, padding=1))
        if init is not None:
            init(layers[-1].weight)  # type: ignore[arg-type]
        layers.append(act())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 4))


class Recurrent(nn.Module):
    """A recurrent module whose last output is classified."""

    def __init__(self, rnn: nn.RNNBase, n_out: int = 4) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape `(n, n_out)`."""
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


class CellLoop(nn.Module):
    """A cell that is called at each time, and its last state classified."""

    def __init__(self, cell: nn.RNNCellBase, scale: float | None = None) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 4)
        if scale is not None:
            nn.init.orthogonal_(cell.weight_hh, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape `(n, 4)`."""
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        out: Tensor = self.head(h)
        return out


class Transformer(nn.Module):
    """A causal language model over 16 tokens."""

    def __init__(self, depth: int = 2, norm_first: bool = True, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
        self.embed, self.place = nn.Embedding(16, width), nn.Embedding(24, width)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of shape `(n, time, 16)`."""
        t = tokens.shape[1]
        x = self.embed(tokens) + self.place(torch.arange(t))
        out: Tensor = self.head(self.body(x, mask=nn.Transformer.generate_square_subsequent_mask(t)))
        return out


def classes(n: int, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> list[Any]:
    """Inputs of 20 numbers, and the class of four that a linear teacher gives them."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(20, 4, generator=torch.Generator().manual_seed(99))
    xs = [torch.randn(64, 20, generator=g) for _ in range(n)]
    return [(x * scale + shift, (x @ teacher).argmax(1)) for x in xs]


def values(n: int, scale: float = 1.0, columns: int = 1, flat: bool = False) -> list[Any]:
    """Inputs, and targets of unit variance, of shape `(64, columns)`, or `(64,)`."""
    g = torch.Generator().manual_seed(1)
    teacher = torch.randn(20, columns, generator=torch.Generator().manual_seed(98)) / 20**0.5
    xs = [torch.randn(64, 20, generator=g) for _ in range(n)]
    found = [(x, (x @ teacher) * scale) for x in xs]
    return [(x, y.squeeze(1)) for x, y in found] if flat else found


def images(n: int, scale: float = 1.0) -> list[Any]:
    """Noisy images of four patterns."""
    g = torch.Generator().manual_seed(2)
    patterns = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(97))
    labels = [torch.randint(4, (32,), generator=g) for _ in range(n)]
    return [((patterns[y] + 0.5 * torch.randn(32, 1, 12, 12, generator=g)) * scale, y) for y in labels]


def recall(n: int, times: int = 40) -> list[Any]:
    """Sequences whose first symbol of four is the class; noise follows."""
    g = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        y = torch.randint(4, (32,), generator=g)
        x = 0.3 * torch.randn(32, times, 4, generator=g)
        x[:, 0] = functional.one_hot(y, 4).float()
        found.append((x, y))
    return found


def averages(n: int, times: int = 12) -> list[Any]:
    """Sequences whose mean decides the class."""
    g = torch.Generator().manual_seed(4)
    xs = [torch.randn(32, times, 4, generator=g) for _ in range(n)]
    return [(x, x.mean(1).argmax(1)) for x in xs]


def text(n: int) -> list[Any]:
    """Tokens of a Markov chain, and the next tokens."""
    g = torch.Generator().manual_seed(5)
    chain = (3 * torch.randn(16, 16, generator=torch.Generator().manual_seed(96))).softmax(1)
    found = []
    for _ in range(n):
        tokens = [torch.randint(16, (16,), generator=g)]
        for _ in range(16):
            tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=g).squeeze(1))
        whole = torch.stack(tokens, 1)
        found.append((whole[:, :-1].contiguous(), whole[:, 1:].contiguous()))
    return found


def cross_entropy(net: Any, batch: Any) -> Tensor:
    """Cross-entropy of the logits."""
    return functional.cross_entropy(net(batch[0]), batch[1])


def squared(net: Any, batch: Any) -> Tensor:
    """Mean squared error."""
    return functional.mse_loss(net(batch[0]), batch[1])


def next_token(net: Any, batch: Any) -> Tensor:
    """Cross-entropy of the next token."""
    return functional.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def normal(std: float) -> Callable[[Tensor], Any]:
    """Returns an initializer."""
    return lambda weight: nn.init.normal_(weight, 0, std)


def he(weight: Tensor) -> Any:
    """He initialization."""
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def changed(net: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    """Returns a network after a change to its weights."""
    with torch.no_grad():
        change(net)
    return net


def case(
    name: str,
    net: Callable[[], nn.Module],
    step: Step = cross_entropy,
    optimizer: Callable[[Any], Any] | None = None,
    data: Data = classes,
    kinds: Sequence[str] = (),
    where: Sequence[str] = (),
    **trainer: Any,
) -> Case:
    """Returns a case."""
    optimizer = optimizer or adam()
    return Case(name, lambda: Program(net(), step, optimizer), data, frozenset(kinds), tuple(where), trainer)
