"""What is measured of one optimizer step, and the one collective in which ranks share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from lightning_gradguard.core import norms
from lightning_gradguard.core.norms import UnitNorms, unit_places
from lightning_gradguard.core.norms.measurement import DISAGREEMENT, OVERFLOW, Measurement
from lightning_gradguard.runtime import distributed
from lightning_gradguard.runtime.steps.parameters import Selection


@dataclass(frozen=True)
class Wanted:
    """What a step is to be measured for.

    Args:
        norm_types: Norms of every gradient; 2 is one of them.
        weights: Whether norms of the weights are wanted.
        units: Whether norms of single units are.
        loss_scale: What gradients still carry, and is taken off their norms.
    """

    norm_types: Sequence[float]
    weights: bool
    units: bool
    loss_scale: float


@dataclass
class Measured:
    """One step's numbers on the device, the same on every rank.

    Args:
        tensors: The gradients, before anybody wrote.
        tensor_norms: Norm of each gradient by norm type.
        total_norm: L2 norm of all of them together.
        units: What `Gradients.unit_norms` returns, if it was wanted and had to be added up.
        weight_norms: L2 norm of each weight, if it was wanted.
        numbers: What judges go by, on its way to the host.
        carried: What rode along, added up; `None` if nothing did.
    """

    tensors: tuple[Tensor, ...]
    tensor_norms: Mapping[float, Tensor]
    total_norm: Tensor
    units: tuple[UnitNorms, ...] | None
    weight_norms: Tensor | None
    numbers: Numbers
    carried: Tensor | None


class Numbers:
    """What the judges of a step go by, between the device and the host.

    Args:
        packed: Sum of the finite losses, their number, that of others (of an only loss: itself, 1 and 0, even
            if it is nonfinite); flags of nonfinite weights, buffers, and of a batch that was lost before; how
            much gradient weight matrices get; total norms.
    """

    def __init__(self, packed: Tensor) -> None:
        self._packed = self._numbers = packed
        self._there: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._numbers = torch.empty_like(packed, device="cpu", pin_memory=True)
            self._numbers.copy_(packed, non_blocking=True)
            self._there = torch.cuda.current_stream(packed.device).record_event()

    def mean_loss(self) -> Tensor:
        """Mean of the finite losses, on the device; nonfinite without one."""
        return self._packed[0] / self._packed[1]

    def sick(self) -> Tensor:
        """1 where `Measurement.must_skip` will be true, else 0; shape `()`, float32, on the device."""
        totals = self._packed[7:]
        is_well = (self._packed.abs() <= _bounds(len(totals), self._packed.device)).all()
        if len(totals) > 1:
            lowest, highest = torch.aminmax(totals)
            is_well &= highest <= DISAGREEMENT * lowest
        return (~is_well).float()

    def read(self, optimizer_index: int) -> Measurement:
        """Wait for the numbers: the step's one host synchronization."""
        if self._there is not None:
            self._there.synchronize()
        loss, finite_losses, losses, weights, buffers, lost, alive, *total_norms = self._numbers.tolist()
        if not math.isfinite(loss):
            losses, finite_losses = 1, 0
        finite = [norm for norm in total_norms if math.isfinite(norm)]
        sick = next((norm for norm in total_norms if not math.isfinite(norm)), None)
        differ = bool(finite) and (sick is not None or max(finite) > DISAGREEMENT * min(finite))
        return Measurement(
            optimizer_index=optimizer_index,
            loss=loss / finite_losses if finite_losses else math.nan,
            nonfinite_losses=int(losses),
            total_norm=max(total_norms) if sick is None else sick,
            is_collapsed=not alive and bool(finite) and max(finite) > 0,
            ranks_disagree=differ,
            nonfinite_weights=bool(weights),
            nonfinite_buffers=bool(buffers),
            was_lost=bool(lost),
        )


@cache
def _bounds(n_totals: int, device: torch.device) -> Tensor:
    """What the numbers of a step that may happen do not exceed."""
    largest = torch.finfo(torch.float64).max
    bounds = [largest, math.inf, 0, 0, 0, 0, math.inf, *[OVERFLOW] * n_totals]
    return torch.tensor(bounds, dtype=torch.float64, device=device)


@torch.no_grad()
def measure(
    selection: Selection,
    losses: Sequence[Tensor],
    flags: Sequence[Tensor | bool | None],
    *,
    wanted: Wanted,
    carried: Tensor | None = None,
) -> Measured:
    """Measure the gradients of one step, and share what was seen in at most one collective.

    Args:
        selection: The parameters to look at, the same on every rank.
        losses: Those that this rank has seen since the step before, each of shape `()`.
        flags: What else ranks tell each other; each is true on every rank if it is on one.
        wanted: What to measure.
        carried: Local sums of shape `(n,)` that ride along, on the device of the gradients.
    """
    look = _measure_shards if selection.is_cut else _measure_whole
    return look(selection, _told(losses, flags, selection), wanted, carried)


def _measure_whole(
    selection: Selection, told: list[Tensor], wanted: Wanted, carried: Tensor | None
) -> Measured:
    """Every rank has all gradients, and all of the same: they tell each other the total norm to see that."""
    tensors = selection.gradients()
    buckets = selection.buckets(tensors)
    tensor_norms = {
        p: norms.tensor_norms(tensors, p, buckets).to(selection.device) for p in wanted.norm_types
    }
    if wanted.loss_scale != 1:
        tensor_norms = {p: values / wanted.loss_scale for p, values in tensor_norms.items()}
    total_norm = norms.total_norm_from_norms(tensor_norms[2.0])
    told.append(torch.dot(tensor_norms[2.0], selection.matrices))
    if (world_size := distributed.world_size()) == 1:
        packed = torch.stack([*told, total_norm])
    else:
        total_norms = total_norm.new_zeros(world_size)
        total_norms[distributed.rank()] = total_norm
        parts = {"head": torch.stack(told), "total_norms": total_norms}
        seen = distributed.reduce_together(parts if carried is None else {**parts, "carried": carried}, {})
        packed, carried = torch.cat([seen["head"], seen["total_norms"]]), seen.get("carried")
    weights = selection.parameters
    return Measured(
        tensors=tensors,
        tensor_norms=tensor_norms,
        total_norm=total_norm,
        units=None,
        weight_norms=norms.tensor_norms(weights, 2.0, selection.buckets(weights)) if wanted.weights else None,
        numbers=Numbers(packed),
        carried=carried,
    )


def _measure_shards(
    selection: Selection, told: list[Tensor], wanted: Wanted, carried: Tensor | None
) -> Measured:
    """Ranks have different parts of the gradients: sums over local shards add up to those over all."""
    parameters, device, scale, shares = (
        selection.parameters,
        selection.device,
        wanted.loss_scale,
        selection.shares,
    )
    tensors = selection.gradients()
    sums: dict[float | str, Tensor] = {}
    for p in wanted.norm_types:
        sums[p] = norms.power_sums(tensors, p).to(device) / (scale if p == math.inf else scale**p)
    told.append(torch.dot(sums[2.0], selection.matrices))
    if wanted.weights:
        sums["weights"] = norms.power_sums(parameters).to(device)
    largest: dict[float | str, Tensor] = {p: sums.pop(p) for p in wanted.norm_types if p == math.inf}
    parts: dict[float | str, Tensor] = {key: values * shares for key, values in sums.items()}
    parts["head"] = torch.stack(told)
    if carried is not None:
        parts["carried"] = carried
    if wanted.units:
        parts["units"] = _unit_sums(tensors, parameters, shares, scale)
    seen = distributed.reduce_together(parts, largest)
    tensor_norms = {p: norms.norms_from_power_sums(seen[p], p) for p in wanted.norm_types}
    total_norm = norms.total_norm_from_norms(tensor_norms[2.0])
    return Measured(
        tensors=tensors,
        tensor_norms=tensor_norms,
        total_norm=total_norm,
        units=_unit_norms(seen["units"], parameters) if wanted.units else None,
        weight_norms=norms.norms_from_power_sums(seen["weights"]) if wanted.weights else None,
        numbers=Numbers(torch.cat([seen["head"], total_norm.view(1)])),
        carried=seen.get("carried"),
    )


def norms_over_shards(selection: Selection, *lists: Sequence[Tensor]) -> Tensor:
    """L2 norms of lists of tensors that are spread as the parameters are; one collective, if they are cut.

    Returns:
        Shape `(len(lists), n)`, float64.
    """
    sums = torch.stack([norms.power_sums(tensors) for tensors in lists])
    if selection.is_cut:
        sums = distributed.sum_over_ranks(sums * selection.shares)
    return norms.norms_from_power_sums(sums)


def _told(
    losses: Sequence[Tensor], flags: Sequence[Tensor | bool | None], selection: Selection
) -> list[Tensor]:
    """Sum of the finite losses, their number, and that of others; flags. Scalars on the device, float64."""
    zero, one = selection.zero, selection.one
    seen = [zero, zero, zero]
    if len(losses) == 1 and distributed.world_size() == 1:
        seen = [losses[0].to(zero), one, zero]  # whether it is finite is seen by whoever reads it
    elif losses:
        loss = torch.stack(tuple(losses)).to(zero)
        plain = loss.nan_to_num(0.0, 0.0, 0.0)
        seen = [values.to(zero).sum() for values in (plain, plain == loss, plain != loss)]
    return [*seen, *(flag.to(zero) if isinstance(flag, Tensor) else one if flag else zero for flag in flags)]


def _unit_sums(
    tensors: Sequence[Tensor], parameters: Sequence[nn.Parameter], shares: Tensor, loss_scale: float
) -> Tensor:
    """Squares by unit, of all gradients and then of all weights, one after the other."""
    gradients = [norms.unit_power_sums(t) * s / loss_scale**2 for t, s in zip(tensors, shares, strict=True)]
    weights = [norms.unit_power_sums(p.detach()) * s for p, s in zip(parameters, shares, strict=True)]
    return torch.cat([*gradients, *weights])


def _unit_norms(sums: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[UnitNorms, ...]:
    """The norms, from those squares."""
    places = [unit_places(parameter)[0] for parameter in parameters]
    units = [
        part.sqrt().view(-1, *(1,) * (parameter.ndim - 1)) if parameter.ndim > 1 else part.sqrt().view(())
        for part, parameter in zip(torch.split(sums, places * 2), [*parameters, *parameters], strict=True)
    ]
    n = len(parameters)
    return tuple(zip(units[:n], units[n:], strict=True))
