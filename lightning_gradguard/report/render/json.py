"""Renders reports as JSON; `schema.json` describes the fields."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from lightning_gradguard import __version__
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
    return json.dumps(_strict(content), indent=2, allow_nan=False)


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
        "symptoms": [{**dataclasses.asdict(s), "title": title(s.kind)} for s in verdict.symptoms],
        "timeline": [dataclasses.asdict(entry) for entry in report.timeline],
        "incidents": dict(report.incidents),
        "layers": [dataclasses.asdict(layer) for layer in report.layers],
        "interventions": dataclasses.asdict(report.interventions),
        "dossiers": [dataclasses.asdict(dossier) for dossier in run.dossiers],
        "hparams": dict(run.hparams),
        "notes": list(report.notes),
    }


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    if isinstance(value, float):
        # event files store float32, which has seven digits
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return value
