"""The values of a batch that made its step raise before there was a nonfinite number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from traceback import walk_tb

import torch
from torch import Tensor

from lightning_gradguard.core.forensics.inputs import described_outliers
from lightning_gradguard.core.forensics.location import innermost_of_traceback
from lightning_gradguard.core.forensics.origin import (
    Origin,
    OutOfRange,
    in_rows,
    located,
    nonfinite_input,
    origin_in_weights,
)
from lightning_gradguard.core.forensics.records import FailedOperation
from lightning_gradguard.core.forensics.rejections import Rejection, rejection
from lightning_gradguard.core.forensics.trace import is_nonfinite
from lightning_gradguard.core.incidents import Cause

#: Operations that take indices: the place of the tensor that is indexed, the dimension of it (`None`: the one
#: that the operation is given), and the place of the indices.
_INDEXED = {
    "nll_loss_forward": (0, 1, 1),
    "nll_loss2d_forward": (0, 1, 1),
    "multi_margin_loss": (0, 1, 1),
    "embedding": (0, 0, 1),
    "_embedding_bag": (0, 0, 1),
    "gather": (0, None, 2),
    "index_select": (0, None, 2),
    "scatter": (0, None, 2),
    "scatter_add": (0, None, 2),
    "scatter_reduce": (0, None, 2),
    "index_add": (0, None, 2),
    "index_copy": (0, None, 2),
}
_INDEX_ADVICE = {
    "labels": (
        "Correct the labels, which have to be within the {bound} outputs of the network, or give its last "
        "layer an output for each class."
    ),
    "embedding": (
        "Correct the indices, or give the layer a row for each of them: an nn.Embedding needs num_embeddings "
        "above its largest index."
    ),
    "indices": (
        "Correct the indices, which have to be below {bound}, or give what they select from an entry for "
        "each, as an output of the network for each class."
    ),
}
#: Labels of the losses that are no class, by default.
IGNORED = -100
#: Messages of operations that take indices about something else than their values.
_OF_SHAPES = re.compile(
    "D target tensor expected|batch_size|same number of dimensions|scalar types|to be a vector"
)
#: Parts of the messages of `torch.distributions` without news.
_DETAILS = re.compile(
    r" \(Tensor of shape \([^)]*\)\)|\(\w+: torch\.Size.*?\)\)|, but found invalid values.*|"
    r"\(lower_bound=tensor\(.*"
)


def origin_of_exception(
    error: Exception,
    failed: FailedOperation | None,
    parts: Mapping[str, Tensor],
    out_of_range: Mapping[str, OutOfRange],
    frameworks: Sequence[str] = (),
) -> Origin:
    """Finds the values behind an exception of a step in which no operation made a nonfinite value.

    Returns:
        The origin: an index beyond its range, a nonfinite part of the batch, weights, or an operation that
        does not accept its argument; else its cause is `"unknown"`.
    """
    raised_at = innermost_of_traceback(error.__traceback__, frameworks)
    location = raised_at or (failed.location if failed else None)
    whole = " ".join(f"{type(error).__name__}: {error}".split())
    message = _DETAILS.sub("", whole)[:200].rstrip(".")
    indexed = None if failed is None or _OF_SHAPES.search(whole) else _out_of_bounds(failed, parts)
    if indexed is not None:
        return located(indexed, location)
    for name, part in parts.items():
        if is_nonfinite(part):
            return nonfinite_input(name, part)
    if out_of_range:
        return origin_in_weights(out_of_range)
    known = rejection(error)
    rows, where = ((), ()) if known is None else _rejected(known, failed, parts)
    if not rows:
        rows, where = _invalid_sample(error, parts)
    detail = f"The step raised {message}" + (f",{in_rows(rows)}" if rows else "")
    detail += f" of {where[0]}" if where else ""
    if known is None:
        detail += "".join(f"; {outlier}" for outlier in described_outliers(parts))
    cause: Cause = "unknown" if known is None else "bad_input" if where else known.cause
    operation = failed.name if failed is not None and known is not None else ""
    advice = "" if known is None else known.advice(message, location.called_code if location else "")
    origin = Origin(cause, "forward", "", operation, where, detail=detail, rows=rows, advice=advice)
    return located(origin, location)


def _rejected(
    known: Rejection, failed: FailedOperation | None, parts: Mapping[str, Tensor]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the rows of the batch that were rejected, and the part of it that they are in, if it is one."""
    if known.argument is not None and failed is not None:
        given = failed.arguments[known.argument]
        return _rows_with((given < 0) | (given > 1), parts), _same(given, parts)
    integers = {n: p for n, p in parts.items() if p.ndim and not p.is_floating_point() and p.numel()}
    if known.extreme and len(integers) == 1:
        ((name, part),) = integers.items()
        extreme = part.max() if known.extreme == "largest" else part.min()
        return _rows_with(part == extreme, parts), (name,)
    return (), ()


def _invalid_sample(error: Exception, parts: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the rows that a check of `torch.distributions` has found invalid, and the part they are in.

    A parameter of a distribution is no part of the batch, but what is given to `log_prob` may be one.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    found = frames[-1].f_locals if frames else {}
    valid, value = found.get("valid"), found.get("value")
    rows = _rows_with(~valid, parts) if isinstance(valid, Tensor) else ()
    return rows, _same(value, parts) if isinstance(value, Tensor) else ()


def _same(value: Tensor, parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the name of the part of the batch that has these values."""
    flat = value.detach().flatten()
    same = (n for n, p in parts.items() if p.numel() == len(flat) and torch.equal(p.to(flat).flatten(), flat))
    return tuple(same)[:1]


def _rows_with(wrong: Tensor, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Returns the first ten rows with a true value, if they are rows of the batch."""
    if wrong.ndim == 0 or len(wrong) not in {len(part) for part in parts.values() if part.ndim}:
        return ()
    return tuple(wrong.reshape(len(wrong), -1).any(1).nonzero().flatten()[:10].tolist())


def _indices(failed: FailedOperation) -> list[tuple[int, int, Tensor]]:
    """Returns the lowest index that an operation accepts, the first one that it does not, and the indices."""
    name = failed.name.rpartition("::")[2].rstrip("_")
    if name in ("index", "index_put"):  # tensor[indices, ...], which may be negative
        source, given = failed.arguments[:2]
        used = ((n, i) for n, i in enumerate(given) if i is not None and i.dtype != torch.bool)
        return [(-source.shape[n], source.shape[n], indices) for n, indices in used]
    if name not in _INDEXED:
        return []
    source_at, dimension, index_at = _INDEXED[name]
    source, indices = failed.arguments[source_at], failed.arguments[index_at]
    if dimension is None:
        dimension = failed.arguments[1]
    return [(0, source.shape[dimension if source.ndim > 1 else 0], indices)]


def _out_of_bounds(failed: FailedOperation, parts: Mapping[str, Tensor]) -> Origin | None:
    """Returns the part of the batch with an index out of bounds as the origin; `None` without one."""
    is_label = "_loss" in failed.name
    for lowest, bound, indices in _indices(failed):
        wrong = (indices < lowest) | (indices >= bound)
        if is_label:
            wrong &= indices != IGNORED
        if bool(wrong.any()):
            break
    else:
        return None
    values = ", ".join(map(str, sorted(set(indices[wrong].tolist()))[:5]))
    where = _part_with(indices[wrong], parts)
    rows = _rows_with(torch.isin(parts[where[0]], indices[wrong]) if where else wrong, parts)
    holder = where[0] if where else "An index"
    sentence = f"{holder} holds {values}{in_rows(rows)}, which is not within {lowest} to {bound - 1}"
    whose = "labels" if is_label else "embedding" if "embedding" in failed.name else "indices"
    advice = _INDEX_ADVICE[whose].format(bound=bound)
    smallest = int(indices.min())
    if is_label and smallest < 0:
        advice += f" Labels that are to be ignored need ignore_index={smallest}."
    elif smallest == IGNORED:
        advice = (
            f"{IGNORED} marks labels that cross_entropy ignores: index with y.clamp(min=0), and leave these "
            f"rows out of the loss (y != {IGNORED}); of inputs, give padding an index."
        )
    elif is_label and smallest == 1 and int(indices.max()) == bound:
        advice += " Classes count from 0: if these begin at 1, subtract 1."
    return Origin("bad_input", "forward", "", failed.name, where, detail=sentence, rows=rows, advice=advice)


def _part_with(wrong: Tensor, parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the name of the part of the batch that has these indices."""
    integers = {n: p for n, p in parts.items() if not p.is_floating_point() and p.dtype != torch.bool}
    name = next((n for n, p in integers.items() if bool(torch.isin(wrong, p).all())), None)
    return () if name is None else (name,)
