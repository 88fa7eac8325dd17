"""What is measured of one optimizer step, and the one collective in which ranks share it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradguard.core import norms
from lightning_gradguard.core.norms import Gradients, UnitNorms
from lightning_gradguard.core.sharding import FlatShard, is_sharded, share, unit_places
from lightning_gradguard.runtime import distributed

#: Times by which the largest total norm on any rank exceeds the smallest, where ranks disagree.
DISAGREEMENT = 1000.0


@dataclass(frozen=True)
class Measurement:
    """One step's numbers on the host, the same on every rank; what a judge may look at.

    Args:
        optimizer_index: Which of the Trainer's optimizers is about to step.
        loss: Mean over ranks and over the accumulation window; NaN if none was seen.
        nonfinite_losses: How many of those losses were nonfinite.
        total_norm: L2 norm of all gradients of the optimizer, before anything is clipped; nonfinite if any
            of them is, on any rank.
        is_dead: Whether no weight of two dimensions or more gets a gradient, while something else does.
        ranks_disagree: Whether gradients that ranks have averaged are nonfinite, or a thousand times larger,
            on some of them only: since then, something has written to them.
        nonfinite_weights: Whether any rank reported nonfinite weights since the step before.
        nonfinite_buffers: Whether the forward passes of any rank left nonfinite buffers.
        lost_before: Whether any rank was served a batch that this run, before it was resumed, had lost.
    """

    optimizer_index: int
    loss: float
    nonfinite_losses: int
    total_norm: float
    is_dead: bool
    ranks_disagree: bool
    nonfinite_weights: bool
    nonfinite_buffers: bool
    lost_before: bool


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


@dataclass(frozen=True)
class Measured:
    """One step's numbers on the device, the same on every rank.

    Args:
        gradients: The gradients, before anybody wrote.
        tensor_norms: Norm of each gradient by norm type.
        weight_norms: L2 norm of each weight, if it was wanted.
        mean_loss: Mean of the finite losses; NaN without one.
        numbers: On their way to the host.
        carried: What rode along, added up.
    """

    gradients: Gradients
    tensor_norms: Mapping[float, Tensor]
    weight_norms: Tensor | None
    mean_loss: Tensor
    numbers: Numbers
    carried: Tensor


class Numbers:
    """What the judges of a step go by, between the device and the host."""

    def __init__(self, head: Tensor, mean_loss: Tensor, total_norms: Tensor) -> None:
        packed = torch.cat([head, mean_loss.view(1), total_norms])
        self._there: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._numbers = torch.empty_like(packed, device="cpu", pin_memory=True)
            self._numbers.copy_(packed, non_blocking=True)
            self._there = torch.cuda.current_stream(packed.device).record_event()
        else:
            self._numbers = packed

    def read(self, optimizer_index: int) -> Measurement:
        """Wait for the numbers: the step's one host synchronization."""
        if self._there is not None:
            self._there.synchronize()
        _, _, losses, weights, buffers, lost, alive, loss, *total_norms = self._numbers.tolist()
        finite = [norm for norm in total_norms if math.isfinite(norm)]
        sick = next((norm for norm in total_norms if not math.isfinite(norm)), None)
        differ = bool(finite) and (sick is not None or max(finite) > DISAGREEMENT * min(finite))
        return Measurement(
            optimizer_index=optimizer_index,
            loss=loss,
            nonfinite_losses=int(losses),
            total_norm=max(total_norms) if sick is None else sick,
            is_dead=not alive and bool(finite) and max(finite) > 0,
            ranks_disagree=differ,
            nonfinite_weights=bool(weights),
            nonfinite_buffers=bool(buffers),
            lost_before=bool(lost),
        )


class Layout:
    """What is known of parameters without a look at their values; kept from step to step.

    Args:
        flat: The parameters that FSDP1 flattened and cut.
    """

    def __init__(self, flat: Mapping[Tensor, FlatShard]) -> None:
        self.flat = flat
        self._shares: dict[tuple[Tensor, ...], Tensor] = {}
        self._matrices: dict[tuple[bool, ...], Tensor] = {}

    def measured(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
        """Those that have a gradient on any rank; the piece that this one has may be empty."""
        named = list(named)
        here = {name for name, _ in norms.with_gradient(named)}
        return [(n, p) for n, p in named if n in here or (p in self.flat and p.requires_grad)]

    def is_cut(self, parameters: Iterable[Tensor]) -> bool:
        """Whether ranks hold different parts of any of the parameters."""
        return any(parameter in self.flat or is_sharded([parameter]) for parameter in parameters)

    def is_matrix(self, parameter: Tensor) -> bool:
        """Whether a parameter has two dimensions or more."""
        shape: FlatShard | Tensor = self.flat.get(parameter, parameter)
        return shape.ndim > 1

    def matrices(self, parameters: Sequence[Tensor], device: torch.device) -> Tensor:
        """Whether each of them has, shape `(n,)`."""
        key = tuple(map(self.is_matrix, parameters))
        if key not in self._matrices:
            self._matrices[key] = torch.tensor(key, dtype=torch.bool, device=device)
        return self._matrices[key]

    def shares(self, parameters: Sequence[Tensor], device: torch.device) -> Tensor:
        """What the sum over each local shard is multiplied by before ranks add up, shape `(n,)`."""
        key = tuple(parameters)
        if key not in self._shares:
            ranks = distributed.world_size()
            shares = [self.flat[p].pieces / ranks if p in self.flat else share(p, ranks) for p in parameters]
            self._shares[key] = torch.tensor(shares, dtype=torch.float64, device=device)
        return self._shares[key]


def measure(
    named: Sequence[tuple[str, nn.Parameter]],
    losses: Sequence[Tensor],
    flags: Sequence[Tensor | bool | None],
    *,
    wanted: Wanted,
    layout: Layout,
    carried: Tensor,
) -> Measured:
    """Measure the gradients of one step, and share what was seen in at most one collective.

    Args:
        named: The parameters to look at, the same on every rank.
        losses: Those that this rank has seen since the step before, each of shape `()`.
        flags: What else ranks tell each other; each is true on every rank if it is on one.
        wanted: What to measure.
        layout: How the parameters are spread.
        carried: Local sums of shape `(n,)` that ride along, on the device of the gradients.
    """
    parameters = [parameter for _, parameter in named]
    tensors = [gradient_of(parameter) for parameter in parameters]
    device, scale = carried.device, wanted.loss_scale
    sums: dict[float | str, Tensor] = {
        p: norms.power_sums(tensors, p).to(device) / (scale if p == math.inf else scale**p)
        for p in wanted.norm_types
    }
    is_alive = ((sums[2.0] != 0) & layout.matrices(parameters, device)).any()
    head = _head(losses, (*flags, is_alive), device)
    if wanted.weights:
        sums["weights"] = norms.power_sums([p.detach() for p in parameters]).to(device)
    parts: dict[float | str, Tensor] = {"head": head, "carried": carried}
    if layout.is_cut(parameters):
        largest: dict[float | str, Tensor] = {p: sums.pop(p) for p in wanted.norm_types if p == math.inf}
        shares = layout.shares(parameters, device)
        parts |= {key: values * shares for key, values in sums.items()}
        if wanted.units:
            parts["units"] = _unit_sums(tensors, parameters, shares, scale)
        seen = distributed.reduce_together(parts, largest)
    else:
        own_total = norms.total_norm_from_norms(norms.norms_from_power_sums(sums[2.0]))
        parts["total_norms"] = head.new_zeros(distributed.world_size())
        parts["total_norms"][distributed.rank()] = own_total
        seen = {**sums, **distributed.reduce_together(parts, {})}
    tensor_norms = {p: norms.norms_from_power_sums(seen[p], p) for p in wanted.norm_types}
    total_norm = norms.total_norm_from_norms(tensor_norms[2.0])
    gradients = Gradients(
        names=tuple(name for name, _ in named),
        parameters=tuple(parameters),
        tensors=tuple(tensors),
        norms=tensor_norms[2.0],
        total_norm=total_norm,
        units=_unit_norms(seen["units"], parameters) if "units" in seen else None,
    )
    mean_loss = seen["head"][0] / seen["head"][1]
    return Measured(
        gradients=gradients,
        tensor_norms=tensor_norms,
        weight_norms=norms.norms_from_power_sums(seen["weights"]) if wanted.weights else None,
        mean_loss=mean_loss,
        numbers=Numbers(seen["head"], mean_loss, seen.get("total_norms", total_norm.view(1))),
        carried=seen["carried"],
    )


def norms_over_shards(tensors: Sequence[Tensor], parameters: Sequence[Tensor], layout: Layout) -> Tensor:
    """L2 norm of tensors that are spread as these parameters are; a collective, if they are cut."""
    sums = norms.power_sums(tensors)
    if layout.is_cut(parameters):
        sums = distributed.sum_over_ranks(sums * layout.shares(parameters, sums.device))
    return norms.norms_from_power_sums(sums)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """What to measure; nothing where the piece that this rank holds of a parameter is empty."""
    return parameter.grad if parameter.grad is not None else parameter.detach().new_zeros(0)


def _head(losses: Sequence[Tensor], flags: Sequence[Tensor | bool | None], device: torch.device) -> Tensor:
    """Finite losses, their number, and that of others; flags."""
    head = torch.zeros(3 + len(flags), dtype=torch.float64, device=device)
    if losses:
        loss = torch.stack([loss.double() for loss in losses]).to(device)
        finite = torch.isfinite(loss)
        head[:3] = torch.stack([torch.where(finite, loss, 0.0).sum(), finite.sum(), (~finite).sum()])
    for place, flag in enumerate(flags, 3):
        if isinstance(flag, Tensor) or flag:
            head[place] = flag
    return head


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
