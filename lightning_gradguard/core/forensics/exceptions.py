"""The values of a batch that made its step raise before there was a nonfinite number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from traceback import walk_tb

import torch
from torch import Tensor

from lightning_gradguard.core.forensics.faults_of_gradients import RAISED
from lightning_gradguard.core.forensics.location import innermost_of_traceback
from lightning_gradguard.core.forensics.origin import (
    Origin,
    OutOfRange,
    located,
    nonfinite_input,
    origin_in_weights,
)
from lightning_gradguard.core.forensics.records import FailedOperation
from lightning_gradguard.core.forensics.trace import is_nonfinite
from lightning_gradguard.core.incidents import Cause

#: Operations that take indices: the place of the tensor that is indexed, the dimension of it (`None`: the one
#: that the operation is given), and the place of the indices.
_INDEXED = {
    "aten::nll_loss_forward": (0, 1, 1),
    "aten::nll_loss2d_forward": (0, 1, 1),
    "aten::embedding": (0, 0, 1),
    "aten::_embedding_bag": (0, 0, 1),
    "aten::gather": (0, None, 2),
    "aten::index_select": (0, None, 2),
    "aten::scatter": (0, None, 2),
    "aten::scatter_": (0, None, 2),
    "aten::scatter_add_": (0, None, 2),
    "aten::index_add_": (0, None, 2),
}
_INDEX_ADVICE = {
    "labels": (
        "Correct the labels, which have to be within the {bound} outputs of the network, or give its last "
        "layer an output for each class."
    ),
    "indices": (
        "Correct the indices, or give the layer a row for each of them: an nn.Embedding needs num_embeddings "
        "above its largest index."
    ),
}
#: Labels of the losses that are no class, by default.
IGNORED = -100


#: Parts of the messages of `torch.distributions` without news.
_DETAILS = re.compile(
    r" \(Tensor of shape \([^)]*\)\)|\(\w+: torch\.Size.*?\)\)|, but found invalid values.*"
)
#: Advice on exceptions without an operation, by their message.
_BY_MESSAGE = {
    "more than 1 value per channel": (
        "The batch has one sample, of which there is no variance: give drop_last=True to the DataLoader, or "
        "use LayerNorm or GroupNorm."
    ),
    r"constraint GreaterThan(Eq)?\(lower_bound=0|constraint Positive": (
        "A parameter of the distribution has to be positive: use torch.nn.functional.softplus(x) + 1e-3 "
        "(`x` is the output of the network)."
    ),
    "constraint Interval|constraint HalfOpenInterval": (
        "A parameter of the distribution has to be within its interval: give logits, as in "
        "torch.distributions.Bernoulli(logits=x), or use x.sigmoid() (`x` is the output of the network)."
    ),
    "constraint Simplex": (
        "Probabilities have to add up to 1: give logits, as in torch.distributions.Categorical(logits=x) "
        "(`x` is the output of the network)."
    ),
    "constraint PositiveDefinite|constraint LowerCholesky": (
        "The matrix has to be positive definite: add a multiple of the identity, "
        "x + 1e-3 * torch.eye(len(x)) (`x` is the matrix)."
    ),
    "within the support": (
        "log_prob got a value that the distribution cannot take: check the targets, and keep them inside its "
        "range, as in y.clamp(1e-6, 1 - 1e-6) for Beta (`y` are the targets)."
    ),
}


def origin_of_exception(
    error: Exception,
    failed: FailedOperation | None,
    parts: Mapping[str, Tensor],
    out_of_range: Mapping[str, OutOfRange],
    frameworks: Sequence[str] = (),
) -> Origin:
    """Finds the values behind an exception of a step in which no operation made a nonfinite value.

    Args:
        error: What the step raised.
        failed: The operation that raised it; `None` if it was raised elsewhere.
        parts: Tensors of the batch, by name.
        out_of_range: Weights with elements out of range.
        frameworks: As `investigate` takes them.

    Returns:
        The origin: an index beyond its range, a nonfinite part of the batch, weights, or an operation that
        does not accept its argument; else its cause is `"unknown"`.
    """
    raised_at = innermost_of_traceback(error.__traceback__, frameworks)
    location = raised_at or (failed.location if failed else None)
    whole = " ".join(f"{type(error).__name__}: {error}".split())
    message = _DETAILS.sub("", whole)[:200]
    indexed = None if failed is None else _out_of_bounds(failed, parts)
    if indexed is not None:
        return located(indexed, location)
    for name, part in parts.items():
        if is_nonfinite(part):
            return nonfinite_input(name, part)
    if out_of_range:
        return origin_in_weights(out_of_range)
    fault = None if failed is None else next((f for f in RAISED if _short(failed) in f.operations), None)
    if failed is not None and fault is not None:
        origin = Origin(
            "forward_pass",
            "forward",
            operation=failed.name,
            detail=message,
            advice=fault.advice(_short(failed)),
        )
        return located(origin, location)
    advice = next((text for pattern, text in _BY_MESSAGE.items() if re.search(pattern, whole)), "")
    rows = _invalid_rows(error, parts)
    detail = f"The step raised {message}" + (f", in row {', '.join(map(str, rows))}" if rows else "")
    cause: Cause = "forward_pass" if advice else "unknown"
    return located(Origin(cause, detail=detail, rows=rows, advice=advice), location)


def _invalid_rows(error: Exception, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Returns the rows of the batch that a check of `torch.distributions` has found to be invalid."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    valid = frames[-1].f_locals.get("valid") if frames else None
    lengths = {len(part) for part in parts.values() if part.ndim}
    if not isinstance(valid, Tensor) or valid.ndim == 0 or len(valid) not in lengths:
        return ()
    return tuple((~valid).reshape(len(valid), -1).any(1).nonzero().flatten()[:10].tolist())


def _short(failed: FailedOperation) -> str:
    return failed.name.rpartition("::")[2]


def _out_of_bounds(failed: FailedOperation, parts: Mapping[str, Tensor]) -> Origin | None:
    """Returns the part of the batch with an index out of bounds as the origin; `None` without one."""
    if failed.name not in _INDEXED:
        return None
    source_at, dimension, index_at = _INDEXED[failed.name]
    source, indices = failed.arguments[source_at], failed.arguments[index_at]
    if dimension is None:
        dimension = failed.arguments[1]
    bound = source.shape[dimension if source.ndim > 1 else 0]
    wrong = (indices < 0) | (indices >= bound)
    if "nll_loss" in failed.name:
        wrong &= indices != IGNORED
    if not bool(wrong.any()):
        return None
    values = ", ".join(map(str, indices[wrong].unique()[:5].tolist()))
    rows: tuple[int, ...] = ()
    where = _part_with(indices[wrong], parts)
    lengths = {len(part) for part in parts.values() if part.ndim}
    if wrong.ndim and len(wrong) in lengths:
        rows = tuple(wrong.reshape(len(wrong), -1).any(1).nonzero().flatten()[:10].tolist())
    place = f" in row {', '.join(map(str, rows))}" if rows else ""
    holder = where[0] if where else "An index"
    sentence = f"{holder} holds {values}{place}, which is not within 0 to {bound - 1}"
    smallest = int(indices[wrong].min())
    advice = _INDEX_ADVICE["labels" if "nll_loss" in failed.name else "indices"].format(bound=bound)
    if smallest < 0 and "nll_loss" in failed.name:
        advice += f" Labels that are to be ignored need ignore_index={smallest}."
    return Origin("bad_input", "forward", "", failed.name, where, detail=sentence, rows=rows, advice=advice)


def _part_with(wrong: Tensor, parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the name of the part of the batch that has these indices."""
    integers = {n: p for n, p in parts.items() if not p.is_floating_point() and p.dtype != torch.bool}
    name = next((n for n, p in integers.items() if bool(torch.isin(wrong, p).all())), None)
    return () if name is None else (name,)
