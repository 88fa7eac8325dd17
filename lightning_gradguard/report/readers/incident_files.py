"""Files that the suite writes beside the scalars: incidents, lost batches, dossiers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gradguard.core.incidents import current_name
from lightning_gradguard.report.analysis.run_log import MAX_DELAY, RecordedIncident
from lightning_gradguard.report.readers.run_folders import natural_order
from lightning_gradguard.report.readers.series import Abandoned


@dataclass(frozen=True)
class DossierEntry:
    """Summary of a dossier; see `runtime.incidents.dossier` for its contents."""

    step: int
    cause: str
    detail: str
    path: str


def read_incidents(path: Path, notes: list[str]) -> Iterator[RecordedIncident]:
    """Yields the incidents of a file, none if there is no such file.

    Args:
        path: Of the file.
        notes: Receives the number of lines that are not incidents.
    """
    if not path.is_file():
        return
    omitted = 0
    for record in _records(path, notes):
        value = record.get("value")
        try:
            yield RecordedIncident(
                kind=str(record["kind"]),
                step=int(record["step"]),
                where=tuple(map(str, record.get("where") or ())),
                value=None if value is None else float(value),
                **{key: str(record.get(key) or "") for key in ("advice", "detail", "dossier")},
                action=current_name(str(record.get("action") or "none")),
                cause=current_name(str(record.get("cause") or "")),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            omitted += 1
    if omitted:
        notes.append(f"{omitted} records of {path.name} are not incidents")


def without_abandoned(
    incidents: Sequence[RecordedIncident], abandoned: Abandoned
) -> Iterator[RecordedIncident]:
    """Yields incidents without those of steps that a resumed run has repeated.

    Incidents have no time stamp, but they are recorded in the order in which they happened: the resumed run
    begins at the first incident whose step is lower than the one before, or that is recorded twice.

    Args:
        incidents: In the order of the file.
        abandoned: Steps that were logged again.
    """
    seen: set[tuple[str, int]] = set()
    resumed = len(incidents)
    for i, incident in enumerate(incidents):
        # a deferred check may record an incident behind one of the next step
        is_earlier = i > 0 and incident.step < incidents[i - 1].step - MAX_DELAY
        if is_earlier or (incident.kind, incident.step) in seen:
            resumed = i
            break
        seen.add((incident.kind, incident.step))
    for i, incident in enumerate(incidents):
        if i >= resumed or not abandoned.first <= incident.step <= abandoned.last + MAX_DELAY:
            yield incident


def read_lost_batches(path: Path, notes: list[str]) -> tuple[Counter[str], int]:
    """Counts lost batches by reason; returns the counts and the number of ranks with lost batches.

    Args:
        path: Folder of the run.
        notes: Receives the number of damaged lines.
    """
    logs = sorted(path.glob("lost_batches.rank*.jsonl"))
    reasons = (str(record.get("reason", "lost")) for file in logs for record in _records(file, notes))
    return Counter(reasons), len(logs)


def read_dossiers(folder: Path) -> Iterator[DossierEntry]:
    """Yields the summaries of a run's dossiers, by step.

    Args:
        folder: Where the run keeps its dossiers.
    """
    for file in sorted(folder.glob("*/finding.json"), key=natural_order):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            page = os.path.join(folder.name, file.parent.name, "index.html")
            cause = current_name(str(found["cause"]))
            yield DossierEntry(int(found["step"]), cause, str(found["detail"]), page)
        except (OSError, KeyError, TypeError, ValueError):
            continue  # damaged, or of another version


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file that are JSON objects."""
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        else:
            broken += bool(line.strip())
    if broken:
        notes.append(f"{broken} {'lines' if broken > 1 else 'line'} of {path.name} could not be read")
