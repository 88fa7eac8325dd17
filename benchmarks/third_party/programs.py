"""What a rebuilt program is made of, beside the parts of `benchmarks.evidence.programs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.programs import Batch, Program

#: Kinds that name the symptom of a family.
EXPLODING = frozenset(
    {
        *("exploding_gradient", "nonfinite_loss", "nonfinite_gradient", "nonfinite_weights", "divergence"),
        *("training_diverged", "poor_initialization"),
    }
)
#: A rate too high; the advice of `constant_clipping` is to lower it.
RATE = EXPLODING | {"loss_spike", "dead_units", "constant_clipping", "stuck_loss"}
VANISHING = frozenset({"vanishing_gradient", "poor_initialization"})
DYING = frozenset({"dead_units", "gradient_collapse", "vanishing_gradient", "poor_initialization"})
STUCK = frozenset({"stuck_loss"})
NOT_MOVING = frozenset({"stuck_loss", "weight_stagnation"})
UNSCALED = frozenset({"stuck_loss", "exploding_gradient", "saturated_units", "dead_units", "loss_spike"})


@dataclass(frozen=True)
class Case:
    """A program of a benchmark.

    Args:
        benchmark: `"at51"`, `"twins"` or `"regression"`.
        name: Unique within it.
        title: Network, data and fault in a few words.
        make: Makes the program of a seed.
        kinds: Incidents of which each names the fault; empty for a program without one.
    """

    benchmark: str
    name: str
    title: str
    make: Callable[[int], Program]
    kinds: frozenset[str] = frozenset()


class Softmax(nn.Module):
    """Probabilities over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class Exponential(nn.Module):
    """The exponential as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def stack(sizes: Iterable[int], *activations: Callable[[], nn.Module] | None) -> nn.Sequential:
    """Returns linear layers, each with its activation; the last activation also serves all that follow."""
    sizes, layers = list(sizes), list[nn.Module]()
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        activation = activations[min(i, len(activations) - 1)]
        layers.append(nn.Linear(n_in, n_out))
        layers += [] if activation is None else [activation()]
    return nn.Sequential(*layers)


def fill(
    net: nn.Sequential, weight: Callable[[Tensor], Any], bias: Callable[[Tensor], Any] = nn.init.zeros_
) -> nn.Sequential:
    """Fills all linear layers; returns the network."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            weight(layer.weight)
            bias(layer.bias)
    return net


def he_uniform(weight: Tensor) -> Any:
    """Uniform, of variance 2 / fan-in."""
    return nn.init.uniform_(weight, -math.sqrt(6 / weight.shape[1]), math.sqrt(6 / weight.shape[1]))


def small_uniform(weight: Tensor) -> Any:
    """Uniform between -.05 and .05."""
    return nn.init.uniform_(weight, -0.05, 0.05)


def squared(net: nn.Module, batch: Batch) -> Any:
    """Mean squared error."""
    return nn.functional.mse_loss(net(batch[0]), batch[1])


def absolute(net: nn.Module, batch: Batch) -> Any:
    """Mean absolute error."""
    return nn.functional.l1_loss(net(batch[0]), batch[1])


def binary(net: nn.Module, batch: Batch) -> Any:
    """Cross entropy of probabilities, kept from 0 and 1 as Keras does; of NaN, NaN, where torch raises."""
    share = net(batch[0]).clamp(1e-7, 1 - 1e-7)
    return share.mean() if share.isnan().any() else nn.functional.binary_cross_entropy(share, batch[1])


def classes(net: nn.Module, batch: Batch) -> Any:
    """Cross entropy of logits."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def rounded(net: nn.Module, batch: Batch) -> Callable[[], float]:
    """Returns a function that gives the share of answers that round to the target."""

    def score() -> float:
        net.eval()
        with torch.no_grad():
            return float(((net(batch[0]) > 0.5) == (batch[1] > 0.5)).float().mean())

    return score


def epochs(batch: Batch, n: int, size: int, seed: int) -> list[Batch]:
    """Returns the batches of `n` epochs, shuffled, each with its rest."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(batch[0]), generator=generator) for _ in range(n)]
    return [tuple(part[pick] for part in batch) for order in orders for pick in order.split(size)]
