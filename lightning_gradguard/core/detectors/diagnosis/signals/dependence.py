"""The dependence of targets on inputs, by the data alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis.signals.scalars import MIN_ROWS, has_rows, is_measurable

#: Rows of a batch, of all batches, and columns that are kept.
MAX_ROWS, MAX_ALL, MAX_COLUMNS = 64, 512, 256


class TargetDependence:
    """Keeps some rows of the batches, and measures by how much targets depend on inputs.

    Attributes:
        is_wanted: True if it is to be measured, and not kept alone.

    Example:
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> TargetDependence().add([x], x[:, 0] > 0)[0] > 5
        tensor(True)
        >>> TargetDependence().add([x], x[:, 0].roll(1) > 0)[0] > 1
        tensor(False)
    """

    def __init__(self) -> None:
        self.is_wanted = True
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Sequence[Tensor], target: Tensor | None) -> Tensor:
        """Adds a batch; returns by how many standard deviations targets depend, and of how many rows.

        The shape is `(2,)`. The first is the correlation of distances between rows, without bias (Székely and
        Rizzo, 2013); NaN for other inputs than a table or images, as sequences, of which one place may be all
        that counts, for few rows, and for rows that are the same. A row that comes again with its target, as
        in another epoch, counts once.
        """
        if sum(len(target) for _, target in self._kept) < MAX_ALL and _is_fitting(inputs, target):
            assert target is not None
            kept = _some(inputs[0]), _some(target)
            if any(a.shape[1:] != b.shape[1:] for a, b in zip(kept, (self._kept or [kept])[0], strict=True)):
                self._kept = []
            self._kept.append(kept)
        if not (self._kept and self.is_wanted):
            return torch.full((2,), torch.nan)
        a, b = (_distances(torch.cat(parts)) for parts in zip(*self._kept, strict=True))
        is_new = (~(a == 0).tril(-1).any(1)).to(a)
        n = is_new.sum()
        a, b = _centered(a, is_new), _centered(b, is_new)
        found = (n * (n - 3) / 2).sqrt() * (a * b).sum() / (a.norm() * b.norm())
        return torch.stack([found, n])


def _is_fitting(inputs: Sequence[Tensor], target: Tensor | None) -> bool:
    if target is None or len(inputs) != 1 or inputs[0].ndim not in (2, 4) or len(target) < MIN_ROWS:
        return False
    is_dense = has_rows(inputs[0]) and has_rows(target) and is_measurable(inputs[0])
    return is_dense and (is_measurable(target) or target.numel() == len(target))


def _some(tensor: Tensor) -> Tensor:
    rows = tensor[:MAX_ROWS].detach().reshape(min(len(tensor), MAX_ROWS), -1)
    return rows[:, :: -(-rows.shape[1] // MAX_COLUMNS)].clone()


def _distances(rows: Tensor) -> Tensor:
    """Returns distances between rows of standardized columns, or if labels differ."""
    if not rows.is_floating_point():
        return (rows != rows.T).float()  # labels are one column
    rows, least = rows.float(), torch.finfo(torch.float32)
    scale = rows.std(0).clamp(min=least.eps * rows.abs().max().clamp(min=least.tiny / least.eps))
    rows = (rows - rows.mean(0)) / scale
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _centered(distances: Tensor, is_new: Tensor) -> Tensor:
    """Returns the distances between new rows, less their means; 0 for others, and from a row to itself."""
    pairs, n = is_new * is_new[:, None], is_new.sum()
    distances = distances * pairs
    means = distances.sum(0) / (n - 2)
    centered = distances - means - means[:, None] + distances.sum() / ((n - 1) * (n - 2))
    return (centered * pairs).fill_diagonal_(0)
