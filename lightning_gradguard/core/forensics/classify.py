"""Second run of a batch, and classification of its first nonfinite value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    parts = dict(_parts(batch))
    leaves = {**dict(_tensors(module)), **parts}
    finite = [name for name, buffer in module.named_buffers() if not is_nonfinite(buffer)]
    with preserve_state(module), torch.enable_grad(), OperationTrace(module, leaves) as trace:
        losses, gradients = run()
        buffers = dict(module.named_buffers())
        corrupted = [name for name in finite if name in buffers and is_nonfinite(buffers[name])]
    out_of_range = out_of_range or {}
    nonfinite = next((t for t in (*losses, *gradients) if is_nonfinite(t)), None)
    if nonfinite is not None:
        record = trace.record_of(nonfinite)
        source = first_nonfinite(record) if record is not None else None
        return _classify(source, out_of_range, parts, trace)
    if _total_norm_overflows(gradients):
        return _origin_of_overflow(out_of_range, parts)
    if corrupted:
        return origin_in_weights(out_of_range) if out_of_range else _origin_in_buffers(corrupted, parts)
    return Origin("transient", detail="Run again on the same weights, the batch gives finite numbers.")


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


def _origin_of_overflow(out_of_range: Mapping[str, int], parts: Mapping[str, Tensor]) -> Origin:
    if out_of_range:
        return origin_in_weights(out_of_range)
    detail = "Every gradient is finite, but their norm overflows float32"
    if huge := _huge_inputs(parts):
        name, high = next(iter(huge.items()))
        detail = f"{detail}: {name} holds values up to {high:.4g}."
        return Origin("bad_input", "backward", where=tuple(huge), detail=detail)
    return Origin("backward_pass", "backward", detail=f"{detail}.")


def _origin_in_buffers(corrupted: Sequence[str], parts: Mapping[str, Tensor]) -> Origin:
    names = tuple(name.replace("_orig_mod.", "") for name in corrupted)
    owner = names[0].rpartition(".")[0]
    detail = f"Loss and gradients are finite, but the forward pass left nonfinite values in {names[0]}"
    if huge := _huge_inputs(parts):
        name, high = next(iter(huge.items()))
        detail = f"{detail}: {name} holds values up to {high:.4g}."
        return Origin("bad_input", "forward", owner, where=tuple(huge), detail=detail)
    return Origin("forward_pass", "forward", owner, where=names, detail=f"{detail}.")


def _parts(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the batch with their paths."""
    for path, leaf in tree_leaves_with_path(batch):
        if isinstance(leaf, Tensor):
            yield "batch" + "".join(map(str, path)), leaf


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields buffers and weights with their names."""
    for name, tensor in (*module.named_buffers(), *module.named_parameters()):
        yield name.replace("_orig_mod.", ""), tensor


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
