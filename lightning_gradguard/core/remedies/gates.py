"""Code that sets the gates of a recurrent module, puts an LSTM in its place, or reads it before padding."""

from __future__ import annotations

import math
from typing import Any

#: Input gates are closed at most to 0.01, where their gradient has not vanished.
MAX_CLOSED = 4.6


def forget_bias(n_steps: int) -> float:
    """Returns the bias of forget gates that keep a state over so many steps.

    References:
        Tallec, Ollivier, Can recurrent neural networks warp time?, 2018, arXiv:1804.11188.
    """
    return round(math.log(max(n_steps, 3)), 1)


def input_bias(n_steps: int) -> float:
    """Returns the bias of input gates that keep the inputs of so many steps from adding up.

    It slows down what is learned, and takes 3 to 10 times the learning rate.
    """
    return -min(forget_bias(n_steps), MAX_CLOSED)


def gate_lines(target: str, recurrent: Any, n_steps: int) -> list[str]:
    """Returns statements that open the gates which keep a state, forget gates of an LSTM, for so many steps.

    Args:
        target: The module as Python.
        recurrent: An LSTM or a GRU, or a cell of one, with biases; or the module that an LSTM replaces.
        n_steps: Length of the sequences.
    """
    size, suffixes = recurrent.hidden_size, [""]
    if not _is(recurrent, "LSTMCell", "GRUCell"):
        directions = ("", "_reverse")[: 1 + recurrent.bidirectional]
        suffixes = [f"_l{layer}{way}" for layer in range(recurrent.num_layers) for way in directions]
    # the second block is the forget gate of an LSTM, and the update gate of a GRU
    return [
        f"nn.init.constant_({target}.bias_hh{suffix}[{size}:{2 * size}], {forget_bias(n_steps)})"
        for suffix in suffixes
    ]


def gated_code(target: str, recurrent: Any, n_steps: int) -> str:
    """Returns statements that set the gates of a module, or put an LSTM with such gates in its place.

    A GRU whose gates are open for long learns at a higher rate alone. Empty for what has no gates.
    """
    if _is(recurrent, "LSTM", "LSTMCell", "GRUCell"):
        return "; ".join(gate_lines(target, recurrent, n_steps) if recurrent.bias else [])
    if not _is(recurrent, "RNN_TANH", "RNN_RELU", "GRU"):
        return ""
    options = f", num_layers={recurrent.num_layers}" if recurrent.num_layers > 1 else ""
    options += ", batch_first=True" if recurrent.batch_first else ""
    options += ", bidirectional=True" if recurrent.bidirectional else ""
    lstm = f"{target} = nn.LSTM({recurrent.input_size}, {recurrent.hidden_size}{options})"
    lines = [lstm, *gate_lines(target, recurrent, n_steps)]
    return f"{'; '.join(lines)}  # its state is a pair"


def packed_code(target: str, recurrent: object) -> str:
    """Returns statements that read the state of a module before the padding at the end of its sequences."""
    is_first = bool(getattr(recurrent, "batch_first", False))
    last, dim = ("x[:, -1:]", 1) if is_first else ("x[-1:]", 0)
    hidden = f"{target}(packed)[1]{'[0]' if _is(recurrent, 'LSTM') else ''}"
    both = getattr(recurrent, "bidirectional", False)
    return (
        f"lengths = (x != {last}).any(-1).cumsum({dim}).argmax({dim}).cpu() + 1; "
        f"packed = nn.utils.rnn.pack_padded_sequence(x, lengths, {'batch_first=True, ' * is_first}"
        "enforce_sorted=False); "
        f"state = {f'torch.cat([*{hidden}[-2:]], -1)' if both else f'{hidden}[-1]'}"
    )


def _is(recurrent: object, *modes: str) -> bool:
    return getattr(recurrent, "mode", type(recurrent).__name__) in modes
