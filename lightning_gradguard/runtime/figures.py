"""Pictures of gradients."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a heat map; beyond them they are narrower than a pixel where TensorBoard shows it.
COLUMNS = 200


class GradientHistory:
    """Norms by layer over the last logged steps, as a heat map."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=COLUMNS)
        self._columns: deque[Mapping[str, float]] = deque(maxlen=COLUMNS)

    def append(self, step: int, norms: Mapping[str, float]) -> None:
        """Remember a logged step.

        Args:
            step: Its number.
            norms: Norm by name, first layer first.
        """
        self._steps.append(step)
        self._columns.append(norms)

    def draw(self) -> Figure:
        """The heat map: a row for each layer, a column for each logged step, nonfinite cells in red."""
        from matplotlib.figure import Figure

        names = list(self._columns[-1])
        rows = [[_decades(column.get(name, math.nan)) for column in self._columns] for name in names]
        figure = Figure(figsize=(8, min(2 + 0.35 * len(names), 20)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("red")
        image = axes.imshow(
            rows,
            aspect="auto",
            interpolation="nearest",
            extent=(self._steps[0], self._steps[-1] + 1, len(names) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(names)), [name.strip("/") for name in names])
        axes.set_xlabel("step")
        axes.set_title("log10 of gradient norms")
        figure.colorbar(image)
        return figure


def _decades(norm: float) -> float:
    if not math.isfinite(norm):
        return math.nan
    return math.log10(max(norm, 1e-30))
