"""Reads the scalars of Lightning's CSVLogger."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from lightning_gradguard.report.readers.series import LoggedScalar

#: Name of the file in the folder of a run.
NAME = "metrics.csv"


def scalars_in(path: Path, notes: list[str]) -> Iterator[LoggedScalar]:
    """Yields the scalars of a file: one column for each tag, blank at steps without a value.

    Args:
        path: Of the file.
        notes: Receives what readers should know about a damaged file.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.DictReader(file)
            if "step" not in (rows.fieldnames or ()):
                notes.append(f"{path.name} has no column named step")
                return
            for row in rows:
                step = _number(row.pop("step"))
                if step is None or not step.is_integer():
                    continue
                for tag, text in row.items():
                    if tag and (number := _number(text)) is not None:
                        yield int(step), tag, number
    except (OSError, csv.Error) as error:
        notes.append(f"{path.name} cannot be read: {error}")


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None
    except ValueError:
        return None
