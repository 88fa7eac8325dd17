"""Grouping tensors changes no norm, and bounds the number of operations and copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost.meter import Meter
from lightning_gradguard.core.norms import CHUNK, MIN_STACKED, Buckets, tensor_norms


def reference(tensor: Tensor, norm_type: float) -> float:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    wide = dense.to(torch.complex128 if dense.is_complex() else torch.float64).reshape(-1)
    return float(torch.linalg.vector_norm(wide, norm_type)) if wide.numel() else 0.0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += not func.is_view and func._schema.name != "aten::detach"
        return func(*args, **(kwargs or {}))


def test_number_of_operations_is_independent_of_the_number_of_tensors() -> None:
    counts = []
    for n in (2, 20, 200):
        tensors = [torch.randn(10) for _ in range(n)]
        with _Counter() as counter:
            tensor_norms(tensors)
        counts.append(counter.operations)
    assert counts[0] == counts[1] == counts[2] < 12


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(64, 8192).t(),
        torch.randn(CHUNK + 1),
        torch.randn(2, 8, 64, 64).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "with a rest", "channels last"],
)
def test_norms_by_rows_copy_nothing(tensor: Tensor) -> None:
    with Meter() as meter:
        norm = tensor_norms([tensor])
    assert norm.item() == pytest.approx(reference(tensor, 2.0), rel=1e-6)
    assert meter.read == pytest.approx(tensor.nbytes, rel=0.01)
    assert meter.write < 0.01 * tensor.nbytes


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_buckets_give_the_reference_norms_for_later_tensors(norm_type: float) -> None:
    tensors = [torch.randn(n) for n in (3, CHUNK, 0, CHUNK + 1, 3 * CHUNK)] + [torch.randn(5).double()]
    tensors += [torch.randn(2, 3) for _ in range(MIN_STACKED)] + [torch.randn(7)]
    buckets = Buckets(tensors)
    others = [torch.randn_like(tensor) for tensor in tensors]
    expected = torch.tensor([reference(tensor, norm_type) for tensor in others], dtype=torch.float64)
    torch.testing.assert_close(buckets.norms(others, norm_type), expected, rtol=2e-6, atol=0)
