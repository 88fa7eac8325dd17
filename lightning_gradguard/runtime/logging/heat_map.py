"""Heat maps of gradient norms: layers over steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a heat map; more are narrower than a pixel where TensorBoard shows it.
MAX_COLUMNS = 200
#: Rows with a name each, and letters of a name, in TensorBoard.
MAX_NAMES, MAX_LETTERS = 16, 18
#: Width in inches of some 300 pixels, as TensorBoard shows it.
_WIDTH = 4.2


class GradientHistory:
    """Norms by layer over the last logged steps."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=MAX_COLUMNS)
        self._columns: deque[Mapping[str, float]] = deque(maxlen=MAX_COLUMNS)

    def __len__(self) -> int:
        """Returns the number of steps in the history."""
        return len(self._steps)

    @property
    def last_step(self) -> int:
        """The last step; -1 for an empty history."""
        return self._steps[-1] if self._steps else -1

    def append(self, step: int, norms: Mapping[str, float]) -> None:
        """Adds a logged step."""
        self._steps.append(step)
        self._columns.append(norms)

    def draw(self) -> Figure:
        """Draws the history for TensorBoard: few words, large letters."""
        fullest_first = sorted(self._columns, key=len, reverse=True)
        names = dict.fromkeys(name for column in fullest_first for name in column)
        cells = {name: [column.get(name) for column in self._columns] for name in names}
        height = 1.1 + 0.16 * min(max(len(names), 8), 24)
        return draw_heat_map(cells, (self._steps[0], self._steps[-1] + 1), size=(_WIDTH, height))


def draw_heat_map(
    cells: Mapping[str, Sequence[float | None]],
    steps: tuple[float, float],
    *,
    size: tuple[float, float],
    max_names: int = MAX_NAMES,
    max_letters: int = MAX_LETTERS,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Draws norms by colour: a row for each layer, columns of equally many steps.

    Nonfinite norms have a red mark; a layer without a gradient, `None`, leaves its cell grey. `steps` are the
    begin of the first column and the end of the last. The limits of the scale are exponents of ten; `None`
    takes them from the norms.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    names = list(cells)
    first, last = steps
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    as_map: dict[str, Any] = {
        "aspect": "auto",
        "interpolation": "nearest",
        "extent": (first, last, len(names) - 0.5, -0.5),
    }
    low, high = limits
    exponents = [[_exponent(cell) for cell in row] for row in cells.values()]
    image = axes.imshow(exponents, vmin=low, vmax=high, **as_map)
    nonfinite = [[not math.isfinite(0.0 if cell is None else cell) for cell in row] for row in cells.values()]
    marked = [(y, x) for y, row in enumerate(nonfinite) for x, it in enumerate(row) if it]
    if marked:
        red = ListedColormap(["red"])
        axes.imshow([[1.0 if it else math.nan for it in row] for row in nonfinite], cmap=red, **as_map)
        # marks as well, because a cell may be narrower than a pixel
        width = (last - first) / len(nonfinite[0])
        rows, columns = [y for y, _ in marked], [first + (x + 0.5) * width for _, x in marked]
        axes.scatter(columns, rows, marker="s", s=8, color="red", rasterized=True)
        axes.set_title("red: NaN or infinite", fontsize=9, color="red")
    labels = _without_common_parts(names)
    labelled = range(0, len(names), math.ceil(len(names) / max_names))
    axes.set_yticks(labelled, [_shortened(labels[i], max_letters) for i in labelled])
    axes.locator_params(axis="x", nbins=max(4, round(size[0])), integer=True)
    axes.set_xlabel("step")
    axes.tick_params(labelsize=9)
    extend = "neither" if limits == (None, None) else "both"
    bar = figure.colorbar(image, extend=extend)
    bar.set_label("log10 of gradient norm")
    bar.ax.tick_params(labelsize=9)
    return figure


def _exponent(norm: float | None) -> float:
    if norm is None or not math.isfinite(norm):
        return math.nan
    return math.log10(max(norm, 1e-30))


def _without_common_parts(names: Sequence[str]) -> list[str]:
    """Returns names without a common beginning, except for its last part, and without a common end."""
    paths = [name.split(".") for name in names]
    if len(paths) < 2:
        return list(names)
    shortest = min(map(len, paths))
    start = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest - 1)
    start = max(start - 1, 0)
    most = shortest - start - 2
    end = next((i for i in range(most) if len({path[-1 - i] for path in paths}) > 1), most)
    return [".".join(path[start : len(path) - end]) for path in paths]


def _shortened(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[1 - letters // 2 :]}"
