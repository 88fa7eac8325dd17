"""Groups tensors so that the number of operations does not grow with the number of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements whose squares are summed in float32 on a CPU before float64 takes over: one float32 sum over
#: 1e7 elements is off by 4e-4, sums of this length combined in float64 by less than 1e-6.
CHUNK = 65_536
#: A CPU stacks tensors of one shape to measure them together: up to this size, and if there are this many.
MAX_STACKED_NUMEL = 4_096
MIN_STACKED = 8


@dataclass(frozen=True)
class _Bucket:
    """Tensors of one device and dtype, which are measured together, and the dtype to sum in.

    All are measured as a whole if it `takes_all`.
    """

    wide: torch.dtype | None
    takes_all: bool
    whole: list[int]
    by_rows: list[int]
    stacked: list[list[int]]

    def norms(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Returns the norms of tensors measured as a whole, then of the rows of the others."""
        # only the kernels of the two usual norms are accurate in float32
        wide = self.wide if norm_type in (2.0, math.inf) else torch.float64
        parts = list(tensors) if self.takes_all else [tensors[index] for index in self.whole]
        if norm_type == math.inf:
            others = (index for group in (self.by_rows, *self.stacked) for index in group)
            return largest_magnitudes([*parts, *(tensors[index] for index in others)])
        rows = []
        for group in self.stacked:
            stack = torch.stack([tensors[index] for index in group])
            rows.append(torch.linalg.vector_norm(stack.view(len(group), -1), norm_type, dim=1, dtype=wide))
        for index in self.by_rows:
            flat = _flat(tensors[index])
            end = len(flat) // CHUNK * CHUNK
            rows.append(torch.linalg.vector_norm(flat[:end].view(-1, CHUNK), norm_type, dim=1, dtype=wide))
            if end < len(flat):
                parts.append(flat[end:])
        if parts:
            whole = torch.stack(torch._foreach_norm(parts, norm_type, dtype=wide))
            if not rows:
                return whole
            rows.insert(0, whole)
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def owners(self, numels: Sequence[int], norm_type: float) -> list[int]:
        """Returns for each norm the position of the tensor that it is a part of."""
        stacked = [index for group in self.stacked for index in group]
        if norm_type == math.inf:
            return [*self.whole, *self.by_rows, *stacked]
        rests = [index for index in self.by_rows if numels[index] % CHUNK]
        rows = [index for index in self.by_rows for _ in range(numels[index] // CHUNK)]
        return [*self.whole, *rests, *stacked, *rows]


class Buckets:
    """Groups of tensors that one kernel measures, determined once for all lists like these.

    A CPU measures a large tensor by rows of `CHUNK` elements, one operation for each such tensor: this takes
    three quarters of the time of `torch._foreach_norm`, and float32 is exact enough. Small tensors of one
    shape are stacked first, which takes a tenth of the time.

    Args:
        tensors: Dense and real; later lists have the same sizes, devices and dtypes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._numels = [tensor.numel() for tensor in tensors]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(tensors):
            if tensor.numel():
                groups.setdefault((tensor.device, tensor.dtype), []).append(index)
        self._buckets = []
        for (device, dtype), indices in groups.items():
            on_host = device.type == "cpu"
            stacked, others = _stackable(tensors, indices) if on_host else ([], indices)
            by_size: tuple[list[int], list[int]] = ([], [])
            for index in others:
                by_size[on_host and tensors[index].numel() > CHUNK].append(index)
            takes_all = by_size[0] == list(range(len(tensors)))
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
            self._buckets.append(_Bucket(wide, takes_all, *by_size, stacked))
        self._owners: dict[bool, Tensor | None] = {}

    def norms(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Returns the norm of each tensor; see `tensor_norms`."""
        norms = self._norms(tensors, norm_type)
        sums = self._sums(norms, norm_type)
        return norms if sums is None else norms_from_power_sums(sums, norm_type)

    def norms_and(self, tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
        """Returns the L2 norm of each tensor, and then other numbers, each of shape `()`, in one tensor."""
        bucket = self._buckets[0]
        if bucket.takes_all:
            return torch.stack([*torch._foreach_norm(list(tensors), 2.0, dtype=bucket.wide), *numbers])
        return torch.cat([self.norms(tensors, 2.0), *[number.reshape(1) for number in numbers]])

    def power_sums(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Returns the power sum of each tensor; see the function `power_sums`."""
        norms = self._norms(tensors, norm_type)
        sums = self._sums(norms, norm_type)
        return _powers(norms, norm_type) if sums is None else sums

    def _norms(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        device = tensors[0].device
        if len(self._buckets) == 1:
            return self._buckets[0].norms(tensors, norm_type).to(device, torch.float64)
        parts = [bucket.norms(tensors, norm_type).to(device, torch.float64) for bucket in self._buckets]
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *parts])

    def _sums(self, norms: Tensor, norm_type: float) -> Tensor | None:
        """Returns the power sums of tensors with several norms; `None` if each has one, in order."""
        is_inf = norm_type == math.inf
        if is_inf not in self._owners:
            owners = [i for bucket in self._buckets for i in bucket.owners(self._numels, norm_type)]
            in_place = owners == list(range(len(self._numels)))
            self._owners[is_inf] = None if in_place else torch.tensor(owners, device=norms.device)
        if (places := self._owners[is_inf]) is None:
            return None
        return norms.new_zeros(len(self._numels)).index_add_(0, places, _powers(norms, norm_type))


def _stackable(tensors: Sequence[Tensor], indices: Iterable[int]) -> tuple[list[list[int]], list[int]]:
    """Returns positions of small tensors, grouped by a common shape, and positions of all others."""
    shapes: dict[torch.Size, list[int]] = {}
    others: list[int] = []
    for index in indices:
        is_small = tensors[index].numel() <= MAX_STACKED_NUMEL
        (shapes.setdefault(tensors[index].shape, []) if is_small else others).append(index)
    few = [index for group in shapes.values() if len(group) < MIN_STACKED for index in group]
    return [group for group in shapes.values() if len(group) >= MIN_STACKED], others + few


def _powers(norms: Tensor, norm_type: float) -> Tensor:
    if norm_type == 2:
        return norms.square()
    return norms if norm_type == math.inf else norms**norm_type


def _flat(tensor: Tensor) -> Tensor:
    """Returns all elements in one row, in any order, which does not change a norm."""
    if not tensor.is_contiguous():
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim])).contiguous()
    return tensor.view(-1)


def stack_small(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the same elements in fewer tensors on a CPU, where reading all of them becomes faster.

    The tensors are dense, and of one device and dtype.

    Example:
        >>> [tensor.shape for tensor in stack_small([torch.ones(2)] * 9 + [torch.ones(3)])]
        [torch.Size([9, 2]), torch.Size([3])]
    """
    if len(tensors) < MIN_STACKED or tensors[0].device.type != "cpu":
        return tensors
    groups, others = _stackable(tensors, range(len(tensors)))
    stacks = [torch.stack([tensors[index] for index in group]) for group in groups]
    return [*stacks, *[tensors[index] for index in others]]


def largest_magnitudes(tensors: list[Tensor]) -> Tensor:
    """Returns the largest `|x|` of each tensor, shape `(n,)`; NaN if there is one.

    The tensors are dense, real and not empty, and of one device and dtype.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, math.inf))
    # ten times as fast on a CPU, at one operation for each tensor
    lowest, highest = zip(*[torch.aminmax(tensor) for tensor in tensors], strict=True)
    return torch.maximum(torch.stack(highest), -torch.stack(lowest))


def norms_from_power_sums(sums: Tensor, norm_type: float = 2.0) -> Tensor:
    """Returns norms from the results of `power_sums`, summed over shards."""
    if norm_type == 2:
        return sums.sqrt()
    return sums if norm_type == math.inf else sums.pow(1 / norm_type)
