"""Numbers of a sampled step, on the device until one transfer moves all of them to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.core.norms import local_shard

#: Numbers of an answer from which on it has a direction: of fewer, a loss may leave the offset open.
MIN_COLUMNS = 8
#: Rows of a batch below which all may be the same by chance.
MIN_ROWS = 8


class DeviceScalars:
    """Collects scalars on the device; a number that was not measured has index `None` and reads as NaN.

    Example:
        >>> scalars = DeviceScalars()
        >>> index = scalars.add(torch.tensor(3.0))
        >>> scalars.read(scalars.stacked(torch.device("cpu")).tolist())
        >>> scalars[index], scalars[None]
        (3.0, nan)
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._factors: list[float] = []
        self._last: Tensor | None = None
        self._host: Sequence[float] = ()

    def add(self, value: Tensor, factor: float = 1.0) -> int:
        """Adds a scalar of any dtype, to be multiplied on the host; returns its index."""
        value = value.detach()
        value = value.reshape(()) if value.ndim else value
        self._values.append(value if value.dtype == torch.float32 else value.float())
        self._factors.append(factor)
        return len(self._values) - 1

    def add_rms(self, tensor: Tensor) -> int:
        """Adds the root mean square of a tensor, or of this rank's shard of it; returns its index."""
        local = local_shard(tensor.detach())
        local = local.abs() if local.is_complex() else local
        norm = torch.linalg.vector_norm(local, dtype=accumulated_in(local))
        return self.add(norm, max(local.numel(), 1) ** -0.5)

    def largest_so_far(self, indices: Sequence[int]) -> Tensor:
        """Returns for each of some numbers the largest of it and those before, shape `(n,)`."""
        chosen = torch.stack([self._values[i] for i in indices])
        factors = torch.tensor([self._factors[i] for i in indices], device=chosen.device)
        return (chosen * factors).cummax(0).values

    def add_last(self, values: Tensor) -> int:
        """Adds numbers of shape `(n,)` after all others; returns the index of the first."""
        self._last = values.float()
        return len(self._values)

    def stacked(self, device: torch.device) -> Tensor:
        """Returns all numbers, shape `(n,)`, and releases them."""
        values, self._values = self._values, []
        last, self._last = self._last, None
        parts = [torch.stack([value.to(device) for value in values])] if values else []
        parts += [] if last is None else [last.to(device)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.zeros(0, device=device)

    def read(self, host: Sequence[float]) -> None:
        """Takes the numbers from the host."""
        self._host = host

    def __getitem__(self, index: int | None) -> float:
        if index is None or index >= len(self._host):
            return math.nan
        return self._host[index] * (self._factors[index] if index < len(self._factors) else 1.0)


def is_measurable(value: object) -> bool:
    """True for a plain dense floating-point tensor that holds numbers, outside of `torch.func`."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and not value.is_nested
        and value.numel() > 0
        and value.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def accumulated_in(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which a norm of a tensor is computed: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def column_scales(table: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns the largest rms of a column of a table, the median one, and the index of the largest.

    Inputs of another shape than `(n, columns)` have none.
    """
    if table.ndim != 2 or table.shape[1] < 2:
        return None
    columns = table.detach().float().square().mean(0).sqrt()
    return columns.max(), columns.median(), columns.argmax()


def spread_over_rows(tensor: Tensor) -> Tensor:
    """Returns how far normalized rows are from their mean, over the root mean square: 0 for one direction.

    Example:
        >>> spread_over_rows(torch.tensor([[2.0, 1.0], [4.0, 2.0]])).item()
        0.0
    """
    rows = torch.nn.functional.normalize(tensor.detach().float().flatten(1))
    size = torch.linalg.vector_norm(rows).clamp(min=torch.finfo(torch.float32).tiny)
    spread: Tensor = torch.linalg.vector_norm(rows - rows.mean(0)) / size
    return spread


def is_constant(inputs: Sequence[Tensor], target: Tensor | None) -> Tensor:
    """Returns 1 if all rows of all inputs are the same, and those of the target differ, else 0; shape `(1,)`.

    Example:
        >>> is_constant([torch.zeros(8, 3)], torch.arange(8)), is_constant([torch.eye(8)], torch.arange(8))
        (tensor([1.]), tensor([0.]))
    """
    if target is None or not inputs or len(target) < MIN_ROWS or not all(map(has_rows, [*inputs, target])):
        return torch.zeros(1)
    alike = torch.stack([(tensor == tensor[:1]).all() for tensor in inputs]).all()
    return (alike & (target != target[:1]).any()).float().reshape(1)


def has_rows(tensor: Tensor) -> bool:
    """True for a dense tensor that is no nested one."""
    return tensor.layout is torch.strided and not tensor.is_nested
