"""Failing programs written by hand that have no part in the choice of any rule of `treat`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.treatment.written import (
    ADAM,
    SGD,
    Classifier,
    Encoder,
    LastState,
    Made,
    Regressor,
    convolutions,
    made,
    open_gates,
    perceptron,
)


class Probabilities(Classifier):
    """A softmax before the cross entropy, which has its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(torch.softmax(5 * self(batch[0]), 1), batch[1])


class HeadAlone(Classifier):
    """The optimizer gets the last layer of a body that is drawn small."""

    def configure_optimizers(self) -> Any:
        return self.optimizer(list(self.net.children())[-1].parameters())


_adam, _sgd = partial(ADAM, lr=2e-3), partial(SGD, lr=0.1, momentum=0.9)


def _zeros(weight: Tensor) -> None:
    nn.init.zeros_(weight)


def _small(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.02)


def _huge(weight: Tensor) -> None:
    nn.init.normal_(weight, std=4.0)


PROGRAMS: Mapping[str, tuple[str, Made, Made]] = {
    "fifteen tanh layers with small weights": (
        "digits",
        made(lambda: perceptron((64, *[32] * 15, 10), nn.Tanh, _small), _adam),
        made(lambda: perceptron((64, 32, 32, 10), nn.Tanh), _adam),
    ),
    "momentum of 0.99 and a rate of 1": (
        "spirals",
        made(lambda: perceptron((2, 64, 64, 3)), partial(SGD, lr=1.0, momentum=0.99)),
        made(lambda: perceptron((2, 64, 64, 3)), partial(SGD, lr=0.1, momentum=0.9)),
    ),
    "a rate of 0.5 with Adam, convolutions": (
        "images",
        made(lambda: convolutions(4), partial(ADAM, lr=0.5)),
        made(lambda: convolutions(4), _adam),
    ),
    "weights of 0": (
        "digits",
        made(lambda: perceptron((64, 64, 64, 10), start=_zeros), _adam),
        made(lambda: perceptron((64, 64, 64, 10)), _adam),
    ),
    "weights of 4 before tanh": (
        "digits",
        made(lambda: perceptron((64, 64, 64, 64, 64, 10), nn.Tanh, _huge), partial(ADAM, lr=1e-3)),
        made(lambda: perceptron((64, 64, 64, 10), nn.Tanh), partial(ADAM, lr=1e-3)),
    ),
    "inputs to 16 before sigmoids of weights 4": (
        "digits raw",
        made(lambda: perceptron((64, 64, 64, 10), nn.Sigmoid, _huge), _adam),
        made(lambda: perceptron((64, 64, 64, 10)), _adam),
    ),
    "a softmax before the loss": (
        "digits",
        made(lambda: perceptron((64, *[32] * 6, 10), nn.Tanh), _sgd, Probabilities),
        made(lambda: perceptron((64, 32, 32, 10), nn.Tanh), _sgd),
    ),
    "an optimizer of the head alone": (
        "digits",
        made(lambda: perceptron((64, 8, 8, 8, 8, 10)), _adam, HeadAlone),
        made(lambda: perceptron((64, 32, 32, 10)), _adam),
    ),
    "weight decay of 1": (
        "friedman",
        made(
            lambda: perceptron((8, 64, 64, 1)),
            partial(SGD, lr=0.05, momentum=0.9, weight_decay=1.0),
            Regressor,
        ),
        made(lambda: perceptron((8, 64, 64, 1)), partial(SGD, lr=0.02, momentum=0.9), Regressor),
    ),
    "an epsilon of 1 with Adam": (
        "spirals",
        made(lambda: perceptron((2, 64, 64, 3)), partial(ADAM, lr=2e-3, eps=1.0)),
        made(lambda: perceptron((2, 64, 64, 3)), partial(ADAM, lr=5e-3)),
    ),
    "an LSTM that forgets": (
        "sequences",
        made(lambda: LastState(open_gates(nn.LSTM(2, 32, batch_first=True), -4.0)), _adam),
        made(lambda: LastState(open_gates(nn.LSTM(2, 32, batch_first=True), 4.0)), _adam),
    ),
    "a transformer at a rate of 3 with momentum": (
        "tokens",
        made(lambda: Encoder(4, norm_first=True), partial(SGD, lr=3.0, momentum=0.9)),
        made(lambda: Encoder(2, norm_first=True), partial(ADAM, lr=1e-3)),
    ),
}
