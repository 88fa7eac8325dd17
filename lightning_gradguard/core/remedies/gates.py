"""Code that puts an LSTM in the place of a recurrent module without gates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: Input gates are closed at most to 0.01, where their gradient has not vanished.
MAX_CLOSED = 4.6


def forget_bias(n_steps: int) -> float:
    """Returns the bias of forget gates that keep a state over so many steps.

    References:
        Tallec, Ollivier, Can recurrent neural networks warp time?, 2018, arXiv:1804.11188.
    """
    return round(math.log(max(n_steps, 3)), 1)


def input_bias(n_steps: int) -> float:
    """Returns the bias of input gates that keep the inputs of so many steps from adding up."""
    return -min(forget_bias(n_steps), MAX_CLOSED)


def lstm_code(target: str, recurrent: nn.RNNBase, n_steps: int) -> str:
    """Returns statements that put an LSTM in the place of a module, and set its gates.

    Args:
        target: The module as Python.
        recurrent: The module.
        n_steps: Length of the sequences.
    """
    size, options = recurrent.hidden_size, ""
    options += f", num_layers={recurrent.num_layers}" if recurrent.num_layers > 1 else ""
    options += ", batch_first=True" if recurrent.batch_first else ""
    options += ", bidirectional=True" if recurrent.bidirectional else ""
    lines = [f"{target} = nn.LSTM({recurrent.input_size}, {size}{options})"]
    for layer in range(recurrent.num_layers):
        for direction in ("", "_reverse")[: 1 + recurrent.bidirectional]:
            bias = f"{target}.bias_hh_l{layer}{direction}"
            lines.append(f"nn.init.constant_({bias}[:{size}], {input_bias(n_steps)})")
            lines.append(f"nn.init.constant_({bias}[{size}:{2 * size}], {forget_bias(n_steps)})")
    return f"{'; '.join(lines)}  # its state is a pair; use 3 to 10 times the learning rate"
