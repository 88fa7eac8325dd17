"""What a run logged, by what it means."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Series:
    """One number over the steps at which it was logged.

    Args:
        steps: In ascending order.
        values: One each; nonfinite ones as they are.

    Example:
        >>> Series([0, 10], [1.0, 2.0]).at(10)
        2.0
    """

    steps: Sequence[int] = ()
    values: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, step: int) -> float | None:
        """The value logged at this very step."""
        place = bisect_left(self.steps, step)
        return self.values[place] if place < len(self.steps) and self.steps[place] == step else None

    def finite(self) -> list[tuple[int, float]]:
        """Steps and values without the nonfinite ones."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]

    def last_half(self) -> list[float]:
        """The finite values of the second half."""
        return [v for v in self.values[len(self.values) // 2 :] if math.isfinite(v)]


@dataclass(frozen=True)
class GradientLog:
    """What was logged of the gradients of one optimizer.

    Args:
        total: Norm of all of them together, before clipping.
        layers: Norm by parameter or module, first layer first.
        weights: Norm of the weights, by the same names.
        ratios: How far a step moved them, relative to that norm.
        clipped: Total norm after clipping.
        clip_fraction: Share of steps clipped.
        clip_coefficient: What gradients were multiplied by.
        clip_threshold: What the policy allowed.
        nonfinite_fraction: Share of tensors with a nonfinite gradient.
        optimizer: Its index.
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
class RecordedIncident:
    """An incident, as the file of a run has it; see `Incident` for what its fields mean."""

    kind: str
    step: int
    where: tuple[str, ...] = ()
    value: float | None = None
    action: str = "none"
    advice: str = ""
    cause: str = ""
    detail: str = ""
    dossier: str = ""


@dataclass(frozen=True)
class RunLog:
    """What a run logged.

    Args:
        loss: Of training.
        gradients: Of each optimizer.
        skips: Steps skipped so far; empty if nobody skipped.
        rollbacks: Times gone back so far.
        backoff_scale: What learning rates were multiplied by.
        incidents: In the order of the file.
        largest_norm: Of all steps that were looked at, logged or not; `None` if the run does not tell.
    """

    loss: Series = Series()
    gradients: Sequence[GradientLog] = ()
    skips: Series = Series()
    rollbacks: Series = Series()
    backoff_scale: Series = Series()
    incidents: Sequence[RecordedIncident] = ()
    largest_norm: float | None = None
