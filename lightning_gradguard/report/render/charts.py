"""Charts of a report as SVG: loss, gradient norms, layers over steps, the scale of the learning rate."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from lightning_gradguard.report.analysis.run_log import GradientLog, Series
from lightning_gradguard.report.run_report import RunReport
from lightning_gradguard.runtime.logging.heat_map import MAX_COLUMNS, draw_heat_map

#: Width of a chart in inches, and height of one with lines.
WIDTH, HEIGHT = 9.0, 2.6
#: Rows of a heat map and letters of their names.
MAX_ROWS, MAX_LETTERS = 60, 30
#: Points of a line that are drawn as vectors; of more, pixels take less memory.
MAX_POINTS = 1000
#: A loss whose peak is this many times its median is drawn on a logarithmic scale.
SPREAD = 50.0

#: Colours and dashes of lines; markers, colours and heights of incidents, rollbacks, nonfinite values.
_LINES = (("#1668c7", "-"), ("#b45309", "-"), ("#15803d", "--"))
_MARKS = (("^", "#9333ea", 0.04), ("<", "#0f766e", 0.04), ("s", "#d00000", 0.97))
#: Text as text, so that a page can be searched; names of layers are no formulas; no random identifiers.
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0}
_STYLE["svg.hashsalt"] = "gradguard"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def charts(report: RunReport) -> dict[str, str]:
    """Draws everything a run has logged; returns SVG by caption."""
    log = report.run.log
    marks = {
        "incident": {i.step for i in log.incidents if i.kind != "rollback"},
        "rollback": {i.step for i in log.incidents if i.kind == "rollback"},
    }
    figures: dict[str, str] = {}
    with rc_context(_STYLE):
        if len(log.loss):
            figure = line_chart({"loss": log.loss}, marks, log_scale=_spans_decades(log.loss))
            figures[f"Loss ({report.run.loss_tag})"] = _svg(figure)
        for gradients in log.gradients:
            of = f" of optimizer {gradients.optimizer}" if len(log.gradients) > 1 else ""
            lines = {
                "before clipping": gradients.total,
                "after clipping": gradients.clipped,
                "threshold": gradients.clip_threshold,
            }
            figures[f"Total gradient norm{of}"] = _svg(line_chart(lines, marks, log_scale=True))
            if gradients.layers:
                caption = f"Gradient norm by layer{of}, first layer on top"
                figures[caption] = _svg(layer_heat_map(report, gradients))
        if len(log.backoff_scale) and min(log.backoff_scale.values) < 1:
            figure = line_chart({"scale": log.backoff_scale}, marks, log_scale=True)
            figures["Scale of the learning rate"] = _svg(figure)
    return figures


def line_chart(
    lines: Mapping[str, Series], marks: Mapping[str, Collection[int]], *, log_scale: bool
) -> Figure:
    """Draws lines by name over steps, incidents and rollbacks below them, nonfinite values above."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    positive = [value for series in lines.values() for _, value in series.finite() if value > 0]
    if log_scale and positive:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        spread = max(positive) / min(positive)
        if spread < 300:  # too narrow for powers of ten alone
            axes.yaxis.set_major_locator(MaxNLocator(5) if spread < 10 else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    nonfinite: set[int] = set()
    for (name, series), (colour, dashes) in zip(lines.items(), _LINES, strict=False):
        if not len(series):
            continue
        x, y = series.steps, [_drawable(value) for value in series.values]
        style: dict[str, Any] = {"color": colour, "rasterized": len(series) > MAX_POINTS}
        axes.plot(x, y, dashes, lw=1.4, label=name, **style)
        is_gap = [True, *map(math.isnan, y), True]
        alone = [i for i, around in enumerate(zip(is_gap, is_gap[2:], strict=False)) if all(around)]
        axes.plot([x[i] for i in alone], [y[i] for i in alone], ".", **style)
        nonfinite.update(step for step, value in zip(x, y, strict=True) if math.isnan(value))
    marked = {**marks, "NaN or infinite": nonfinite}
    for (label, steps), (marker, colour, height) in zip(marked.items(), _MARKS, strict=True):
        style = {
            "color": colour,
            "rasterized": len(steps) > MAX_POINTS,
            "transform": axes.get_xaxis_transform(),
        }
        if steps:
            axes.plot(sorted(steps), [height] * len(steps), marker, ms=5, label=label, **style)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False, borderpad=0)
    return figure


def curves(lines: Mapping[str, Series], others: Sequence[Series]) -> str:
    """Draws named lines over steps, and others thin and grey behind them; returns SVG."""
    with rc_context(_STYLE):
        values = [v for series in (*lines.values(), *others) for _, v in series.finite()]
        is_wide = bool(values) and min(values) > 0 and max(values) > 10 * min(values)
        figure = line_chart(lines, {"incident": (), "rollback": ()}, log_scale=is_wide)
        for series in others:
            y = [_drawable(value) for value in series.values]
            figure.axes[0].plot(series.steps, y, "-", lw=0.8, color="#9ca3af", zorder=0)
        return _svg(figure)


def layer_heat_map(report: RunReport, gradients: GradientLog) -> Figure:
    """Draws the first layers of a report that fit, of one optimizer, in the order of the network."""
    drawn = [layer.name for layer in report.layers if layer.optimizer == gradients.optimizer][:MAX_ROWS]
    layers = {name: series for name, series in gradients.layers.items() if name in set(drawn)}
    steps = sorted({step for series in layers.values() for step in series.steps})
    columns = min(len(steps), MAX_COLUMNS)
    # the last column is as wide as the others
    width = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or 1.0
    reach = steps[-1] - steps[0] + width
    cells: dict[str, list[float | None]] = {name: [None] * columns for name in layers}
    for name, series in layers.items():
        row = cells[name]
        for step, value in zip(series.steps, series.values, strict=True):
            # without the addend, 29 of 100 columns times 0.01 falls into column 28
            column = min(int((step - steps[0]) / reach * columns + 1e-6), columns - 1)
            row[column] = _larger(row[column], value)
    norms = [value for series in layers.values() for _, value in series.finite() if value > 0]
    return draw_heat_map(
        cells,
        (steps[0], steps[0] + reach),
        size=(WIDTH, 1.0 + 0.17 * max(len(layers), 7)),
        max_names=MAX_ROWS,
        max_letters=MAX_LETTERS,
        limits=_usual_range(norms),
    )


def _larger(one: float | None, other: float) -> float:
    """Returns the larger value; nonfinite values are larger than any other."""
    return other if one is None else max(one, other, key=lambda value: (not math.isfinite(value), value))


def _usual_range(norms: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the exponents of nearly all norms, so that a single spike does not take most colours."""
    exponents = sorted(map(math.log10, norms))
    margin = len(exponents) // 50
    return (exponents[margin], exponents[-1 - margin]) if margin else (None, None)


def _drawable(value: float) -> float:
    """Returns NaN for nonfinite values, and bounds values whose margins on an axis would overflow."""
    if not math.isfinite(value):
        return math.nan
    return math.copysign(min(max(abs(value), 1e-150), 1e150), value) if value else 0.0


def _spans_decades(series: Series) -> bool:
    values = [value for _, value in series.finite()]
    return bool(values) and min(values) > 0 and max(values) > SPREAD * median(values)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_NO_METADATA)
    text = file.getvalue()
    return text[text.index("<svg") :].rstrip()
