"""A report as a page of HTML that needs nothing else."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from urllib.parse import quote

from lightning_gradguard.core.incidents import label, title
from lightning_gradguard.report.analysis.run_log import GradientLog, Series
from lightning_gradguard.report.render.svg_charts import ROWS, STYLE, Line, heat_map, line_chart
from lightning_gradguard.report.run_report import (
    RunReport,
    compared,
    layer_table,
    outcome_in_words,
    span,
    things_to_do,
)
from lightning_gradguard.runtime.logging.html_page import Section, page

#: Room for the table that has the runs side by side.
_STYLE = f"body{{max-width:62rem}}{STYLE}"
#: Rows of the table of layers.
LAYERS = 20
#: A loss that rises this many times above its median is drawn in decades.
SPREAD = 50.0


def as_html(reports: Sequence[RunReport], folder: Path = Path()) -> str:
    """The whole report.

    Args:
        reports: On the runs.
        folder: Where the page will lie: links to dossiers begin there.
    """
    if len(reports) == 1:
        report = reports[0]
        return page(
            f"{report.run.name}: {report.verdict.headline}", _sections(report, folder, level=2), _STYLE
        )
    sections = [Section("Side by side", table=compared(reports))]
    for report in reports:
        heading = f"{report.run.name}: {report.verdict.headline}"
        sections += [Section(heading), *_sections(report, folder, level=3)]
    return page(f"{len(reports)} runs", sections, _STYLE)


def _sections(report: RunReport, folder: Path, level: int) -> list[Section]:
    run, verdict = report.run, report.verdict
    wrong = {}
    for symptom in verdict.symptoms:
        where = f"; {', '.join(symptom.where[:3])}" if symptom.where else ""
        since = f"{symptom.severity}, from step {symptom.since}{where}"
        wrong[title(symptom.kind)] = f"{symptom.evidence} ({since})"
    is_well = verdict.status in ("healthy", "unknown")
    worth = "Worth knowing" if is_well else "What went wrong"
    sections = [
        Section("How it ended", outcome_in_words(report), level=level),
        Section(worth, rows=wrong, level=level),
        Section("What to do", items=things_to_do(report), is_ordered=True, level=level),
        Section("Pictures", figures=_figures(report), level=level),
        Section("Timeline", rows=_timeline(report), level=level),
        Section("Layers, the worst first", table=layer_table(report, LAYERS), level=level),
        Section("Incidents", rows={k: str(n) for k, n in report.incidents.items()}, level=level),
        Section("What was done", items=report.done.sentences(), level=level),
        Section(
            "Dossiers",
            rows={f"step {d.step}: {label(d.cause)}": f"{d.detail} {d.path}" for d in run.dossiers},
            links={
                f"step {d.step}: {label(d.cause)}": _address(run.path / d.path, folder) for d in run.dossiers
            },
            level=level,
        ),
        Section("Hyperparameters", rows=run.hparams, level=level),
        Section("Notes", items=report.notes, level=level),
    ]
    return [s for s in sections if s.text or s.rows or s.items or s.table or s.figures]


def _address(file: Path, folder: Path) -> str:
    """From one folder to a file; with its drive where the two are on different ones."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:
        return file.resolve().as_uri()


def _timeline(report: RunReport) -> dict[str, str]:
    texts: dict[str, list[str]] = defaultdict(list)
    for entry in report.timeline:
        texts[span(entry).replace(" ", "\N{NO-BREAK SPACE}")].append(entry.text)
    return {when: "; ".join(told) for when, told in texts.items()}


def _figures(report: RunReport) -> list[str]:
    log = report.run.log
    happened: dict[int, dict[str, None]] = defaultdict(dict)
    for incident in log.incidents:
        happened[incident.step][incident.kind.replace("_", " ")] = None
    marks = {step: ", ".join(kinds) for step, kinds in happened.items()}
    figures = []
    if len(log.loss):
        name = f"Loss ({report.run.loss_tag})"
        line = Line("loss", log.loss, "a")
        figures.append(line_chart(name, [line], log_scale=_spans_decades(log.loss), marks=marks))
    for gradients in log.gradients:
        of = f" of optimizer {gradients.optimizer}" if len(log.gradients) > 1 else ""
        lines = [
            Line("before clipping", gradients.total, "a"),
            Line("after clipping", gradients.clipped, "b"),
            Line("threshold", gradients.clip_threshold, "c"),
        ]
        figures.append(line_chart(f"Total gradient norm{of}", lines, log_scale=True, marks=marks))
        rows = _rows(report, gradients)
        if rows:
            figures.append(
                heat_map(f"Gradient norm by layer{of}, first layer on top", gradients.layers, rows)
            )
    if len(log.backoff_scale) and min(log.backoff_scale.values) < 1:
        scale = Line("scale", log.backoff_scale, "a")
        figures.append(line_chart("Learning rate times", [scale], log_scale=True, marks=marks))
    return figures


def _rows(report: RunReport, gradients: GradientLog) -> list[str]:
    """The worst layers that fit, in the order of the network."""
    worst = [layer.name for layer in report.layers if layer.optimizer == gradients.optimizer][:ROWS]
    return [name for name in gradients.layers if name in set(worst)]


def _spans_decades(series: Series) -> bool:
    values = [value for _, value in series.finite()]
    return bool(values) and min(values) > 0 and max(values) > SPREAD * median(values)
