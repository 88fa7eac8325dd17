"""The entries of the zoo: which networks there are, and the data that they are trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.networks import CellLoop, Mixer, Recurrent, Transformer, cnn, initialized, mlp

Batch = tuple[Tensor, Tensor]
#: Families whose networks set no threshold.
HELD_OUT_FAMILIES = ("activations", "mixer", "image transformer", "cell in a loop")


@cache
def _digits() -> Batch:
    images, targets = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    return (x - x.mean()) / x.std(), torch.tensor(targets)


def digits(n: int, size: int, generator: torch.Generator) -> list[Batch]:
    """Handwritten digits: 64 numbers of mean 0 and variance 1, ten classes."""
    x, y = _digits()
    picks = torch.randint(len(x), (n, size), generator=generator)
    return [(x[pick], y[pick]) for pick in picks]


def recall(n: int, size: int, generator: torch.Generator, times: int) -> list[Batch]:
    """Sequences whose first symbol of four is the class; noise follows."""
    found = []
    for _ in range(n):
        y = torch.randint(4, (size,), generator=generator)
        x = 0.3 * torch.randn(size, times, 4, generator=generator)
        x[:, 0] = functional.one_hot(y, 4).float()
        found.append((x, y))
    return found


def tokens(n: int, size: int, generator: torch.Generator) -> list[Batch]:
    """Eight tokens of an alphabet of eight, of which the first is the class."""
    xs = torch.randint(8, (n, size, 8), generator=generator)
    return [(x, x[:, 0]) for x in xs]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Args:
        name: Unique in the zoo.
        family: Of networks.
        architecture: What entries of one family that differ in their weights alone have in common.
        make: Builds the network after a seed was set.
        data: Makes batches, by number, size and generator.
    """

    name: str
    family: str
    architecture: str
    make: Callable[[], nn.Module]
    data: Callable[[int, int, torch.Generator], list[Batch]] = digits


def entries() -> list[Entry]:
    """Returns all of them, in a fixed order; every second one of a family is held out."""
    found: list[Entry] = []

    def add(
        family: str, make: Callable[[], nn.Module], *facts: object, data: Callable[..., list[Batch]] = digits
    ) -> None:
        architecture = ", ".join(map(str, facts[:-1]))
        found.append(Entry(f"{family}: {architecture}, {facts[-1]}", family, architecture, make, data))

    def made(make: Callable[..., nn.Module], *arguments: object, init: str) -> Callable[[], nn.Module]:
        return lambda: initialized(make(*arguments), init)

    inits = ("default", "xavier", "he", "orthogonal", "normal .3", "normal .02")
    for depth, act, init in itertools.product((3, 7, 13, 24), ("sigmoid", "tanh", "relu", "gelu"), inits):
        add("plain", made(mlp, depth, act, init=init), depth, act, init)
    for depth, act, init in itertools.product(
        (3, 8), ("tanh", "relu", "gelu"), ("normal 1", "zeros", "constant")
    ):
        add("plain", made(mlp, depth, act, init=init), depth, act, init)
    for depth, act, kind, init in itertools.product(
        (8, 16, 28), ("tanh", "relu"), ("bn", "ln"), ("default", "he")
    ):
        add("normalized", made(mlp, depth, act, kind, init=init), depth, act, kind, init)
    for depth, kind, init in itertools.product(
        (6, 12, 20), ("residual", "pre"), ("default", "he", "normal .3")
    ):
        add("residual", made(mlp, depth, "relu", kind, init=init), depth, kind, init)
    for depth, act in itertools.product((6, 12, 20), ("tanh", "relu")):
        add("residual", made(mlp, depth, act, "zero", init="default"), depth, act, "zero")
    kinds = ("plain", "bn", "residual", "residual bn")
    for depth, kind, init in itertools.product(
        (3, 6, 10), kinds, ("default", "he", "normal .02", "normal 1")
    ):
        add("convolutional", made(cnn, depth, kind, init=init), depth, kind, init)
    for depth, first, init in itertools.product(
        (2, 4, 8), (True, False), ("default", "xavier", "normal .02", "normal .3", "normal 1")
    ):
        make = made(Transformer, depth, first, init=init)
        add("transformer", make, depth, "pre-norm" if first else "post-norm", init, data=tokens)
    gated = itertools.product(("gru", "lstm"), ("default", "orthogonal", "gate"))
    plain = itertools.product(("rnn", "rnn relu"), ("default", "orthogonal", "identity", "normal .6"))
    for times, (kind, init) in itertools.product((8, 20, 50), [*plain, *gated]):
        add(
            "recurrent",
            partial(Recurrent, kind, init, times),
            kind,
            times,
            init,
            data=partial(recall, times=times),
        )
    for kind, scale, times in itertools.product(("cell", "gru cell"), (0.3, 1.0, 1.5), (8, 20, 40)):
        add(
            "cell in a loop",
            partial(CellLoop, kind, scale),
            kind,
            times,
            scale,
            data=partial(recall, times=times),
        )
    acts = ("selu", "elu", "silu", "leaky_relu", "hardtanh")
    for depth, act, init in itertools.product((5, 15), acts, ("default", "he", "xavier", "normal .02")):
        add("activations", made(mlp, depth, act, "plain", 48, init=init), depth, act, init)
    for depth, norm, skip, init in itertools.product((3, 8), (True, False), (True, False), ("default", "he")):
        facts = (depth, "normalized" if norm else "plain", "residual" if skip else "no skip", init)
        add("mixer", made(Mixer, depth, norm, skip, init=init), *facts)
    for depth, first, init in itertools.product(
        (2, 6), (True, False), ("default", "normal .02", "normal .3")
    ):
        make = made(Transformer, depth, first, True, init=init)
        add("image transformer", make, depth, "pre-norm" if first else "post-norm", init)
    return found
