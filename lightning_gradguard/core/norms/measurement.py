"""The numbers of a step, on the device and on the host, and the bounds beyond which it is skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.core.incidents import IncidentKind

#: Largest total norm of a step that is not skipped: the largest number of float32.
OVERFLOW = torch.finfo(torch.float32).max
#: Ranks disagree if the largest total norm, or learning rate, of any of them is this many times the smallest.
DISAGREEMENT = 1000.0


@dataclass(slots=True)
class Measurement:
    """Numbers of one step on the host, the same on every rank.

    Args:
        optimizer_index: Index of the Trainer's optimizer that is about to step.
        loss: Mean over ranks and over the accumulation window; NaN if none was seen.
        nonfinite_losses: Number of nonfinite losses among them.
        total_norm: L2 norm of all gradients of the optimizer before clipping; nonfinite if any gradient is,
            on any rank.
        is_collapsed: True if no weight of two dimensions or more has a nonzero gradient while another
            parameter has.
        ranks_disagree: True if gradients that ranks have averaged are nonfinite, or a thousand times larger,
            on some ranks only: they were written to after the reduction.
        rates_disagree: True if the learning rate of one rank is a thousand times that of another: after the
            step each would have weights of its own.
        nonfinite_weights: True if any rank has reported nonfinite weights since the step before.
        nonfinite_buffers: True if the forward passes of any rank left nonfinite buffers.
        repeats_lost_batch: True if any rank has a batch that the run, before it was resumed, had lost.
        rejected_by: Names of the callbacks whose `check_step` has rejected the step, although it is finite.
        weight_norm: L2 norm of all weights with a gradient, before the step; 0 if it was not measured.
    """

    optimizer_index: int
    loss: float
    nonfinite_losses: int
    total_norm: float
    is_collapsed: bool
    ranks_disagree: bool
    nonfinite_weights: bool
    nonfinite_buffers: bool
    repeats_lost_batch: bool
    rates_disagree: bool = False
    rejected_by: tuple[str, ...] = ()
    weight_norm: float = 0.0

    @property
    def is_corrupt(self) -> bool:
        """True if the step must be skipped for a reason other than the overflow of a loss scale."""
        seen = self.nonfinite_losses or self.nonfinite_weights or self.nonfinite_buffers
        return bool(seen or self.ranks_disagree or self.rates_disagree or self.repeats_lost_batch)

    @property
    def must_skip(self) -> bool:
        """True if the step must not be taken."""
        return self.is_corrupt or not self.total_norm <= OVERFLOW

    def incident_kind(self, *, has_scaler: bool = False) -> IncidentKind:
        """Returns the kind of incident that it is to skip the step.

        Args:
            has_scaler: True if a GradScaler scales gradients to the edge of overflow.
        """
        if self.repeats_lost_batch:
            return "lost_batch"
        if self.rejected_by:
            return "rejected_step"
        if self.nonfinite_weights:
            return "nonfinite_weights"
        if self.nonfinite_losses:
            return "nonfinite_loss"
        if self.nonfinite_buffers:
            return "nonfinite_buffers"
        if self.ranks_disagree:
            return "corrupted_gradient"
        if self.rates_disagree:
            return "unequal_learning_rates"
        return "amp_overflow" if has_scaler else "nonfinite_gradient"


class Head(NamedTuple):
    """The numbers of a step that are packed ahead of the total norms of the ranks.

    Args:
        loss: Sum of the finite losses; a single loss itself, even if it is nonfinite.
        finite_losses: Their number; 1 for a single loss.
        nonfinite_losses: Number of the others; 0 for a single loss.
        nonfinite_weights: The flag of `Measurement`, as a number, as the next two are.
        nonfinite_buffers: Flag.
        repeats_lost_batch: Flag.
        matrices: Gradient norms of the weight matrices, added up.
        squares: Squared norm of the weights, 0 if it was not requested.
    """

    loss: float
    finite_losses: float
    nonfinite_losses: float
    nonfinite_weights: float
    nonfinite_buffers: float
    repeats_lost_batch: float
    matrices: float
    squares: float


_N_HEAD = len(Head._fields)
_LOSS, _FINITE_LOSSES, _SQUARES = map(Head._fields.index, ("loss", "finite_losses", "squares"))


class Sent:
    """Numbers on their way to the host, which can be read without a synchronization a step later.

    Args:
        values: Of shape `(n,)`.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = self._host = values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    @property
    def is_on_host(self) -> bool:
        """True if to read the numbers takes no synchronization."""
        return self.values.device.type == "cpu"

    def read(self) -> list[float]:
        """Returns the numbers, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


class PackedMeasurement(Sent):
    """The numbers that checks of a step are based on, between the device and the host.

    Args:
        values: A `Head`, then the total norms by rank, and their learning rates if it has them; float64.
        has_rates: True if it has them.
    """

    def __init__(self, values: Tensor, has_rates: bool = False) -> None:
        super().__init__(values)
        self._by_rank = 1 + has_rates

    @property
    def head(self) -> Tensor:
        """The same as `values`."""
        return self.values

    def mean_loss(self) -> Tensor:
        """Returns the mean of the finite losses, on the device; nonfinite without one."""
        return self.head[_LOSS] / self.head[_FINITE_LOSSES]

    def weight_norm(self) -> Tensor:
        """Returns the norm of all weights, on the device; 0 if it was not requested."""
        return self.head[_SQUARES].sqrt()

    def must_skip(self) -> Tensor:
        """Returns 1 where `Measurement.must_skip` will be true, else 0; float32, shape `()`."""
        if self.is_on_host:
            return torch.tensor(float(self.measurement(0).must_skip))
        by_rank = self.head[_N_HEAD:]
        is_good = (self.head.abs() <= _bounds(len(by_rank), by_rank.device)).all()
        if len(by_rank) > self._by_rank:
            lowest, highest = torch.aminmax(by_rank.view(self._by_rank, -1), dim=1)
            is_good &= (highest <= DISAGREEMENT * lowest).all()
        return (~is_good).float()

    def measurement(self, optimizer_index: int) -> Measurement:
        """Moves the numbers to the host: the step's one host synchronization."""
        # in the order of a `Head`
        loss, finite, nonfinite, weights, buffers, repeats, matrices, squares, *by_rank = self.read()
        n = len(by_rank) // self._by_rank
        total_norms, rates = by_rank[:n], by_rank[n:]
        if not math.isfinite(loss):
            nonfinite, finite = 1, 0
        is_finite = all(map(math.isfinite, total_norms))
        if is_finite:
            total_norm = max(total_norms)
            differ = total_norm > DISAGREEMENT * min(total_norms)
        else:
            total_norm = next(norm for norm in total_norms if not math.isfinite(norm))
            differ = any(map(math.isfinite, total_norms))
        return Measurement(
            optimizer_index=optimizer_index,
            loss=loss / finite if finite else math.nan,
            nonfinite_losses=int(nonfinite),
            total_norm=total_norm,
            is_collapsed=not matrices and is_finite and total_norm > 0,
            ranks_disagree=differ,
            nonfinite_weights=bool(weights),
            nonfinite_buffers=bool(buffers),
            repeats_lost_batch=bool(repeats),
            rates_disagree=bool(rates) and max(rates) > DISAGREEMENT * min(rates),
            weight_norm=math.sqrt(squares),
        )


class OwnMeasurement(PackedMeasurement):
    """The same of one process, which sends what it has measured: the host adds it up.

    Args:
        values: Norms of the gradients, losses, nonfinite weights and nonfinite buffers if they were scanned,
            and the squared norm of the weights if it was requested.
        n_losses: Number of losses.
        is_matrix: By gradient, true for those of weight matrices.
        has: Which of the last three there are.
        repeats: True for a repeated lost batch.
        make_head: Returns a `Head` and the total norm, on the device, from the norms.
    """

    def __init__(
        self,
        values: Tensor,
        n_losses: int,
        is_matrix: Sequence[bool],
        has: tuple[bool, bool, bool],
        repeats: bool,
        make_head: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(values)
        self._n_losses, self._is_matrix = n_losses, is_matrix
        self._has, self._repeats, self._make_head = has, repeats, make_head

    def norms(self, _: object = None) -> Tensor:
        """Returns the norms of the gradients, float64."""
        return self.values[: len(self._is_matrix)].double()

    @cached_property
    def head(self) -> Tensor:
        """A `Head` and the total norm, on the device."""
        return self._make_head(self.norms())

    def read(self) -> list[float]:
        """Returns a `Head` and the total norm, once the numbers have arrived."""
        numbers, n = super().read(), len(self._is_matrix)
        norms, losses, rest = (
            numbers[:n],
            numbers[n : n + self._n_losses],
            iter(numbers[n + self._n_losses :]),
        )
        finite = losses if len(losses) == 1 else list(filter(math.isfinite, losses))
        has_weights, has_buffers, has_squares = self._has
        return [
            sum(finite),
            len(finite),
            len(losses) - len(finite),
            next(rest) if has_weights else 0.0,
            next(rest) if has_buffers else 0.0,
            self._repeats,
            any(compress(norms, self._is_matrix)),
            next(rest) if has_squares else 0.0,
            math.hypot(*norms),
        ]


@cache
def _bounds(n_totals: int, device: torch.device) -> Tensor:
    """Returns upper bounds on the packed numbers of a step that may take place."""
    bounds = dict.fromkeys(Head._fields, 0.0) | {"loss": torch.finfo(torch.float64).max}
    bounds |= dict.fromkeys(("finite_losses", "matrices", "squares"), math.inf)
    return torch.tensor([*bounds.values(), *[OVERFLOW] * n_totals], dtype=torch.float64, device=device)
