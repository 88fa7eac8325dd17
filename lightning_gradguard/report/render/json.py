"""Renders reports as JSON; `schema.json` describes the fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lightning_gradguard import __version__, strict_json
from lightning_gradguard.core.incidents import title
from lightning_gradguard.report.run_report import RunReport

#: Raised when a field changes its meaning or is removed; new fields do not raise it.
SCHEMA_VERSION = 2


def to_json(reports: Sequence[RunReport]) -> str:
    """Returns strict JSON; nonfinite numbers are strings."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "lightning_gradguard": __version__,
        "runs": [_run(report) for report in reports],
    }
    # event files store float32, which has seven digits
    return strict_json.to_json(content, indent=2, digits=7)


def _run(report: RunReport) -> dict[str, Any]:
    run, verdict = report.run, report.verdict
    return {
        "name": run.name,
        "path": str(run.path),
        "status": verdict.status,
        "headline": verdict.headline,
        **dataclasses.asdict(verdict.outcome),
        "loss_tag": run.loss_tag,
        "largest_norm": report.largest_norm,
        "largest_norm_at": report.largest_norm_at,
        "largest_norm_of_all": run.log.largest_norm,
        "worst_layer": report.worst_layer,
        "symptoms": [{**dataclasses.asdict(s), "title": title(s.kind, s.cause)} for s in verdict.symptoms],
        "next_steps": list(report.next_steps),
        "timeline": [dataclasses.asdict(entry) for entry in report.timeline],
        "incidents": dict(report.incidents),
        "layers": [dataclasses.asdict(layer) for layer in report.layers],
        "interventions": dataclasses.asdict(report.interventions),
        "dossiers": [dataclasses.asdict(dossier) for dossier in run.dossiers],
        "hparams": dict(run.hparams),
        "notes": list(report.notes),
    }
