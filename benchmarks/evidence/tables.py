"""Renders the records as docs/evidence.md."""

from __future__ import annotations

PAGE = None
def page(records, environment): return "\n".join(map(str, records))
