"""Failing programs of questions on StackOverflow, and their repaired twins.

The questions are those of DeepLocalize's benchmark (Wardat, Le, Rajan, 2021), by number; networks, faults
and fixes are facts of the threads. Where a thread has data, synthetic data of the same kind and scale is
made here; the digits of scikit-learn stand for MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_iris, make_multilabel_classification
from torch import nn

from benchmarks.evidence.healthy import parabola
from benchmarks.evidence.programs import (
    Batch,
    Loss,
    Program,
    Task,
    accuracy,
    adam,
    digits,
    r2,
    served,
    sgd,
    split,
)
from benchmarks.third_party.programs import (
    NOT_MOVING,
    RATE,
    STUCK,
    UNSCALED,
    VANISHING,
    Case,
    Softmax,
    absolute,
    binary,
    classes,
    fill,
    rounded,
    small_uniform,
    squared,
    stack,
)

Data = Callable[[int], tuple[Batch, Batch]]
Score = Callable[[nn.Module, Batch], Callable[[], float]]
Maker = Callable[[Any], torch.optim.Optimizer]


def _program(
    net: Callable[[], nn.Module],
    data: Data,
    loss: Loss,
    optimizer: Maker,
    score: Score,
    n: int = 600,
    size: int = 32,
) -> Callable[[int], Program]:
    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        network = net()
        train, test = data(seed)
        task = Task(network, loss, optimizer)
        return Program(task, served(train, n, size, seed), score(network, test))

    return make


def _rmsprop(rate: float) -> Maker:
    return lambda parameters: torch.optim.RMSprop(parameters, rate, alpha=0.9, eps=1e-7)


def _rows(make: Callable[[torch.Generator], Batch], n_test: int = 100) -> Data:
    return lambda seed: split(make(torch.Generator().manual_seed(seed)), n_test, seed)


def _standardized(data: Data, columns: tuple[int, ...] = (0,)) -> Data:
    """Scales inputs, and targets if the second column is named, by the training part."""

    def scaled(seed: int) -> tuple[Batch, Batch]:
        train, test = (list(part) for part in data(seed))
        for i in columns:
            mean, std = train[i].mean(0), train[i].std(0).clamp(min=1e-6)
            train[i], test[i] = (train[i] - mean) / std, (test[i] - mean) / std
        return tuple(train), tuple(test)

    return scaled


def _one_hot_digits(seed: int) -> tuple[Batch, Batch]:
    train, test = digits(seed)
    return (train[0], nn.functional.one_hot(train[1], 10).float()), test


def _xor(seed: int) -> tuple[Batch, Batch]:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    batch = x, (x.sum(1, keepdim=True) == 1).float()
    return batch, batch


def _square(generator: torch.Generator) -> Batch:
    x = torch.rand(300, 1, generator=generator) * 20 - 10
    return x, x.square() + 3


def _quartic(generator: torch.Generator) -> Batch:
    x = torch.rand(1000, 1, generator=generator) * 20 - 10
    return x, x**4


def _large(generator: torch.Generator) -> Batch:
    x = torch.randn(400, 3, generator=generator)
    y = 0.2 + 0.3 * (x.sum(1, keepdim=True) / 3).tanh()
    return 1e4 * x, y


def _separable(n: int, generator: torch.Generator) -> Batch:
    x = torch.randn(1000, n, generator=generator)
    return x, (x @ torch.randn(n, 1, generator=generator) > 0).float()


def _bits(generator: torch.Generator) -> Batch:
    x = torch.randint(2, (1000, 8), generator=generator).float()
    return x, x.flip(1)


def _income(generator: torch.Generator) -> Batch:
    x = torch.rand(999, 1, generator=generator) * 2e4 + 1e4
    return x, (x < 2.1e4).float()


def _packets(generator: torch.Generator) -> Batch:
    """Eleven columns, two of them of the size of addresses."""
    n = 400
    kind = torch.randint(2, (n, 1), generator=generator).float()
    address = 3.2e9 + torch.randint(10, (n, 2), generator=generator).float() * 256
    ports = torch.rand(n, 3, generator=generator) * 6e4
    flags = torch.randint(2, (n, 5), generator=generator).float() * 200
    noisy = (torch.rand(n, 1, generator=generator) < 0.2).float()
    return torch.cat([address, ports, 100 * kind, flags], 1), (kind - noisy).abs()


def _labels(seed: int) -> tuple[Batch, Batch]:
    x, y = make_multilabel_classification(1000, 20, n_classes=3, n_labels=2, random_state=seed)
    return split((torch.tensor(x).float(), torch.tensor(y).float()), 200, seed)


def _proportional(generator: torch.Generator) -> Batch:
    x = torch.rand(200, 1, generator=generator) * 10 + 10
    return x, 5 * x


def _iris(seed: int) -> tuple[Batch, Batch]:
    x, y = load_iris(return_X_y=True)
    return split((torch.tensor(x).float(), torch.tensor(y)), 45, seed)


def _remainders(generator: torch.Generator) -> Batch:
    number = torch.randint(2**20, (4000,), generator=generator)
    bits = (number[:, None] >> torch.arange(20)) & 1
    return bits.float(), number % 7


def _wide(net: nn.Sequential) -> nn.Module:
    return fill(net, partial(nn.init.normal_, std=1.0))


def _labelled(
    n: int, head: Callable[[], nn.Module], optimizer: Maker, steps: int
) -> Callable[[int], Program]:
    widths = [n, 50 if n == 128 else 60, 50, 1]
    data = _rows(partial(_separable, n))
    return _program(lambda: stack(widths, nn.ReLU, nn.ReLU, head), data, binary, optimizer, rounded, steps)


@dataclass(frozen=True)
class Thread:
    """A question.

    Args:
        title: Network, data and fault in a few words.
        kinds: Incidents that name the fault.
        failing: Makes the program that is asked about.
        repaired: Makes the program of the answer; `None` if none is known that trains.
    """

    title: str
    kinds: frozenset[str]
    failing: Callable[[int], Program]
    repaired: Callable[[int], Program] | None = None


#: By number of the question.
THREADS = {
    "48385830": Thread(
        "digits, weights of N(0, 1), linear units, squared error, SGD 3",
        RATE,
        _program(lambda: _wide(stack([64, 30, 10], None)), _one_hot_digits, squared, sgd(3), accuracy),
        _program(lambda: _wide(stack([64, 30, 10], nn.Sigmoid, None)), digits, classes, sgd(3), accuracy),
    ),
    "48934338": Thread(
        "y = 5x² + noise, SGD .1",
        RATE,
        parabola(0.1),
        parabola(1e-3),
    ),
    "48221692": Thread(
        "a parabola to 100, sigmoid as output",
        STUCK | {"saturated_units"},
        _program(lambda: stack([1, 5, 1], nn.Sigmoid), _rows(_square), squared, sgd(0.01), r2, 1500, 64),
        _program(lambda: stack([1, 5, 1], nn.Sigmoid, None), _rows(_square), squared, sgd(0.01), r2, 1500, 8),
    ),
    "31556268": Thread(
        "XOR, mean absolute error, SGD .05",
        STUCK,
        _program(lambda: stack([2, 4, 1], nn.Sigmoid), _xor, absolute, sgd(0.05), rounded, 1000, 4),
        _program(lambda: stack([2, 4, 1], nn.Sigmoid), _xor, squared, adam(0.05), rounded, 1000, 4),
    ),
    "34311586": Thread(
        "XOR, softmax over one output, weights of .05, SGD .001",
        STUCK | {"poor_initialization"},
        _program(
            lambda: fill(stack([2, 2, 3, 1], nn.Sigmoid, nn.Sigmoid, Softmax), small_uniform),
            _xor,
            binary,
            sgd(1e-3),
            rounded,
            600,
            4,
        ),
    ),
    "52800582": Thread(
        "y = x⁴, unscaled, Adam",
        UNSCALED,
        _program(
            lambda: stack([1, 50, 50, 1], nn.Sigmoid, nn.ELU, None), _rows(_quartic), squared, adam(1e-3), r2
        ),
        _program(
            lambda: stack([1, 50, 50, 1], nn.ReLU, nn.ReLU, None),
            _standardized(_rows(_quartic), (0, 1)),
            squared,
            adam(1e-3),
            r2,
            1500,
        ),
    ),
    "33969059": Thread(
        "inputs of 10⁴, softmax over one output, SGD .1",
        STUCK | UNSCALED,
        _program(
            lambda: stack([3, 3, 2, 1], nn.Tanh, nn.Tanh, Softmax), _rows(_large), squared, sgd(0.1), r2
        ),
    ),
    "31880720": Thread(
        "128 inputs, softmax over one output, RMSprop",
        STUCK,
        _labelled(128, Softmax, _rmsprop(1e-3), 600),
        _labelled(128, nn.Sigmoid, _rmsprop(1e-3), 1500),
    ),
    "45337371": Thread(
        "5 inputs, softmax over one output, Adam", STUCK, _labelled(5, Softmax, adam(1e-3), 600)
    ),
    "39217567": Thread(
        "8 bits to 8 bits, sigmoids of N(0, .05), squared error, SGD .01",
        VANISHING | STUCK,
        _program(
            lambda: fill(stack([8, 8, 8, 8], nn.Sigmoid), partial(nn.init.normal_, std=0.05)),
            _rows(_bits),
            squared,
            sgd(0.01),
            rounded,
        ),
    ),
    "45442843": Thread(
        "one input to 3·10⁴, softmax over one output, absolute error",
        STUCK | {"saturated_units"},
        _program(
            lambda: stack([1, 1, 1], nn.Sigmoid, Softmax), _rows(_income), absolute, adam(1e-3), rounded
        ),
        _program(
            lambda: stack([1, 1, 1], None, nn.Sigmoid),
            _standardized(_rows(_income)),
            binary,
            adam(0.01),
            rounded,
            1000,
        ),
    ),
    "44066044": Thread(
        "inputs to 10⁹, ReLU as output of a binary loss",
        UNSCALED | NOT_MOVING,
        _program(lambda: stack([11, 12, 12, 1], nn.ReLU), _rows(_packets), binary, adam(1e-3), rounded),
        _program(
            lambda: stack([11, 12, 12, 1], nn.ReLU, nn.ReLU, nn.Sigmoid),
            _standardized(_rows(_packets)),
            binary,
            adam(1e-3),
            rounded,
        ),
    ),
    "38648195": Thread(
        "three labels, softmax and squared error, SGD .01",
        STUCK,
        _program(
            lambda: stack([20, 20, 20, 3], nn.ReLU, nn.ReLU, Softmax),
            _standardized(_labels),
            squared,
            sgd(0.01),
            rounded,
        ),
        _program(
            lambda: stack([20, 20, 20, 3], nn.ReLU, nn.ReLU, nn.Sigmoid),
            _standardized(_labels),
            binary,
            sgd(0.1),
            rounded,
        ),
    ),
    "51181393": Thread(
        "y = 5x, RMSprop .001: a rate too low",
        NOT_MOVING,
        _program(lambda: stack([1, 1], None), _rows(_proportional), squared, _rmsprop(1e-3), r2),
        _program(lambda: stack([1, 1], None), _rows(_proportional), squared, _rmsprop(0.1), r2),
    ),
    "51930566": Thread(
        "iris, sigmoids into a cross entropy, unscaled",
        STUCK,
        _program(lambda: stack([4, 4, 3], nn.Sigmoid), _iris, classes, adam(0.01), accuracy, 1000),
        _program(
            lambda: stack([4, 4, 3], nn.ReLU, None), _standardized(_iris), classes, adam(0.01), accuracy
        ),
    ),
    "56380303": Thread(
        "remainders by 7 of 20 bits, SGD .01",
        STUCK,
        _program(
            lambda: stack([20, 20, 20, 20, 7], nn.ReLU, nn.ReLU, nn.ReLU, None),
            _rows(_remainders),
            classes,
            sgd(0.01),
            accuracy,
        ),
    ),
}


def cases() -> list[Case]:
    """Returns the failing programs and their twins."""
    found = []
    for number, thread in THREADS.items():
        found.append(Case("twins", number, thread.title, thread.failing, thread.kinds))
        if thread.repaired is not None:
            found.append(Case("twins", f"{number}, repaired", thread.title, thread.repaired))
    return found
