"""The page on many GPUs is the one that its generator writes."""

from __future__ import annotations

import pytest

from docs.generators import scaling


@pytest.mark.slow
def test_page_is_up_to_date() -> None:
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page()
