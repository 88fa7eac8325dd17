"""What a scenario is made of: a module, its batches, the score after training, and faults on the way."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Any]
#: Changes the gradients of a module after `backward`, in place; gets the number of the batch.
GradientFault = Callable[[nn.Module, int], None]
#: Changes the loss before `backward`; gets the number of the batch.
LossFault = Callable[[Tensor, int], Tensor]


class Task(pl.LightningModule):
    """A network, its loss and its optimizer; a fault may change the loss or the gradients.

    Args:
        net: The network.
        loss: Of the network on a batch.
        optimizer: Makes the optimizer of the network's parameters.
        schedule: Makes a schedule that advances at each step; `None` for none.
        on_loss: Fault of the loss.
        on_gradients: Fault of the gradients.
        unfreeze_at: Batch at which all parameters are trained; before, only those that require a gradient.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        on_loss: LossFault | None = None,
        on_gradients: GradientFault | None = None,
        unfreeze_at: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.on_loss = on_loss
        self.on_gradients = on_gradients
        self.unfreeze_at = unfreeze_at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == self.unfreeze_at:
            self.net.requires_grad_(True)
        loss = self.loss(self.net, batch)
        return loss if self.on_loss is None else self.on_loss(loss, batch_idx)

    def on_after_backward(self) -> None:
        if self.on_gradients is not None:
            self.on_gradients(self.net, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.net.parameters())
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }


@dataclass
class Program:
    """One run of a scenario.

    Args:
        module: To be trained.
        batches: One epoch of them.
        score: Of the trained module.
    """

    module: pl.LightningModule
    batches: Sequence[Batch]
    score: Callable[[], float]


@dataclass(frozen=True)
class Scenario:
    """A kind of program.

    Args:
        name: Its key in tables.
        title: What it is, in a few words.
        make: Makes the program of a seed.
        higher: True if a higher score is better.
        solved: Score from which on a failing program counts as saved; `None` for healthy programs.
        tuned: True if the constants of the default policy were chosen on it.
    """

    name: str
    title: str
    make: Callable[[int], Program]
    higher: bool = True
    solved: float | None = None
    tuned: bool = False


def sgd(rate: float, momentum: float = 0.0, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Returns a maker of SGD."""
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum=momentum, **options)


def adam(rate: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Returns a maker of Adam."""
    return lambda parameters: torch.optim.Adam(parameters, rate, **options)


def adamw(rate: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Returns a maker of AdamW."""
    return lambda parameters: torch.optim.AdamW(parameters, rate, **options)


def warm_up(steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Returns a maker of a linear warm-up."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / steps))


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Returns linear layers with activations between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of logits, also by position."""
    logits, target = net(batch[0]), batch[1]
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


def mse(net: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(net(batch[0]), batch[1])


def accuracy(net: nn.Module, batch: Batch) -> Callable[[], float]:
    """Returns a function that gives the accuracy on held-out data; 0 if an output is nonfinite."""

    def score() -> float:
        net.eval()
        with torch.no_grad():
            logits = net(batch[0])
        return float((logits.argmax(-1) == batch[1]).float().mean()) if logits.isfinite().all() else 0.0

    return score


def held_out_loss(net: nn.Module, loss: Loss, batch: Batch) -> Callable[[], float]:
    """Returns a function that gives the loss on held-out data."""

    def score() -> float:
        net.eval()
        torch.manual_seed(0)
        with torch.no_grad():
            return float(loss(net, batch))

    return score


def r2(net: nn.Module, batch: Batch) -> Callable[[], float]:
    """Returns a function that gives the coefficient of determination on held-out data."""

    def score() -> float:
        net.eval()
        with torch.no_grad():
            error = (net(batch[0]) - batch[1]).square().sum()
        return float(1 - error / (batch[1] - batch[1].mean()).square().sum())

    return score


def served(batch: Batch, n: int, size: int, seed: int) -> list[Batch]:
    """Returns `n` random batches of a data set."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(batch[0]), (n, size), generator=generator)
    return [tuple(part[pick] for part in batch) for pick in picks]


def split(batch: Batch, n_test: int, seed: int) -> tuple[Batch, Batch]:
    """Returns a training and a test part, shuffled."""
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    train, test = order[n_test:], order[:n_test]
    return tuple(part[train] for part in batch), tuple(part[test] for part in batch)


@cache
def _digits() -> Batch:
    images, targets = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(targets)


def digits(seed: int) -> tuple[Batch, Batch]:
    """Handwritten digits, 64 numbers in [0, 1]: training and test part."""
    return split(_digits(), 400, seed)


def diabetes(seed: int) -> tuple[Batch, Batch]:
    """Ten numbers of a patient, standardized, and the disease's progression, 25 to 346, as it is."""
    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    x = torch.tensor(inputs, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    return split((x, torch.tensor(targets, dtype=torch.float32)[:, None]), 100, seed)


def clusters(n: int, seed: int, size: int = 32) -> list[Batch]:
    """Four classes, each around a centre of its own."""
    centres = 2 * torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randint(4, (size,), generator=generator) for _ in range(n)]
    return [(centres[y] + torch.randn(size, 20, generator=generator), y) for y in targets]


#: Characters of a window of text.
CONTEXT = 32


@cache
def _text() -> Tensor:
    """The source of modules of the standard library, in 96 symbols."""
    source = "".join(inspect.getsource(module) for module in (inspect, tempfile))
    return torch.tensor([min(max(ord(c) - 31, 0), 95) for c in source])


def text(n: int, seed: int, size: int = 16) -> list[Batch]:
    """Windows of text, each with the same one character later."""
    symbols = _text()
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(CONTEXT + 1)
    out: list[Batch] = []
    for _ in range(n):
        starts = torch.randint(len(symbols) - CONTEXT - 1, (size, 1), generator=generator)
        windows = symbols[starts + places]
        out.append((windows[:, :-1], windows[:, 1:]))
    return out


def chosen(n: int, share: float, seed: int, first: int = 0, last: int | None = None) -> set[int]:
    """Returns random batches that a fault hits."""
    generator = torch.Generator().manual_seed(1000 + seed)
    hits = torch.rand(n, generator=generator) < share
    last = n if last is None else last
    return {i for i in range(n) if first <= i < last and bool(hits[i])}
