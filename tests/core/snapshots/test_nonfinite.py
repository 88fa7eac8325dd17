"""Nonfinite values are detected in any precision, without a host synchronization."""

from __future__ import annotations

import pytest
import torch

from lightning_gradguard.core.snapshots import any_nonfinite


def test_any_nonfinite_detects_infinity() -> None:
    assert not any_nonfinite([])
    assert not any_nonfinite([torch.ones(2), torch.ones(2, dtype=torch.long)])
    assert any_nonfinite([torch.ones(2), torch.tensor([torch.inf])])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_nonfinite_detects_nonfinite_values_in_any_precision(dtype: torch.dtype) -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        nonfinite = [torch.tensor([1.0, value], dtype=dtype)]
        assert any_nonfinite(nonfinite)
        assert any_nonfinite([], squares=nonfinite)
    assert not any_nonfinite([torch.full((2,), torch.finfo(torch.float16).max).to(dtype)])


def test_any_nonfinite_allows_larger_squares() -> None:
    squares = [torch.tensor([1e20])]
    assert any_nonfinite(squares)
    assert not any_nonfinite([], squares)
    assert any_nonfinite([], [*squares, torch.tensor([1e35])])


@pytest.mark.parametrize("is_first", [True, False])
def test_flag_is_on_the_device(is_first: bool) -> None:
    counter, weight = torch.ones(()), torch.ones(2, device="meta")
    assert any_nonfinite([counter, weight] if is_first else [weight, counter]).is_meta
    assert any_nonfinite([weight], squares=[counter]).is_meta
