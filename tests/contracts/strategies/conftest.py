"""Fixtures of the tests of strategies."""

from __future__ import annotations

import pytest

from docs.generators.strategies import StrategiesPage


@pytest.fixture
def strategies_page(request: pytest.FixtureRequest) -> StrategiesPage:
    """The table of docs/strategies.md."""
    return StrategiesPage(is_written=request.config.getoption("--write-strategies"))
