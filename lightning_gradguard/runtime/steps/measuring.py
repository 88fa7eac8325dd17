"""Measures one optimizer step, and shares the result in the step's one collective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_gradguard.core import norms
from lightning_gradguard.core.norms import (
    Gradients,
    OwnMeasurement,
    PackedMeasurement,
    UnitNorms,
    unit_places,
)
from lightning_gradguard.runtime import distributed
from lightning_gradguard.runtime.steps.parameters import Selection


@dataclass(slots=True)
class StepRequest:
    """The measurements that the members of a suite request of one step.

    Args:
        losses: Losses of this rank since the step before, each of shape `()`.
        flags: Nonfinite weights, nonfinite buffers, a repeated lost batch; each is set on every rank if it is
            set on one.
        norm_types: Norms of every gradient; 2 is one of them.
        weights: True if norms of the weights are requested.
        units: True if norms of single units are requested.
        rate: Learning rates of the optimizer, added up; ranks compare them.
        loss_scale: The factor that gradients still carry, which is divided out of their norms.
        pending: Local sums of shape `(n,)`, on the device of the gradients, to be included in the collective.
    """

    losses: Sequence[Tensor]
    flags: tuple[Tensor | None, Tensor | None, bool]
    norm_types: Sequence[float] = (2.0,)
    weights: bool = False
    units: bool = False
    rate: float | Tensor = 0.0
    loss_scale: float = 1.0
    pending: Tensor | None = None


@dataclass(slots=True)
class Measured:
    """One step's numbers on the device, the same on every rank.

    Args:
        gradients: Before any callback writes to them; units, if requested, where they are sums over shards.
        other_norms: Norm of each gradient by norm type, other than 2.
        weight_norms: L2 norm of each weight, if it was requested.
        packed: The numbers that checks are based on, on their way to the host.
        pending: The pending sums over all shards; `None` without any.
    """

    gradients: Gradients
    other_norms: Mapping[float, Tensor]
    weight_norms: Tensor | None
    packed: PackedMeasurement
    pending: Tensor | None


def measure(selection: Selection, request: StepRequest) -> Measured:
    """Measures the gradients of one step, and shares the result in at most one collective."""
    was_enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # which `torch.no_grad` does in ten calls
    try:
        return (_measure_shards if selection.is_sharded else _measure_whole)(selection, request)
    finally:
        torch._C._set_grad_enabled(was_enabled)


def _measure_whole(selection: Selection, request: StepRequest) -> Measured:
    """Measures gradients of which every rank has all, averaged; norms and rates show ranks that disagree."""
    tensors = selection.gradients()
    scale = request.loss_scale
    weight_norms = squares = None
    if request.weights:
        weight_norms = selection.norms(selection.parameters)
        squares = weight_norms.square().sum().nan_to_num(0.0).to(selection.device)
    make_head = partial(_whole_head, request, selection, squares)
    pending = request.pending
    packed: PackedMeasurement
    norms_2: Tensor | Callable[[Gradients], Tensor]
    total_norm: Tensor | Callable[[Gradients], Tensor]
    if selection.n_ranks == 1:
        weights, buffers, repeats = request.flags
        numbers = [*request.losses, *[n for n in (weights, buffers, squares) if n is not None]]
        values = selection.norms_and(tensors, numbers)
        if scale != 1:
            values = torch.cat([values[: len(tensors)] / scale, values[len(tensors) :]])
        has = weights is not None, buffers is not None, squares is not None
        n_losses, is_matrix = len(request.losses), selection.is_matrix
        packed = own = OwnMeasurement(values, n_losses, is_matrix, has, repeats, make_head)
        norms_2, total_norm = own.norms, norms.total_norm_of
    else:
        norms_2 = selection.norms(tensors) / scale
        *head, own_norm = make_head(norms_2).unbind()
        by_rank = own_norm.new_zeros(2, selection.n_ranks)
        total_norm = by_rank[0, distributed.rank()] = own_norm
        by_rank[1, distributed.rank()] = request.rate
        by_rank[1].nan_to_num_(0.0, 0.0, 0.0)  # a rate of NaN on all ranks is no disagreement
        parts = {"head": torch.stack(head), "by_rank": by_rank.view(-1)}
        seen = distributed.reduce_together(parts if pending is None else {**parts, "pending": pending}, {})
        packed = PackedMeasurement(torch.cat([seen["head"], seen["by_rank"]]), has_rates=True)
        pending = seen.get("pending")
    others: dict[float, Tensor] = {}
    if len(request.norm_types) > 1:
        others = {p: selection.norms(tensors, p) / scale for p in request.norm_types if p != 2}
    return Measured(
        gradients=Gradients(selection.names, selection.parameters, tensors, norms_2, total_norm),
        other_norms=others,
        weight_norms=weight_norms,
        packed=packed,
        pending=pending,
    )


def _measure_shards(selection: Selection, request: StepRequest) -> Measured:
    """Measures gradients of which ranks have different parts: sums over local shards are added up."""
    head = _head(request, selection)
    parameters, device, factors = selection.parameters, selection.device, selection.replica_factors
    scale = request.loss_scale
    tensors = selection.gradients()
    sums: dict[float | str, Tensor] = {}
    for p in request.norm_types:
        sums[p] = norms.power_sums(tensors, p).to(device) / (scale if p == math.inf else scale**p)
    head.append(torch.dot(sums[2.0], selection.matrices))
    head.append(selection.zero)
    if request.weights:
        sums["weights"] = norms.power_sums(parameters).to(device)
        head[-1] = torch.dot(sums["weights"], factors).nan_to_num(0.0)
    largest: dict[float | str, Tensor] = {p: sums.pop(p) for p in request.norm_types if p == math.inf}
    parts: dict[float | str, Tensor] = {key: values * factors for key, values in sums.items()}
    parts["head"] = torch.stack(head)
    if request.pending is not None:
        parts["pending"] = request.pending
    if request.units:
        parts["units"] = _unit_sums(tensors, parameters, factors, scale)
    seen = distributed.reduce_together(parts, largest)
    tensor_norms = {p: norms.norms_from_power_sums(seen[p], p) for p in request.norm_types}
    total_norm = norms.total_norm_from_norms(tensor_norms[2.0])
    units = _unit_norms(seen["units"], parameters) if request.units else None
    return Measured(
        gradients=Gradients(selection.names, parameters, tensors, tensor_norms.pop(2.0), total_norm, units),
        other_norms=tensor_norms,
        weight_norms=norms.norms_from_power_sums(seen["weights"]) if request.weights else None,
        packed=PackedMeasurement(torch.cat([seen["head"], total_norm.view(1)])),
        pending=seen.get("pending"),
    )


def norms_over_shards(selection: Selection, *lists: Sequence[Tensor]) -> Tensor:
    """Returns L2 norms of lists of tensors that are sharded as the parameters are; float64.

    The shape is `(len(lists), n)`. It takes at most one collective.
    """
    sums = torch.stack([norms.power_sums(tensors) for tensors in lists])
    if selection.is_sharded:
        sums = distributed.sum_over_ranks(sums * selection.replica_factors)
    return norms.norms_from_power_sums(sums)


@torch.no_grad()
def _whole_head(
    request: StepRequest, selection: Selection, squares: Tensor | None, tensor_norms: Tensor
) -> Tensor:
    """Returns a `Head` of one process and its total norm, float64."""
    head = _head(request, selection)
    head.append(torch.dot(tensor_norms, selection.matrices))
    head.append(selection.zero if squares is None else squares / selection.n_ranks)
    return torch.stack([*head, norms.total_norm_from_norms(tensor_norms)])


def _head(request: StepRequest, selection: Selection) -> list[Tensor]:
    """Returns the numbers of a `Head` but the last two: scalars on the device, float64."""
    zero, one, losses = selection.zero, selection.one, request.losses
    head = [zero, zero, zero]
    if len(losses) == 1 and selection.n_ranks == 1:
        head = [losses[0].to(zero), one, zero]  # `PackedMeasurement.measurement` finds out if it is finite
    elif losses:
        loss = torch.stack(tuple(losses)).to(zero)
        finite = loss.nan_to_num(0.0, 0.0, 0.0)
        head = [values.to(zero).sum() for values in (finite, finite == loss, finite != loss)]
    weights, buffers, repeats = request.flags
    head.append(zero if weights is None else weights.to(zero))
    head.append(zero if buffers is None else buffers.to(zero))
    head.append(one if repeats else zero)
    return head


def _unit_sums(
    tensors: Sequence[Tensor], parameters: Sequence[nn.Parameter], factors: Tensor, loss_scale: float
) -> Tensor:
    """Returns squares by unit, of all gradients and then of all weights, one after the other."""
    gradients = [norms.unit_power_sums(t) * s / loss_scale**2 for t, s in zip(tensors, factors, strict=True)]
    weights = [norms.unit_power_sums(p.detach()) * s for p, s in zip(parameters, factors, strict=True)]
    return torch.cat([*gradients, *weights])


def _unit_norms(sums: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[UnitNorms, ...]:
    """Returns the norms, from those squares."""
    places = [unit_places(parameter)[0] for parameter in parameters]
    units = [
        part.sqrt().view(-1, *(1,) * (parameter.ndim - 1)) if parameter.ndim > 1 else part.sqrt().view(())
        for part, parameter in zip(torch.split(sums, places * 2), [*parameters, *parameters], strict=True)
    ]
    n = len(parameters)
    return tuple(zip(units[:n], units[n:], strict=True))
