"""Second run of a batch, and classification of its first nonfinite value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves_with_path

from lightning_gradguard.core.forensics.origin import Origin, origin_in_weights
from lightning_gradguard.core.forensics.trace import (
    OperationRecord,
    OperationTrace,
    first_nonfinite,
    is_nonfinite,
)
from lightning_gradguard.core.incidents import Cause
from lightning_gradguard.core.norms import tensor_norms, total_norm_from_norms
from lightning_gradguard.core.snapshots import preserve_state

#: Inputs this large overflow float32 when they are squared and summed a few times.
HUGE_INPUT = 1e6


def investigate(
    module: nn.Module,
    run: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    batch: Any,
    *,
    out_of_range: Mapping[str, int] | None = None,
) -> Origin:
    """Runs a batch again and finds the origin of its nonfinite value.

    Every operation of the forward and backward pass is checked, with a host synchronization. The search
    follows only nonfinite values back from the nonfinite loss (or gradient), so that a harmless mask of
    `-inf` is not blamed.

    Args:
        module: The network. Buffers, modes, random numbers and plain attributes are restored.
        run: Computes with it the losses of the batch, and the gradients of its parameters.
        batch: Input of `run`, in which the origin may be; any nesting of tensors.
        out_of_range: Tensors of weights or optimizer state with elements out of range; see
            `out_of_range_elements`.

    Returns:
        The origin; its cause is `"transient"` if losses and gradients are finite.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> def run():
        ...     loss = layer(torch.ones(1, 2)).relu().mul(0).log().sum()
        ...     return [loss], torch.autograd.grad(loss, list(layer.parameters()))
        >>> origin = investigate(layer, run, None)
        >>> origin.cause, origin.operation, origin.high
        ('loss', 'aten::log', 0.0)
    """
    leaves = tree_leaves_with_path(batch)
    parts = {"batch" + "".join(map(str, path)): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    tensors = (*module.named_buffers(), *module.named_parameters())
    named = {**{name.replace("_orig_mod.", ""): tensor for name, tensor in tensors}, **parts}
    finite = [name for name, buffer in module.named_buffers() if not is_nonfinite(buffer)]
    with preserve_state(module), torch.enable_grad(), OperationTrace(module, named) as trace:
        losses, gradients = run()
        buffers = dict(module.named_buffers())
        corrupted = [name for name in finite if name in buffers and is_nonfinite(buffers[name])]
    nonfinite = next((t for t in (*losses, *gradients) if is_nonfinite(t)), None)
    if nonfinite is not None:
        record = trace.record_of(nonfinite)
        source = first_nonfinite(record) if record is not None else None
        return _classify(source, out_of_range or {}, parts, trace)
    overflows = _total_norm_overflows(gradients)
    if not (overflows or corrupted):
        return Origin("transient", detail="Run again on the same weights, the batch gives finite numbers.")
    if out_of_range:
        return origin_in_weights(out_of_range)
    if overflows:
        detail = "Every gradient is finite, but their norm overflows float32"
        return _or_huge_inputs(Origin("backward_pass", "backward", detail=detail), parts)
    where = tuple(name.replace("_orig_mod.", "") for name in corrupted)
    owner = where[0].rpartition(".")[0]
    detail = f"Loss and gradients are finite, but the forward pass left nonfinite values in {where[0]}"
    return _or_huge_inputs(Origin("forward_pass", "forward", owner, where=where, detail=detail), parts)


def _classify(
    source: OperationRecord | str | None,
    out_of_range: Mapping[str, int],
    parts: Mapping[str, Tensor],
    trace: OperationTrace,
) -> Origin:
    if isinstance(source, str):
        if source in parts:
            rows = _nonfinite_rows(parts[source])
            place = f" in row {', '.join(map(str, rows))}" if rows else ""
            detail = f"{source} holds nonfinite values{place}."
            return Origin("bad_input", where=(source,), rows=rows, detail=detail)
        out_of_range = out_of_range or {source: 1}
    if out_of_range:
        return origin_in_weights(out_of_range)
    if source is None or isinstance(source, str):
        return Origin("unknown", detail="No traced operation made the nonfinite value.")
    place = f"module `{source.module}`" if source.module else "the step's own code"
    given = "" if source.low is None else f" given {source.low:.4g} to {source.high:.4g}"
    sentence = f"{source.operation} in {place}{given} returned {source.made}"
    is_ahead_of_modules = trace.modules_left > 0 == source.modules_left
    cause: Cause = "forward_pass" if source.module or is_ahead_of_modules else "loss"
    where: tuple[str, ...] = (source.module,) if source.module else ()
    huge = _huge_inputs(parts)
    if source.phase == "backward":
        cause = "backward_pass"
    elif source.module in trace.loss_modules:
        cause = "loss"
    largest_input = max(abs(source.low or 0.0), abs(source.high or 0.0))
    if huge and (cause != "loss" or largest_input > HUGE_INPUT):
        cause, where = "bad_input", tuple(huge)
        sentence += f"; {where[0]} holds values up to {huge[where[0]]:.4g}"
    return Origin(
        cause,
        source.phase,
        source.module,
        source.operation,
        where,
        dtype=source.dtype,
        low=source.low,
        high=source.high,
        detail=f"{sentence} ({source.dtype}).",
    )


def _or_huge_inputs(origin: Origin, parts: Mapping[str, Tensor]) -> Origin:
    """Returns the origin, or the parts of the batch that may have overflowed, if there are any."""
    huge = _huge_inputs(parts)
    if not huge:
        return replace(origin, detail=f"{origin.detail}.")
    name, high = next(iter(huge.items()))
    detail = f"{origin.detail}: {name} holds values up to {high:.4g}."
    return replace(origin, cause="bad_input", where=tuple(huge), detail=detail)


def _huge_inputs(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the largest values of the parts of the batch that may overflow, the largest first."""
    floating = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    highest = ((name, float(part.detach().abs().amax())) for name, part in floating.items())
    return dict(sorted(((n, high) for n, high in highest if high > HUGE_INPUT), key=lambda item: -item[1]))


def _nonfinite_rows(tensor: Tensor) -> tuple[int, ...]:
    """Returns the first ten nonfinite rows of a tensor; none if it is a scalar, or not dense."""
    if tensor.ndim == 0 or tensor.layout != torch.strided:
        return ()
    nonfinite = (~tensor.detach().isfinite()).reshape(len(tensor), -1).any(dim=1)
    return tuple(nonfinite.nonzero().flatten()[:10].tolist())


def _total_norm_overflows(gradients: Sequence[Tensor]) -> bool:
    # measured like a step, where the norm overflows if squares overflow float32
    total = total_norm_from_norms(tensor_norms([g.detach() for g in gradients]))
    return float(total) > torch.finfo(torch.float32).max
