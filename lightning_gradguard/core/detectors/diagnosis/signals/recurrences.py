"""Recurrent modules: their saturated gates, and the gradient through time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.core.detectors.diagnosis.signals.scalars import accumulated_in, is_measurable
from lightning_gradguard.core.detectors.diagnosis.signals.units import MIN_ROWS, MOST_SAMPLES

#: Distance of a gate from 0 or 1, and of a candidate from -1 or 1, below which it is saturated.
GATE, CANDIDATE = 0.005, 0.03
#: Share of the calls of a cell that may have no use.
UNUSED = 0.15
#: Share of what a forget gate loses at a step that an input gate adds to the state at least.
ADDED = 0.1
#: Gates in the order of the weights. A gate that stays at the value in parentheses lets everything pass, so
#: that it does no harm; a forget gate at 0 shows as a gradient that vanishes through time.
_LSTM = (("input gates", 1), ("", None), ("candidates", None), ("output gates", 1))
_GRU = (("", None), ("update gates", 0), ("candidates", None))


def saturated_gates(
    module: nn.Module, inputs: Sequence[Tensor], output: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yields the share of saturated gates by kind, of `nn.LSTM`, `nn.GRU`, `nn.LSTMCell` and `nn.GRUCell`.

    The first layer's forward direction is examined: its gates follow from inputs and outputs, for a stack
    after the first layer has been computed again.

    Example:
        >>> cell = nn.GRUCell(2, 4)
        >>> _ = cell.bias_ih.data[4:8].fill_(40.0)
        >>> x, h = torch.zeros(16, 2), torch.zeros(16, 4)
        >>> [(name, share.item()) for name, share in saturated_gates(cell, (x, h), cell(x, h))]
        [('update gates', 1.0), ('candidates', 0.0)]
    """
    with torch.no_grad():
        if isinstance(module, nn.RNNCellBase):
            x = inputs[0].detach()
            hidden = inputs[1].detach() if len(inputs) > 1 else x.new_zeros(len(x), module.hidden_size)
            suffix = ""
            kinds = {nn.LSTMCell: _LSTM, nn.GRUCell: _GRU}.get(type(module), ())
        elif isinstance(module, nn.RNNBase) and module.mode in ("LSTM", "GRU") and not module.proj_size:
            suffix, x = "_l0", inputs[0].detach()
            hidden = _hidden_states(module, x, output)
            x = x.reshape(-1, x.shape[-1])
            kinds = _LSTM if module.mode == "LSTM" else _GRU
        else:
            return
        if not kinds or len(hidden) < MIN_ROWS:
            return
        parts = [
            *zip(
                *(
                    functional.linear(
                        value,
                        getattr(module, f"weight_{of}{suffix}"),
                        getattr(module, f"bias_{of}{suffix}", None),
                    ).chunk(len(kinds), 1)
                    for value, of in ((x, "ih"), (hidden, "hh"))
                ),
                strict=True,
            )
        ]
        reset: Tensor | float = 1.0
        for i, ((name, harmless), (a, b)) in enumerate(zip(kinds, parts, strict=True)):
            if kinds is _GRU and i == 0:
                reset = (a + b).sigmoid()
            if name == "candidates":
                yield name, _share((a + reset * b).tanh() / 2 + 0.5, CANDIDATE / 2, harmless)
            elif name:
                gate = (a + b).sigmoid()
                if name == "input gates":  # one that is closed adds up where the forget gate is as open
                    lost = -(parts[1][0] + parts[1][1])
                    gate = torch.where(gate > ADDED * lost.sigmoid(), gate.clamp(min=GATE), gate)
                yield name, _share(gate, GATE, harmless)


def _hidden_states(module: nn.RNNBase, x: Tensor, output: Tensor) -> Tensor:
    """Returns the state before each time, shape `(times * n, hidden)`, in the order of the inputs."""
    if module.num_layers > 1:
        n_directions = 2 if module.bidirectional else 1
        count = (4 if module.bias else 2) * n_directions
        run: Any = torch._VF.lstm if module.mode == "LSTM" else torch._VF.gru
        start = x.new_zeros(n_directions, x.shape[0 if module.batch_first else 1], module.hidden_size)
        state = (start, start) if module.mode == "LSTM" else start
        flags = (module.bias, 1, 0.0, False, module.bidirectional, module.batch_first)
        with torch.backends.cudnn.flags(enabled=False):  # its weights are one chunk, and these a part
            output = run(x, state, module._flat_weights[:count], *flags)[0]
    dim = 1 if module.batch_first else 0
    states = output.detach()[..., : module.hidden_size]
    first = torch.zeros_like(states.narrow(dim, 0, 1))
    before = torch.cat([first, states.narrow(dim, 0, states.shape[dim] - 1)], dim)
    return before.reshape(-1, module.hidden_size)


def _share(gate: Tensor, margin: float, harmless: int | None) -> Tensor:
    """Returns the share of units close to 0 or 1 for most samples, or of values, if that is larger."""
    low, high = gate < margin, gate > 1 - margin
    if harmless is not None:
        passes = (high if harmless else low).float().mean(0) > MOST_SAMPLES
        low, high = low & ~passes, high & ~passes
    flat = (low | high).float().mean(0)
    return torch.maximum((flat > MOST_SAMPLES).float().mean(), flat.mean())


def padded_share(module: nn.RNNBase, sequences: Tensor | PackedSequence) -> Tensor:
    """Returns the share of the steps of sequences that are, up to the last one, all the same.

    Example:
        >>> padded_share(nn.GRU(3, 1), torch.cat([torch.randn(4, 2, 3), torch.zeros(12, 2, 3)]))
        tensor(0.7500)
    """
    if isinstance(sequences, PackedSequence):
        return torch.zeros(())
    steps = sequences.detach().movedim(1 if module.batch_first else 0, 0)
    return (steps == steps[-1]).all(-1).flip(0).cumprod(0).float().mean()


def with_watched_input(
    module: nn.RNNBase, inputs: Sequence[Any], record: Callable[[int, list[int] | None, Tensor], None]
) -> tuple[Any, ...] | None:
    """Returns a module's inputs with a view of the sequence whose gradient is recorded, or `None`.

    The backward pass calls `record` with the dimension of the time, the sequences at each time if they are
    packed, and the gradient.
    """
    first, *rest = inputs
    packed = first if isinstance(first, PackedSequence) else None
    tensor = first if packed is None else packed.data
    if not is_measurable(tensor) or not any(p.requires_grad for p in module.parameters()):
        return None
    if tensor.ndim < (2 if packed is not None else 3):
        return None
    seen = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
    sizes = None if packed is None else packed.batch_sizes.tolist()
    seen.register_hook(partial(record, 1 if module.batch_first else 0, sizes))
    return (seen if packed is None else packed._replace(data=seen), *rest)


def through_time(gradient: Tensor, dim: int, sizes: list[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the norm of a gradient at the first time, at the last one that has any, and the largest."""
    if sizes is None:
        others = [d for d in range(gradient.ndim) if d != dim]
        norms = torch.linalg.vector_norm(gradient, dim=others, dtype=accumulated_in(gradient))
    else:
        norms = torch.stack([part[: sizes[-1]].float().norm() for part in torch.split(gradient, sizes)])
    times = torch.arange(len(norms), device=norms.device)
    return norms[0], norms[(times * (norms > 0)).argmax()], norms.max()


def of_used_calls(gradients: Sequence[float]) -> Sequence[float]:
    """Returns the gradients of a cell's calls without few that are 0, as of calls whose result is not used.

    Example:
        >>> of_used_calls([0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.1, 0.0])
        [0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.1]
    """
    used = [gradient for gradient in gradients if gradient != 0]
    return used if len(gradients) - len(used) <= len(gradients) * UNUSED else gradients
