"""Percentile clipping equals NumPy over a bounded window."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradguard import PercentileClipping
from tests.core.clipping.steps import applied


def test_threshold_equals_numpy() -> None:
    policy = PercentileClipping(percentile=10.0)
    for n in range(1, 11):
        applied(policy, [float(n)])
        assert policy.threshold is not None
        assert float(policy.threshold) == pytest.approx(np.percentile(range(1, n + 1), 10))


def test_window_is_bounded() -> None:
    policy = PercentileClipping(percentile=50.0, window=3)
    applied(policy, [100.0, 1.0, 2.0, 3.0])
    assert policy.threshold is not None
    assert float(policy.threshold) == pytest.approx(2.0)
    assert policy.state_dict()["norms"].numel() == 3
