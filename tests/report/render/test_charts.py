"""Charts mark nonfinite values and incidents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_gradguard.report.analysis.run_log import Series
from lightning_gradguard.report.render.charts import MAX_POINTS, layer_heat_map, line_chart
from lightning_gradguard.report.render.html import to_html
from lightning_gradguard.report.render.json import to_json
from tests.report.pages import charts
from tests.report.runs import SCHEMA, report_of, write_events

NAN = math.nan
NO_MARKS: dict[str, set[int]] = {"incident": set(), "rollback": set()}


def series(values: Sequence[float], first_step: int = 0) -> Series:
    return Series(range(first_step, first_step + len(values)), values)


def axes_of(figure: Figure) -> Axes:
    return figure.axes[0]


def points(line: Line2D) -> list[tuple[float, float]]:
    return list(map(tuple, line.get_xydata().tolist()))  # type: ignore[union-attr]


def drawn(figure: Figure, label: str) -> list[tuple[float, float]]:
    """Returns the points of the line with this name in the legend."""
    return next(points(line) for line in axes_of(figure).lines if line.get_label() == label)


def cells(image: Any) -> Any:
    return np.ma.filled(image.get_array(), NAN)


def legend(figure: Figure) -> list[str]:
    found = axes_of(figure).get_legend()
    return [text.get_text() for text in found.get_texts()] if found else []


def test_incidents_between_logged_steps_are_marked() -> None:
    marks = {"incident": {0, 99}, "rollback": {60}}
    figure = line_chart({"loss": series([1.0] * 20, 49)}, marks, log_scale=False)
    assert [step for step, _ in drawn(figure, "incident")] == [0, 99]
    assert [step for step, _ in drawn(figure, "rollback")] == [60]
    assert legend(figure) == ["loss", "incident", "rollback"]


def test_incidents_and_rollbacks_of_a_run_are_on_its_charts() -> None:
    path = write_events("run", {"train_loss": [1.0] * 20})
    lines = [{"kind": "loss_spike", "step": 3}, {"kind": "rollback", "step": 4}]
    (path / "incidents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (chart,) = charts(to_html([report_of(path)]))
    assert {"incident", "rollback"} <= set(chart.itertext())


def test_nonfinite_values_are_marked() -> None:
    losses = [*[1.0] * 40, NAN, *[1.0] * 39, *[math.inf] * 20]
    figure = line_chart({"loss": series(losses)}, NO_MARKS, log_scale=False)
    nonfinite = [40, *range(80, 100)]
    assert [step for step, _ in drawn(figure, "NaN or infinite")] == nonfinite
    assert legend(figure) == ["loss", "NaN or infinite"]
    # gaps in the line
    assert [step for step, loss in drawn(figure, "loss") if math.isnan(loss)] == nonfinite


def test_finite_values_between_nonfinite_ones_are_dots() -> None:
    figure = line_chart({"loss": series([1.0, NAN, 2.0, NAN, 3.0, 3.0])}, NO_MARKS, log_scale=False)
    _, dots, _ = axes_of(figure).lines
    assert (points(dots), dots.get_marker()) == ([(0, 1.0), (2, 2.0)], ".")


def test_long_series_are_drawn_as_pixels() -> None:
    noise = [1.0 + i % 7 for i in range(20_000)]
    marks = {"incident": set(range(5000)), "rollback": {3}}
    figure = line_chart({"loss": series(noise)}, marks, log_scale=False)
    assert [line.get_rasterized() for line in axes_of(figure).lines] == [True, True, True, False]
    figure = line_chart({"loss": series(noise[:MAX_POINTS])}, NO_MARKS, log_scale=False)
    assert not any(line.get_rasterized() for line in axes_of(figure).lines)


def test_norms_have_a_logarithmic_axis_and_a_loss_only_across_decades() -> None:
    norms = {
        "before clipping": series([1.0, 1e3]),
        "after clipping": series([1.0, 1.0]),
        "threshold": Series(),
    }
    figure = line_chart(norms, NO_MARKS, log_scale=True)
    assert axes_of(figure).get_yscale() == "log"
    assert legend(figure) == ["before clipping", "after clipping"]
    assert (
        axes_of(line_chart({"before clipping": series([0.0])}, NO_MARKS, log_scale=True)).get_yscale()
        == "linear"
    )


def test_nonfinite_cells_are_marked() -> None:
    n = 100
    tags = {
        f"grad_norm/layer{i}.weight": [*[10.0**-i] * (n - 1), NAN if i == 2 else 10.0**-i] for i in range(5)
    }
    report = report_of(write_events("run", tags))
    axes = axes_of(layer_heat_map(report, report.run.log.gradients[0]))
    norms, red = axes.images
    assert np.argwhere(np.isfinite(cells(red))).tolist() == [[2, n - 1]]
    # every other cell has a value: none is lost between two columns
    assert np.isfinite(cells(norms)).sum() == 5 * n - 1
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"layer{i}.weight" for i in range(5)]


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [NAN],
        [NAN] * 200,
        [0.0] * 30,
        [math.inf, -math.inf],
        [1e-45, 3e38],
        [1e308, 1e-320] * 20,
        [1e308, -1e308],
    ],
)
def test_unusual_values_are_drawn(values: list[float]) -> None:
    figure = line_chart({"loss": series(values)}, {"incident": {10**9}, "rollback": set()}, log_scale=True)
    figure.draw_without_rendering()
    in_range = [value for value in values if not 0 < abs(value) < 1e-45 and not 3e38 < abs(value) < math.inf]
    if in_range:
        tags = {"grad_norm/total": in_range, "grad_norm/a.weight": in_range, "train_loss": in_range}
        found = report_of(write_events("run", tags))
        jsonschema.validate(json.loads(to_json([found])), SCHEMA)
        assert len(charts(to_html([found]))) == 3
