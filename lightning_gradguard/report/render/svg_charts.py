"""Charts as SVG: lines over steps, and a heat map of layers; readable in light and dark, without a script."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from lightning_gradguard.report.analysis.run_log import Series

#: Size of a chart in its own units, and the margins that labels take.
WIDTH, HEIGHT = 800, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 26
#: Room for names beside a heat map, letters that fit there, and the height of a row.
NAMES, LETTERS, ROW = 210, 30, 15
#: Rows and columns of a heat map, points of a line: more cannot be told apart.
ROWS, COLUMNS, POINTS = 60, 150, 700
#: Pixels within which marks are one.
MARK = 3
#: From dark to light as matplotlib's viridis, which has no red in it.
_COLOURS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")

STYLE = (
    ":root{--a:#1668c7;--b:#b45309;--c:#15803d;--sick:#d00000;--mark:#9333ea;--grid:#8884}"
    "@media(prefers-color-scheme:dark){:root{--a:#6db3ff;--b:#f5a742;--c:#5fd38a;--sick:#ff5c5c;--mark:#c99bff}}"
    "svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:currentColor}"
    "i{font-style:normal}svg .l{fill:none;stroke-width:1.6;stroke-linejoin:round}"
    ".a{stroke:var(--a);color:var(--a)}.b{stroke:var(--b);color:var(--b)}.c{stroke:var(--c);color:var(--c)}"
    "svg .c{stroke-dasharray:5 4}svg .sick{fill:var(--sick)}svg .mark{fill:var(--mark)}svg .none{fill:#8883}"
    "svg .grid{stroke:var(--grid)}.key{font-size:.85rem}.key span{margin-right:1.2rem}"
    ".key .sick{color:var(--sick)}.key .mark{color:var(--mark)}"
)


#: From a step or a value to where it lies.
Place = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: In the key.
        series: Its points.
        colour: `"a"`, `"b"`, or `"c"`, which is dashed.
    """

    name: str
    series: Series
    colour: str


def line_chart(
    title: str, lines: Sequence[Line], *, log_scale: bool, marks: Mapping[int, str] | None = None
) -> str:
    """Lines over steps, with a red bar on top where a value is nonfinite.

    Args:
        title: Above it.
        lines: Those without points are left out.
        log_scale: Whether the vertical axis shows decades.
        marks: What happened, by step; a triangle at the bottom, its text on hovering.
    """
    shown = [line for line in lines if len(line.series)]
    finite = [(step, value) for line in shown for step, value in line.series.finite()]
    steps = [step for line in shown for step in (line.series.steps[0], line.series.steps[-1])]
    # what happened between two logged steps, or ahead of the first, is to be seen as well
    steps += marks or {}
    first, last = min(steps), max(steps)
    scale = _Scale([value for _, value in finite], log_scale)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * scale.share(value)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in scale.ticks
    ]
    parts += _step_axis(first, last, x, LEFT, HEIGHT - 8)
    for line in shown:
        parts.append(f'<path class="l {line.colour}" d="{_path(line.series, x, y)}"/>')
    sick = _merged(sorted((x(a), x(b)) for line in shown for a, b in _nonfinite(line.series)))
    parts += [
        f'<rect class="sick" x="{a - 1:.1f}" y="2" width="{b - a + 2:.1f}" height="6"/>' for a, b in sick
    ]
    near: dict[int, list[str]] = defaultdict(list)
    for step, text in (marks or {}).items():
        near[round(x(step) / MARK) * MARK].append(f"step {step}: {text}")
    base = HEIGHT - BOTTOM
    for at, texts in near.items():
        what = html.escape(_several(texts))
        parts.append(f'<path class="mark" d="M{at} {base - 9}l4 9h-8z"><title>{what}</title></path>')
    key = [
        f'<span class="{line.colour}">{"┄" if line.colour == "c" else "━"} {line.name}</span>'
        for line in shown
    ]
    key += ['<span class="sick">■ NaN or infinite</span>'] if sick else []
    key += ['<span class="mark">▲ incident</span>'] if near else []
    return _figure(title, key, HEIGHT, parts)


def heat_map(title: str, layers: Mapping[str, Series], names: Sequence[str]) -> str:
    """Norms of layers over steps, by colour: red where one is nonfinite, grey where there is none.

    Args:
        title: Above it.
        layers: Norms by name.
        names: The rows, first layer first.
    """
    steps = sorted({step for name in names for step in layers[name].steps})
    first = steps[0]
    columns = min(len(steps), COLUMNS)
    # what was logged last reaches as far to the right as the others
    reach = steps[-1] - first + ((steps[-1] - first) / max(len(steps) - 1, 1) or 1)
    low, high = _usual_range([v for name in names for _, v in layers[name].finite() if v > 0])
    width = (WIDTH - NAMES - RIGHT) / columns

    def x(step: float) -> float:
        return NAMES + (WIDTH - NAMES - RIGHT) * (step - first) / reach

    cells: dict[str, list[str]] = defaultdict(list)
    labels = []
    for row, name in enumerate(names):
        top = TOP + row * ROW
        label = name if len(name) <= LETTERS else f"{name[:12]}…{name[13 - LETTERS :]}"
        label = f"{html.escape(label)}<title>{html.escape(name)}</title>"
        labels.append(f'<text x="{NAMES - 8}" y="{top + 12}" text-anchor="end">{label}</text>')
        colours: list[str] = [""] * columns
        for step, value in zip(layers[name].steps, layers[name].values, strict=True):
            # without the little more, 29 of 100 columns times 0.01 would fall into column 28
            column = min(int((step - first) / reach * columns + 1e-6), columns - 1)
            colours[column] = _stronger(colours[column], value, low, high)
        for start, end, colour in _stretches(colours):
            left, right = NAMES + start * width, NAMES + end * width
            cells[colour].append(f"M{left:.1f} {top}H{right:.1f}v{ROW - 1}H{left:.1f}z")
    height = TOP + len(names) * ROW + BOTTOM
    area = f'width="{WIDTH - NAMES - RIGHT}" height="{len(names) * ROW - 1}"'
    grey = f'<rect class="none" x="{NAMES}" y="{TOP}" {area}/>'
    painted = [
        f'<path {"class" if colour == "sick" else "fill"}="{colour}" d="{"".join(shapes)}"/>'
        for colour, shapes in cells.items()
    ]
    shades = [(colour, low + (high - low) * i / (len(_COLOURS) - 1)) for i, colour in enumerate(_COLOURS)]
    bounds = ["at most ", *[""] * (len(shades[::2]) - 2), "at least "]
    key = [
        f'<span><i style="color:{colour}">■</i> {bound}{10**decade:.1e}</span>'
        for bound, (colour, decade) in zip(bounds, shades[::2], strict=True)
    ]
    key += ['<span class="sick">■ NaN or infinite</span>'] if "sick" in cells else []
    axis = _step_axis(first, steps[-1], x, NAMES, height - 8)
    return _figure(title, key, height, [grey, *painted, *labels, *axis])


class _Scale:
    """Where values lie between bottom and top, and which are written beside the axis."""

    def __init__(self, values: Sequence[float], log_scale: bool) -> None:
        self._log = log_scale
        self._least = min((v for v in values if v > 0), default=1.0)
        heights = [self._height(value) for value in values] or [0.0, 1.0]
        low, high = min(heights), max(heights)
        margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        self._low, self._high = low - margin, high + margin
        self.ticks = self._decades() if log_scale else _round_numbers(self._low, self._high, 5)

    def share(self, value: float) -> float:
        return (self._height(value) - self._low) / (self._high - self._low)

    def _height(self, value: float) -> float:
        return math.log10(max(value, self._least)) if self._log else value

    def _decades(self) -> list[float]:
        exponents = range(math.ceil(self._low), math.floor(self._high) + 1)
        every = math.ceil(len(exponents) / 6) or 1
        if len(exponents) > 1:
            return [10.0**exponent for exponent in exponents[::every]]
        return _round_numbers(10**self._low, 10**self._high, 4)


def _round_numbers(low: float, high: float, n: int) -> list[float]:
    """About `n` round numbers between two."""
    raw = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    start = math.ceil(low / step)
    numbers = (start + i for i in range(math.floor(high / step) - start + 1))
    return [number * step for number in numbers]


def _step_axis(first: int, last: int, x: Place, left: float, y: float) -> list[str]:
    ticks = [t for t in _round_numbers(first, last, 6) if t == round(t)] if last > first else [first]
    labels = [f'<text x="{x(t):.1f}" y="{y}" text-anchor="middle">{t:,.0f}</text>' for t in ticks]
    return [f'<text x="{left - 8}" y="{y}" text-anchor="end">step</text>', *labels]


def _path(series: Series, x: Place, y: Place) -> str:
    """The line, with gaps where values are nonfinite; of many points those that show its outline."""
    points = list(zip(series.steps, series.values, strict=True))
    size = math.ceil(len(points) / (POINTS // 2))
    kept: list[tuple[int, float]] = points
    if size > 2:
        kept = []
        for i in range(0, len(points), size):
            stretch = [p for p in points[i : i + size] if math.isfinite(p[1])]
            ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])} if stretch else set()
            kept += sorted(ends) or [points[i]]
    commands, pen = [], "M"
    for step, value in kept:
        if not math.isfinite(value):
            pen = "M"
            continue
        # a point between two gaps has no length but a round end
        commands.append(f"{pen}{x(step):.1f} {y(value):.1f}" + ("h.1" if pen == "M" else ""))
        pen = "L"
    return "".join(commands)


def _nonfinite(series: Series) -> list[tuple[int, int]]:
    """First and last step of each stretch of nonfinite values."""
    points = zip(series.steps, series.values, strict=True)
    stretches = [
        [step for step, _ in members]
        for is_finite, members in groupby(points, key=lambda point: math.isfinite(point[1]))
        if not is_finite
    ]
    return [(steps[0], steps[-1]) for steps in stretches]


def _merged(stretches: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretches that a person cannot tell apart as one."""
    merged: list[tuple[float, float]] = []
    for start, end in stretches:
        if merged and start - merged[-1][1] <= MARK:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _usual_range(values: Sequence[float]) -> tuple[float, float]:
    """Decades between which nearly all values lie: one spike would take all colours for itself."""
    decades = sorted(map(math.log10, values)) or [0.0]
    margin = len(decades) // 50
    return decades[margin], decades[-1 - margin]


def _several(texts: Sequence[str]) -> str:
    return "\n".join(texts[:5]) + (f"\nand {len(texts) - 5} more" if len(texts) > 5 else "")


def _stronger(colour: str, value: float, low: float, high: float) -> str:
    """Of what falls into one cell, nonfinite comes first, then the largest."""
    if not math.isfinite(value) or colour == "sick":
        return "sick"
    level = (math.log10(value) - low) / ((high - low) or 1.0) if value > 0 else 0.0
    place = min(max(round(level * (len(_COLOURS) - 1)), 0), len(_COLOURS) - 1)
    return _COLOURS[max(place, _COLOURS.index(colour)) if colour else place]


def _stretches(colours: Sequence[str]) -> list[tuple[int, int, str]]:
    """Neighbouring cells of one colour together, without the empty ones."""
    found: list[tuple[int, int, str]] = []
    for i, colour in enumerate(colours):
        if not colour:
            continue
        if found and found[-1][1:] == (i, colour):
            found[-1] = (found[-1][0], i + 1, colour)
        else:
            found.append((i, i + 1, colour))
    return found


def _figure(title: str, key: Sequence[str], height: int, parts: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        f'<figure><figcaption>{name}</figcaption><div class="key">{"".join(key)}</div>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )
