"""Renders reports as a self-contained HTML page."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from lightning_gradguard.core.incidents import label, title
from lightning_gradguard.report.render.wording import (
    LAYERS_TITLE,
    comparison_table,
    intervention_sentences,
    layer_table,
    outcome_sentence,
)
from lightning_gradguard.report.run_report import RunReport
from lightning_gradguard.runtime.logging.html_page import Section, render_page

#: Rows of the table of layers.
MAX_LAYERS = 20
#: Colours by status and by severity.
_STATUS = {"healthy": "good", "recovered": "good", "unhealthy": "worrying", "failed": "bad", "unknown": ""}
_SEVERITY = {"fatal": "bad", "serious": "worrying", "handled": "good", "minor": ""}


def to_html(reports: Sequence[RunReport], folder: Path = Path()) -> str:
    """Returns the page of a report; links to dossiers are relative to the folder of the page."""
    if len(reports) == 1:
        return render_page(_heading(reports[0]), _sections(reports[0], folder, level=2), is_wide=True)
    anchors = {report.run.name: f"run-{i}" for i, report in enumerate(reports)}
    sections = [
        Section(
            "Comparison",
            table=comparison_table(reports),
            links={name: f"#{anchor}" for name, anchor in anchors.items()},
            colours={report.verdict.headline: _STATUS[report.verdict.status] for report in reports},
        )
    ]
    for report in reports:
        sections.append(Section(_heading(report), anchor=anchors[report.run.name]))
        sections += _sections(report, folder, level=3)
    return render_page(f"{len(reports)} runs", sections, is_wide=True)


def _heading(report: RunReport) -> str:
    return f"{report.run.name}: {report.verdict.headline}"


def _sections(report: RunReport, folder: Path, level: int) -> list[Section]:
    # matplotlib takes longer to import than a report without charts takes
    from lightning_gradguard.report.render.charts import charts

    severities = {title(s.kind, s.cause): _SEVERITY[s.severity] for s in report.verdict.symptoms}
    dossiers = {f"step {d.step}: {label(d.cause)}": d for d in report.run.dossiers}
    return [
        Section("Run summary", outcome_sentence(report), level=level),
        Section("Symptoms", rows=_symptoms(report), colours=severities, level=level),
        Section("Next steps", items=report.next_steps, is_ordered=True, level=level),
        Section("Charts", figures=charts(report), level=level),
        Section("Timeline", rows=_timeline(report), level=level),
        Section(LAYERS_TITLE, table=layer_table(report, MAX_LAYERS), level=level),
        Section("Incidents", rows={k: str(n) for k, n in report.incidents.items()}, level=level),
        Section("Interventions", items=intervention_sentences(report.interventions), level=level),
        Section(
            "Dossiers",
            rows={name: f"{d.detail} {d.path}" for name, d in dossiers.items()},
            links={name: _address(report.run.path / d.path, folder) for name, d in dossiers.items()},
            level=level,
        ),
        Section("Hyperparameters", rows=report.run.hparams, level=level),
        Section("Notes", items=report.notes, level=level),
    ]


def _symptoms(report: RunReport) -> dict[str, str]:
    rows = {}
    for symptom in report.verdict.symptoms:
        where = f"; {', '.join(symptom.where[:3])}" if symptom.where else ""
        details = f"{symptom.severity}, from step {symptom.since}{where}"
        rows[title(symptom.kind, symptom.cause)] = f"{symptom.evidence} ({details})"
    return rows


def _timeline(report: RunReport) -> dict[str, str]:
    texts: dict[str, list[str]] = defaultdict(list)
    for entry in report.timeline:
        texts[entry.steps.replace(" ", "\N{NO-BREAK SPACE}")].append(entry.text)
    return {steps: ". ".join(events) for steps, events in texts.items()}


def _address(file: Path, folder: Path) -> str:
    """Returns the link from a folder to a file; absolute if they are on different drives."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:
        return file.resolve().as_uri()
