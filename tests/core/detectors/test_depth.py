"""The depth profile is the slope of gradient norms over layers."""

from __future__ import annotations

import math

import pytest

from lightning_gradguard.core.detectors import depth_profile


@pytest.mark.parametrize(
    ("grads", "expected"),
    [
        ([1e-6, 1e-4, 1e-2, 1.0], 6.0),
        ([1.0, 1e-2, 1e-4, 1e-6], -6.0),
        ([1.0] * 10, 0.0),
        ([1.0] * 3, 0.0),
        ([math.nan, 1.0, 1.0, 1.0], 0.0),
        ([0.0, 0.0, 1.0, 1.0, 1.0], math.inf),
        ([0.0] * 5, 0.0),
    ],
)
def test_depth_profile_of_known_norms(grads: list[float], expected: float) -> None:
    assert depth_profile(grads, [1.0] * len(grads)) == pytest.approx(expected)
