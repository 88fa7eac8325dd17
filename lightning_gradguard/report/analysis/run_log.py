"""Logged values of a run, by their meaning."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_gradguard.core.incidents import Incident

#: Steps by which an incident, a stop among them, may be recorded after the step it belongs to.
MAX_DELAY = 1


@dataclass(frozen=True)
class Series:
    """Values of one tag.

    Args:
        steps: In ascending order.
        values: One for each step; nonfinite ones are kept.

    Example:
        >>> Series([0, 10], [1.0, 2.0]).at(10)
        2.0
    """

    steps: Sequence[int] = ()
    values: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, step: int) -> float | None:
        """Returns the value logged at exactly this step."""
        place = bisect_left(self.steps, step)
        return self.values[place] if place < len(self.steps) and self.steps[place] == step else None

    def finite(self) -> list[tuple[int, float]]:
        """Returns steps and values without the nonfinite ones."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]

    def last_half(self) -> list[float]:
        """Returns the finite values of the second half."""
        return [v for v in self.values[len(self.values) // 2 :] if math.isfinite(v)]


@dataclass(frozen=True)
class GradientLog:
    """Logged values of the gradients of one optimizer.

    Args:
        total: Total norm before clipping.
        layers: Norm by parameter or module, first layer first.
        weights: Norm of the weights, by the same names.
        ratios: Norm of the update relative to the norm of the weights, by the same names.
        clipped: Total norm after clipping.
        clip_fraction: Share of steps clipped.
        clip_coefficient: Coefficient by which gradients were multiplied.
        clip_threshold: Largest norm that the policy accepted.
        nonfinite_fraction: Share of tensors with a nonfinite gradient.
        optimizer: Index of the optimizer.
    """

    total: Series = Series()
    layers: Mapping[str, Series] = field(default_factory=dict)
    weights: Mapping[str, Series] = field(default_factory=dict)
    ratios: Mapping[str, Series] = field(default_factory=dict)
    clipped: Series = Series()
    clip_fraction: Series = Series()
    clip_coefficient: Series = Series()
    clip_threshold: Series = Series()
    nonfinite_fraction: Series = Series()
    optimizer: int = 0


@dataclass(frozen=True)
class RunLog:
    """Logged values and incidents of a run.

    Args:
        loss: Training loss.
        gradients: One for each optimizer.
        skips: Number of skipped steps so far; empty if no callback skips.
        rollbacks: Number of rollbacks so far.
        backoff_scale: Factor on the learning rates.
        incidents: In the order of the file.
        largest_norm: Largest norm of all measured steps, logged or not; `None` if it was not logged.
        clipped_fraction: Share of all steps that the suite has clipped, likewise.
        clip_coefficient: Geometric mean of the coefficients of these, likewise.
        over_constant: The last loss over that of the best constant answer, if it is known to be no better.
        was_checked: True if the initialization was checked.
    """

    loss: Series = Series()
    gradients: Sequence[GradientLog] = ()
    skips: Series = Series()
    rollbacks: Series = Series()
    backoff_scale: Series = Series()
    incidents: Sequence[Incident] = ()
    largest_norm: float | None = None
    clipped_fraction: float | None = None
    clip_coefficient: float | None = None
    over_constant: float | None = None
    was_checked: bool = False
