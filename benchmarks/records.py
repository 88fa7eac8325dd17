"""Outcomes of a benchmark, one a line of a file that a stopped run continues, and tables in pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces what a page has between `<!-- name -->` and `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = page.read_text().partition(start)
    page.write_text(f"{head}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}")
