"""Norms equal a float64 reference for every kind of tensor that a gradient can be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_gradguard.core.norms import measure_gradients, power_sums, tensor_norms, unitwise_norm

TYPES = [1.0, 2.0, 3.0, math.inf]


def reference(tensor: Tensor, norm_type: float) -> float:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    wide = dense.to(torch.complex128 if dense.is_complex() else torch.float64).reshape(-1)
    return float(torch.linalg.vector_norm(wide, norm_type)) if wide.numel() else 0.0


def kinds() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "vector": torch.randn(7),
        "scalar": torch.randn(()),
        "empty": torch.zeros(0, 3),
        "large": torch.randn(300, 1000),
        "transposed": torch.randn(300, 500).t(),
        "channels last": torch.randn(16, 3, 64, 64).to(memory_format=torch.channels_last),
        "strided": torch.randn(400_000)[::2],
        "double": torch.randn(100, dtype=torch.float64),
        "half": torch.full((10,), 1e4, dtype=torch.float16),
        "bfloat16": torch.randn(100).to(torch.bfloat16),
        "complex": torch.randn(100, dtype=torch.complex64),
        "sparse": torch.sparse_coo_tensor(
            torch.tensor([[0, 0, 3]]),
            torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
            (5, 2),
            check_invariants=True,
        ),
    }


@pytest.mark.parametrize("norm_type", TYPES)
def test_tensor_norms_equal_the_reference_for_all_kinds_of_tensor_together(norm_type: float) -> None:
    tensors = list(kinds().values())
    expected = [reference(tensor, norm_type) for tensor in tensors]
    torch.testing.assert_close(
        tensor_norms(tensors, norm_type), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_tensor_norms_of_ten_million_elements_are_exact() -> None:
    tensor = torch.randn(10_000_000)
    assert tensor_norms([tensor]).item() == pytest.approx(reference(tensor, 2.0), rel=1e-6)


def test_tensor_norms_of_nonfinite_and_overflowing_tensors_are_nonfinite() -> None:
    norms = tensor_norms(
        [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.full((2,), 3e19), torch.ones(1)]
    )
    assert torch.isfinite(norms).tolist() == [False, False, False, True]


def test_norms_of_no_tensors_are_empty_and_zero() -> None:
    assert power_sums([]).tolist() == []
    assert measure_gradients([]).total_norm.item() == 0


def test_unitwise_norm_is_by_row_and_whole_for_vectors() -> None:
    weight = torch.randn(4, 3, 2, 2)
    expected = weight.flatten(1).norm(dim=1).view(4, 1, 1, 1)
    torch.testing.assert_close(unitwise_norm(weight), expected)
    assert unitwise_norm(torch.tensor([3.0, 4.0])).item() == 5
    sparse = kinds()["sparse"]
    torch.testing.assert_close(unitwise_norm(sparse), unitwise_norm(sparse.to_dense()))
