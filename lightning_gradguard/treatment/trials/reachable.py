"""Estimates how much can be learned from recorded batches, by plain learners of vectors and their classes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_gradguard.runtime.diagnosis.permutation import inputs_of, target_of

#: Samples that are used at most, the least that show anything, and the share that is held out.
MOST_ROWS, LEAST_ROWS, HELD_OUT = 5000, 100, 0.3
#: Classes at most, neighbours whose classes are counted, and hidden units in each of two layers.
MOST_CLASSES, NEIGHBOURS, WIDTH = 100, 15, 64
#: Steps of the network: between two evaluations, at least, and at most; batch size and learning rate.
EVERY, LEAST_STEPS, MOST_STEPS, BATCH, RATE = 50, 600, 3000, 128, 3e-3


def reachable_loss(batches: Sequence[Any], deadline: float = math.inf) -> float:
    """Returns the lowest held-out cross-entropy of two learners, over that of the best constant answer.

    A network of two hidden layers, and the nearest neighbours, learn from a part of the samples. NaN where
    samples are no vectors with one class each, or the network goes on learning to its end, or to the deadline
    on the clock of `time.monotonic`.
    """
    found = [samples for batch in batches if (samples := _samples(batch)) is not None]
    widths = {inputs.shape[1] for inputs, _ in found}
    if len(found) < len(batches) or len(widths) != 1 or 0 in widths:
        return math.nan
    inputs, classes = _without_repetitions(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    n_classes = int(classes.max()) + 1
    if len(inputs) < LEAST_ROWS or not 2 <= n_classes <= MOST_CLASSES or not bool(inputs.isfinite().all()):
        return math.nan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(len(inputs))[:MOST_ROWS]
        n = round(HELD_OUT * len(order))
        held_out, used = order[:n], order[n:]
        scale = inputs[used].std(0)
        inputs = (inputs - inputs[used].mean(0)) / torch.where(scale > 0, scale, 1.0)
        parts = inputs[used], classes[used], inputs[held_out], classes[held_out], n_classes
        share = functional.one_hot(parts[1], n_classes).float().mean(0).clamp_min(1 / len(used))
        constant = float(functional.nll_loss(share.log().expand(len(held_out), -1), parts[3]))
        reached = _loss_of_network(*parts, deadline)
        return min(reached, _loss_of_neighbours(*parts)) / constant if math.isfinite(reached) else math.nan


def _samples(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Returns vectors and their classes, or `None` for a batch of another kind."""
    target = target_of(batch)
    inputs = inputs_of(batch, target)
    if target is None or len(inputs) != 1 or inputs[0].ndim != 2 or not inputs[0].is_floating_point():
        return None
    classes = target.reshape(-1).long().cpu()
    is_of_classes = len(classes) == len(target) and int(classes.min()) >= 0
    if target.is_floating_point():  # of a binary cross-entropy
        is_of_classes &= bool(((target == 0) | (target == 1)).all())
    return (inputs[0].float().cpu(), classes) if is_of_classes else None


def _without_repetitions(inputs: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each vector once: epochs repeat them, and a part of them is held out."""
    _, group = torch.unique(inputs, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce(
        0, group, torch.arange(len(group)), "amin"
    )
    return inputs[first], classes[first]


def _loss_of_neighbours(x: Tensor, y: Tensor, held_out: Tensor, target: Tensor, n_classes: int) -> float:
    nearest = torch.cdist(held_out, x).topk(min(NEIGHBOURS, len(x)), largest=False).indices
    counts = functional.one_hot(y[nearest], n_classes).sum(1) + 1 / n_classes
    return float(functional.nll_loss((counts / counts.sum(1, keepdim=True)).log(), target))


def _loss_of_network(
    x: Tensor, y: Tensor, held_out: Tensor, target: Tensor, n_classes: int, deadline: float
) -> float:
    """Returns the lowest held-out loss of a network that has settled; NaN for one that has not."""
    sizes = [x.shape[1], WIDTH, WIDTH, n_classes]
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.SiLU())]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    best, best_step = math.inf, 0
    for step in range(1, MOST_STEPS + 1):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        functional.cross_entropy(network(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                loss = float(functional.cross_entropy(network(held_out), target))
            if loss < best:
                best, best_step = loss, step
            if step >= max(LEAST_STEPS, 2 * best_step):
                return best
            if time.monotonic() > deadline:
                break
    return math.nan
