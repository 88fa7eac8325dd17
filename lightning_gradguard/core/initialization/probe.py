"""Measurements of activations and gradients from one batch, without a change to the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.forward_trace import ForwardTrace, Layer
from lightning_gradguard.core.snapshots import preserve_state

#: log10 of a gain of zero.
ZERO_GAIN = -45.0


@dataclass
class Probe:
    """Measurements of one batch in a network.

    Args:
        loss: The loss.
        n_classes: Number of classes, if a classification loss was called.
        layers: Weighted layers, in the order of the forward pass.
        block_gain: Like `Layer.gain`, at the output of the first repeated block.
        recurrent_gains: For each recurrent module, log10 of the ratio of gradient norms at its first and its
            last input.
        gradients: Gradient of the loss for each parameter by name; `None` where it is unused.
    """

    loss: float
    n_classes: int | None = None
    layers: list[Layer] = field(default_factory=list)
    block_gain: float | None = None
    recurrent_gains: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


def probe(module: nn.Module, run_loss: Callable[[], Tensor], seed: int = 0) -> Probe:
    """Runs one batch through a network and measures its activations and gradients.

    Args:
        module: The network.
        run_loss: Computes the training loss of the batch with it.
        seed: Seed of the random vectors that are propagated back.

    Returns:
        The measurements. Weights, gradients, buffers, modes and random numbers are unchanged.
    """
    with preserve_state(module), torch.enable_grad(), ForwardTrace(module) as trace:
        loss = run_loss()
        result = Probe(loss=float(loss.detach()), n_classes=trace.n_classes, layers=trace.layers)
        generator = torch.Generator().manual_seed(seed)
        if trace.last_input is not None and len(trace.layers) > 1:
            hidden = trace.layers[:-1]
            gains = _gains(trace.last_input, [layer.output for layer in hidden], generator)
            for layer, gain in zip(hidden, gains, strict=True):
                layer.gain = gain
            blocks = trace.blocks if len(trace.blocks) > 2 else [layer.output for layer in hidden]
            result.block_gain = _gains(trace.last_input, blocks[:1], generator)[0]
        for name, (inputs, outputs, time) in trace.recurrent.items():
            result.recurrent_gains[name] = _gain_through_time(inputs, outputs, time, generator)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if named and loss.requires_grad:
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            result.gradients = {name: g for (name, _), g in zip(named, found, strict=True)}
        for layer in result.layers:
            layer.output = layer.output.detach()
        return result


def _gains(
    source: Tensor, targets: Sequence[Tensor], generator: torch.Generator, times: int = 2
) -> list[float | None]:
    """Returns log10 of the rms at each target of random unit-rms vectors, propagated back from the source."""
    squares: list[float | None] = [None] * len(targets)
    for _ in range(times):
        vector = torch.randn(source.shape, generator=generator).to(source)
        found = torch.autograd.grad(source, targets, vector, retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(found):
            if gradient is not None:
                squares[i] = (squares[i] or 0.0) + float(gradient.double().square().mean())
    return [None if s is None else _decades((s / times) ** 0.5) for s in squares]


def _gain_through_time(inputs: Tensor, outputs: Tensor, time: int, generator: torch.Generator) -> float:
    last = outputs.select(time, -1)
    vector = torch.randn(last.shape, generator=generator).to(last)
    (gradient,) = torch.autograd.grad(last, inputs, vector, retain_graph=True)
    first = gradient.select(time, 0).double().norm()
    final = gradient.select(time, -1).double().norm()
    return _decades(float(first)) - _decades(float(final))


def _decades(value: float) -> float:
    return math.log10(max(value, 10**ZERO_GAIN)) if value == value else math.nan
