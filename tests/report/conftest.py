"""Fixtures of the report tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")
