"""Changes of recurrent modules: gated ones in place of plain ones, biases of gates, orthogonal weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.core.remedies.surgery.activations import replace_module
from lightning_gradguard.core.remedies.surgery.data_flow import RECURRENT, DataFlow

#: Gated modules, and the block of their rows that belongs to the gate which keeps the state.
_GATED = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
_PLAIN = (nn.RNN, nn.RNNCell)


def ungated(module: nn.Module, _: DataFlow) -> list[str]:
    """Returns the names of recurrent modules without gates."""
    return [name for name, child in module.named_modules() if type(child) in _PLAIN]


def gated(module: nn.Module, _: DataFlow) -> list[str]:
    """Returns the names of recurrent modules with gates that have a bias."""
    return [name for name, child in module.named_modules() if type(child) in _GATED and child.bias]


def recurrent(module: nn.Module, flow: DataFlow) -> list[str]:
    """Returns the names of recurrent modules, and of square linear layers that repeat in a forward pass."""
    found = [name for name, child in module.named_modules() if isinstance(child, RECURRENT)]
    repeated = (x for x in flow.weighted() if x.is_recurrent and isinstance(x.module, nn.Linear))
    return found + [x.name for x in repeated if x.module.in_features == x.module.out_features]


def replace_by_gru(module: nn.Module, names: Collection[str]) -> None:
    """Puts a GRU in the place of recurrent modules; its arguments, inputs and outputs are theirs."""
    for name in names:
        old = module.get_submodule(name)
        assert isinstance(old, _PLAIN)
        like = next(old.parameters())
        arguments: dict[str, Any] = {"bias": old.bias, "device": like.device, "dtype": like.dtype}
        new: nn.Module
        if isinstance(old, nn.RNN):
            arguments |= {"num_layers": old.num_layers, "batch_first": old.batch_first}
            arguments |= {"dropout": old.dropout, "bidirectional": old.bidirectional}
            new = nn.GRU(old.input_size, old.hidden_size, **arguments)
        else:
            new = nn.GRUCell(old.input_size, old.hidden_size, **arguments)
        replace_module(module, old, new)


@torch.no_grad()
def set_gate_biases(
    module: nn.Module, names: Collection[str], value: float, input_value: float | None
) -> None:
    """Sets the biases of the gates that keep the state: forget gates of an LSTM, update gates of a GRU.

    The input gates of an LSTM keep theirs without an `input_value`.
    """
    for name in names:
        child = module.get_submodule(name)
        assert isinstance(child, _GATED)
        size = child.hidden_size
        for parameter_name, parameter in child.named_parameters():
            if parameter_name.startswith("bias"):  # the second block of rows in both
                is_set = float(parameter_name.startswith("bias_hh"))
                parameter[size : 2 * size] = value * is_set
                if input_value is not None and isinstance(child, (nn.LSTM, nn.LSTMCell)):
                    parameter[:size] = input_value * is_set


@torch.no_grad()
def make_orthogonal(module: nn.Module, names: Collection[str], gain: float, seed: int) -> None:
    """Initializes recurrent weights as orthogonal matrices, one for each gate."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for weight, n_rows in _recurrent_weights(module.get_submodule(name)):
            for block in torch.split(weight, n_rows):
                drawn = torch.empty(block.shape)
                nn.init.orthogonal_(drawn, gain=gain, generator=generator)
                block.copy_(drawn)


def _recurrent_weights(child: nn.Module) -> list[tuple[Tensor, int]]:
    """Returns recurrent weights, and the number of rows of each of their blocks."""
    if isinstance(child, nn.Linear):
        return [(child.weight, len(child.weight))]
    assert isinstance(child, RECURRENT)
    named = child.named_parameters()
    return [(parameter, child.hidden_size) for name, parameter in named if name.startswith("weight_hh")]
