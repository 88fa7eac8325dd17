"""Scaling a gradient scales its norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.core.norms import measure_gradients, scale_gradients_


@settings(deadline=None, max_examples=50)
@given(st.just(0.0) | st.floats(1e-6, 1.0), st.integers(1, 5))
def test_scaling_scales_the_norm(coefficient: float, n: int) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2)) for _ in range(n)]
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2)
    named = [(str(i), p) for i, p in enumerate(parameters)]
    before = measure_gradients(named)
    scale_gradients_(before, torch.tensor(coefficient, dtype=torch.float64))
    after = measure_gradients(named).total_norm.item()
    assert after == pytest.approx(coefficient * before.total_norm.item(), rel=1e-5)


def test_scaling_multiplies_sparse_rows() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([0, 0, 3])).sum().backward()
    assert embedding.weight.grad is not None
    dense = embedding.weight.grad.to_dense()
    rows = torch.arange(5.0).view(5, 1) / 10
    scale_gradients_(measure_gradients(embedding.named_parameters()), [rows])
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense * rows)
