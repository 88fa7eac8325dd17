"""Programs that fail without help: spikes, NaN storms, explosions, rates far too high."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.healthy import classify_clusters, classify_digits, deep_network, language, parabola
from benchmarks.evidence.networks import GPT, RecurrentLM
from benchmarks.evidence.programs import Batch, Program, Scenario, adam, chosen, mlp, sgd

#: Growth of the norm in a slow explosion, its first step and its length.
GROWTH, BEGIN, LENGTH = 1.02, 60, 300


def _small() -> nn.Module:
    return mlp(20, 64, 64, 4)


def _digits_net() -> nn.Module:
    return mlp(64, 64, 64, 10)


def _with(
    make: Callable[[int], Program], change: Callable[[Sequence[Batch], int], Sequence[Batch]]
) -> Callable[[int], Program]:
    def changed(seed: int) -> Program:
        program = make(seed)
        program.batches = change(program.batches, seed)
        return program

    return changed


def _spikes(first: int = 0, last: int | None = None, share: float = 0.03) -> Any:
    """Inputs a hundred times too large, with wrong labels."""

    def change(batches: Sequence[Batch], seed: int) -> Sequence[Batch]:
        hits = chosen(len(batches), share, seed, first, last)
        return [(x * 100, (y + 1) % 4) if i in hits else (x, y) for i, (x, y) in enumerate(batches)]

    return change


def _nans(share: float) -> Any:
    def change(batches: Sequence[Batch], seed: int) -> Sequence[Batch]:
        hits = chosen(len(batches), share, seed)
        return [(x * torch.nan if i in hits else x, y) for i, (x, y) in enumerate(batches)]

    return change


def _swollen(i: int) -> float:
    return GROWTH ** min(max(i - BEGIN, 0), LENGTH)


def _swell_loss(loss: Tensor, i: int) -> Tensor:
    return loss * _swollen(i)


def _swell_gradients(net: nn.Module, i: int) -> None:
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad *= _swollen(i)


def _rates() -> list[Scenario]:
    """Digits at 3 to 100 times a rate at which they are learnt well."""
    scenarios = []
    for name, base, make in (
        ("sgd", 0.3, lambda rate: sgd(rate)),
        ("momentum", 0.03, lambda rate: sgd(rate, 0.9)),
        ("adam", 0.003, lambda rate: adam(rate)),
    ):
        for times in (3, 10, 30, 100):
            program = classify_digits(_digits_net, make(base * times), 400)
            title = f"digits, {name} at {times} times the rate of {base:g}"
            key = f"{name} x{times}"
            scenarios.append(Scenario(key, title, program, solved=0.9, tuned=times in (10, 100)))
    return scenarios


SCENARIOS = (
    Scenario(
        "early spikes",
        "3 % of the first 200 batches x 100 with wrong labels, SGD .05, momentum .9",
        _with(classify_clusters(_small, sgd(0.05, 0.9)), _spikes(0, 200)),
        solved=0.9,
        tuned=True,
    ),
    Scenario(
        "late spikes",
        "the same in the last 200 batches",
        _with(classify_clusters(_small, sgd(0.05, 0.9)), _spikes(200, 380)),
        solved=0.9,
    ),
    Scenario(
        "adam spikes",
        "3 % of all batches, Adam .003",
        _with(classify_clusters(_small, adam(3e-3)), _spikes(0, 380)),
        solved=0.9,
        tuned=True,
    ),
    Scenario(
        "nan storm 1 %",
        "NaN inputs, SGD .05, momentum .9",
        _with(classify_clusters(_small, sgd(0.05, 0.9)), _nans(0.01)),
        solved=0.9,
    ),
    Scenario(
        "nan storm 5 %",
        "NaN inputs, Adam .003",
        _with(classify_clusters(_small, adam(3e-3)), _nans(0.05)),
        solved=0.9,
        tuned=True,
    ),
    Scenario(
        "slow explosion",
        "the loss grows 2 % a step for 300 steps, SGD .05, momentum .9",
        classify_clusters(_small, sgd(0.05, 0.9), on_loss=_swell_loss),
        solved=0.9,
        tuned=True,
    ),
    Scenario(
        "slow gradients",
        "the gradients grow 2 % a step for 300 steps, SGD .2",
        classify_digits(_digits_net, sgd(0.2), 400, on_gradients=_swell_gradients),
        solved=0.8,
    ),
    Scenario(
        "slow adam",
        "the gradients grow 2 % a step for 300 steps, Adam .003",
        classify_digits(_digits_net, adam(3e-3), 400, on_gradients=_swell_gradients),
        solved=0.9,
        tuned=True,
    ),
    Scenario("parabola x100", "y = 5x² + noise, SGD .1", parabola(0.1), solved=0.9, tuned=True),
    Scenario(
        "deep x10",
        "12 layers, SGD .1, momentum .9",
        classify_clusters(deep_network, sgd(0.1, 0.9)),
        solved=0.9,
        tuned=True,
    ),
    Scenario(
        "deep x100",
        "12 layers, SGD 1, momentum .9",
        classify_clusters(deep_network, sgd(1.0, 0.9)),
        solved=0.9,
    ),
    Scenario(
        "deep x300",
        "12 layers, SGD 3, momentum .9",
        classify_clusters(deep_network, sgd(3.0, 0.9)),
        solved=0.9,
        tuned=True,
    ),
    Scenario("deep adam x10", "12 layers, Adam .01", classify_clusters(deep_network, adam(0.01)), solved=0.9),
    Scenario(
        "deep adam x30",
        "12 layers, Adam .03",
        classify_clusters(deep_network, adam(0.03)),
        solved=0.9,
        tuned=True,
    ),
    Scenario("deep adam x100", "12 layers, Adam .1", classify_clusters(deep_network, adam(0.1)), solved=0.9),
    Scenario(
        "gpt x3",
        "GPT, SGD 1, momentum .9",
        language(GPT, sgd(1.0, 0.9)),
        higher=False,
        solved=2.95,
        tuned=True,
    ),
    Scenario("gpt x10", "GPT, SGD 3, momentum .9", language(GPT, sgd(3.0, 0.9)), higher=False, solved=2.95),
    Scenario(
        "rnn",
        "RNN language model, SGD 2, momentum .9",
        language(lambda: RecurrentLM(nn.RNN), sgd(2.0, 0.9)),
        higher=False,
        solved=2.95,
        tuned=True,
    ),
    *_rates(),
)
