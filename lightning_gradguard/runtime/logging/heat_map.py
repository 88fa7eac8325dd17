"""Pictures of gradients."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a heat map; beyond them they are narrower than a pixel where TensorBoard shows it.
COLUMNS = 200
#: Rows that have room for a name each.
ROWS = 16
#: Characters of a name that leave room for the map.
LETTERS = 18


class GradientHistory:
    """Norms by layer over the last logged steps, as a heat map."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=COLUMNS)
        self._columns: deque[Mapping[str, float]] = deque(maxlen=COLUMNS)

    def __len__(self) -> int:
        """Logged steps remembered."""
        return len(self._steps)

    @property
    def last_step(self) -> int:
        """The last of them; -1 for none."""
        return self._steps[-1] if self._steps else -1

    def append(self, step: int, norms: Mapping[str, float]) -> None:
        """Remember a logged step.

        Args:
            step: Its number.
            norms: Norm by name, first layer first.
        """
        self._steps.append(step)
        self._columns.append(norms)

    def draw(self) -> Figure:
        """The heat map: a row for each layer, a column for each logged step.

        Nonfinite norms have a red mark; a layer that had no gradient leaves its cell grey. It is drawn for
        the width of some 300 pixels in which TensorBoard shows it: few words, large letters.
        """
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure

        fullest_first = sorted(self._columns, key=len, reverse=True)
        names = list(dict.fromkeys(name for column in fullest_first for name in column))
        cells = [[column.get(name) for column in self._columns] for name in names]
        is_sick = [[not math.isfinite(0.0 if cell is None else cell) for cell in row] for row in cells]
        height = 1.1 + 0.16 * min(max(len(names), 8), 24)
        figure = Figure(figsize=(4.2, height), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("lightgrey")
        as_map: dict[str, Any] = {
            "aspect": "auto",
            "interpolation": "nearest",
            "extent": (self._steps[0], self._steps[-1] + 1, len(names) - 0.5, -0.5),
        }
        image = axes.imshow([[_decades(cell) for cell in row] for row in cells], **as_map)
        width = (self._steps[-1] + 1 - self._steps[0]) / len(self)
        sick = [
            (self._steps[0] + (column + 0.5) * width, row)
            for row, cells_of_row in enumerate(is_sick)
            for column, is_it in enumerate(cells_of_row)
            if is_it
        ]
        if sick:
            red = ListedColormap(["red"])
            axes.imshow([[1.0 if it else math.nan for it in row] for row in is_sick], cmap=red, **as_map)
            # marks as well, for a cell may be narrower than a pixel
            axes.scatter([x for x, _ in sick], [y for _, y in sick], marker="s", s=8, color="red")
            axes.set_title("red: NaN or infinite", fontsize=9, color="red")
        every = math.ceil(len(names) / ROWS)
        labelled = range(0, len(names), every)
        labels = _told_apart(names)
        axes.set_yticks(labelled, [_short(labels[i]) for i in labelled])
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.set_xlabel("step")
        axes.tick_params(labelsize=9)
        bar = figure.colorbar(image)
        bar.set_label("log10 of gradient norm")
        bar.ax.tick_params(labelsize=9)
        return figure


def _decades(norm: float | None) -> float:
    if norm is None or not math.isfinite(norm):
        return math.nan
    return math.log10(max(norm, 1e-30))


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin with, but for the last part of it, and without a common end."""
    paths = [name.split(".") for name in names]
    if len(paths) < 2:
        return list(names)
    shortest = min(map(len, paths))
    start = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest - 1)
    start = max(start - 1, 0)
    most = shortest - start - 2
    end = next((i for i in range(most) if len({path[-1 - i] for path in paths}) > 1), most)
    return [".".join(path[start : len(path) - end]) for path in paths]


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS // 2]}…{name[1 - LETTERS // 2 :]}"
