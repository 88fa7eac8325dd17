"""Files that the suite writes beside the scalars: incidents, lost batches, dossiers."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gradguard.core.incidents import RUN_FOLDER, Incident, current_name
from lightning_gradguard.report.analysis.run_log import MAX_DELAY
from lightning_gradguard.report.readers.scalars import Abandoned


@dataclass(frozen=True)
class DossierEntry:
    """Summary of a dossier; see `runtime.incidents.dossier` for its contents."""

    step: int
    cause: str
    detail: str
    path: str


def read_incidents(path: Path, notes: list[str]) -> Iterator[Incident]:
    """Yields the incidents of a file, none if there is no such file; `notes` receives what is damaged."""
    if not path.is_file():
        return
    omitted = 0
    for record in _records(path, notes):
        value, detail = record.get("value"), str(record.get("detail") or "")
        try:
            yield Incident(
                kind=str(record["kind"]),
                step=int(record["step"]),
                where=tuple(map(str, record.get("where") or ())),
                value=None if value is None else float(value),
                advice=str(record.get("advice") or ""),
                detail=detail,
                dossier=str(record.get("dossier") or ""),
                action=current_name(str(record.get("action") or "none")),
                cause=current_name(str(record.get("cause") or "")),
                location=str(record.get("location") or ""),
                # version 0.5 has written it in words
                examined=bool(record.get("examined", not detail.startswith("Not examined"))),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            omitted += 1
    if omitted:
        notes.append(f"{omitted} records of {path.name} are not incidents")


def without_abandoned(incidents: Iterable[Incident], abandoned: Abandoned) -> Iterator[Incident]:
    """Yields incidents without those of steps that a resumed run has repeated.

    Incidents have no time stamp, but they are recorded in the order in which they happened: the resumed run
    begins at the first incident whose step is lower than the one before, or that is recorded twice.
    """
    seen: set[tuple[str, int]] = set()
    has_resumed, previous = False, 0
    for incident in incidents:
        # a deferred check may record an incident behind one of the next step
        has_resumed |= incident.step < previous - MAX_DELAY or (incident.kind, incident.step) in seen
        seen.add((incident.kind, incident.step))
        previous = incident.step
        if has_resumed or not abandoned.first <= incident.step <= abandoned.last + MAX_DELAY:
            yield incident


def read_lost_batches(path: Path, notes: list[str]) -> tuple[Counter[str], int]:
    """Returns the number of lost batches by reason, and the number of ranks with lost batches."""
    logs = sorted(path.glob("lost_batches.rank*.jsonl"))
    reasons = (str(record.get("reason", "lost")) for file in logs for record in _records(file, notes))
    return Counter(reasons), len(logs)


def folder_of_incidents(path: Path) -> Path:
    """Returns the folder with the incidents of a run: its own, or that which the suite has named there."""
    try:
        named = (path / RUN_FOLDER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return path
    return path / named


def read_dossiers(path: Path, run: Path, incidents: Iterable[Incident]) -> Iterator[DossierEntry]:
    """Yields the summaries of the dossiers of incidents, by step, with paths from the folder of the run."""
    files = {path / incident.dossier / "finding.json" for incident in incidents if incident.dossier}
    for file in sorted(files, key=natural_order):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            page = os.path.relpath(file.with_name("index.html"), run)
            cause = current_name(str(found["cause"]))
            yield DossierEntry(int(found["step"]), cause, str(found["detail"]), page)
        except (OSError, KeyError, TypeError, ValueError):
            continue  # damaged, or of another version


def natural_order(path: Path) -> list[tuple[str, int]]:
    """Returns a sort key that puts `version_10` behind `version_9`."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file that are JSON objects."""
    broken = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror or error}")
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        else:
            broken += bool(line.strip())
    if broken:
        notes.append(f"{broken} {'lines' if broken > 1 else 'line'} of {path.name} could not be read")
