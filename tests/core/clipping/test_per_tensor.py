"""Per-tensor clipping follows the history of each tensor."""

from __future__ import annotations

import pytest

from lightning_gradguard import PerTensorClipping
from tests.core.clipping.steps import applied, gradients_of, step


def test_norms_and_history_equal_reference_values() -> None:
    policy = PerTensorClipping(warmup_steps=5)
    norms = applied(policy, [0.5, 0.4, 0.6, 0.45, 2, 0.4, 0.4, 0.8])
    assert norms == pytest.approx([0.5, 0.4, 0.6, 0.45, 0.42, 0.4, 0.4, 0.4204], rel=1e-5)
    assert policy.state_dict()["norms"].item() == pytest.approx(0.40078454416, rel=1e-6)


def test_new_parameter_has_its_own_warmup() -> None:
    policy = PerTensorClipping(warmup_steps=3)
    for _ in range(5):
        step(policy, gradients_of([0.1]))
    both = gradients_of([0.1], [0.9])
    step(policy, both)
    assert both.tensors[1].item() == pytest.approx(0.9)
