"""Norms equal a float64 reference, for every kind of tensor a gradient can be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost.meter import Meter
from lightning_gradguard.core.norms import (
    ALIKE,
    CHUNK,
    Buckets,
    measure_gradients,
    power_sums,
    scale_gradients_,
    tensor_norms,
    unitwise_norm,
    with_gradient,
)

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
def test_every_kind_of_tensor_together(norm_type: float) -> None:
    tensors = list(kinds().values())
    expected = [reference(tensor, norm_type) for tensor in tensors]
    torch.testing.assert_close(
        tensor_norms(tensors, norm_type), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_ten_million_elements() -> None:
    tensor = torch.randn(10_000_000)
    assert tensor_norms([tensor]).item() == pytest.approx(reference(tensor, 2.0), rel=1e-6)


def test_nonfinite_and_overflow_show() -> None:
    norms = tensor_norms(
        [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.full((2,), 3e19), torch.ones(1)]
    )
    assert torch.isfinite(norms).tolist() == [False, False, False, True]


def test_no_tensor_has_no_norm() -> None:
    assert power_sums([]).tolist() == []
    assert measure_gradients([]).total_norm.item() == 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += not func.is_view and func._schema.name != "aten::detach"
        return func(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_number_of_tensors() -> None:
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
def test_rows_copy_nothing(tensor: Tensor) -> None:
    with Meter() as meter:
        norm = tensor_norms([tensor])
    assert norm.item() == pytest.approx(reference(tensor, 2.0), rel=1e-6)
    assert meter.read == pytest.approx(tensor.nbytes, rel=0.01)
    assert meter.write < 0.01 * tensor.nbytes


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_buckets_measure_like_tensors(norm_type: float) -> None:
    tensors = [torch.randn(n) for n in (3, CHUNK, 0, CHUNK + 1, 3 * CHUNK)] + [torch.randn(5).double()]
    tensors += [torch.randn(2, 3) for _ in range(ALIKE)] + [torch.randn(7)]
    buckets = Buckets(tensors)
    others = [torch.randn_like(tensor) for tensor in tensors]
    expected = torch.tensor([reference(tensor, norm_type) for tensor in others], dtype=torch.float64)
    torch.testing.assert_close(tensor_norms(others, norm_type, buckets), expected, rtol=2e-6, atol=0)


def test_unitwise_norm_of_rows_and_vectors() -> None:
    weight = torch.randn(4, 3, 2, 2)
    expected = weight.flatten(1).norm(dim=1).view(4, 1, 1, 1)
    torch.testing.assert_close(unitwise_norm(weight), expected)
    assert unitwise_norm(torch.tensor([3.0, 4.0])).item() == 5
    sparse = kinds()["sparse"]
    torch.testing.assert_close(unitwise_norm(sparse), unitwise_norm(sparse.to_dense()))


def test_only_what_has_a_gradient_is_measured() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad = torch.ones(2)
    frozen.requires_grad_(False)
    named: list[Any] = [
        ("used", used),
        ("unused", unused),
        ("frozen", frozen),
        ("empty", nn.Parameter(torch.ones(0))),
    ]
    assert [name for name, _ in with_gradient(named)] == ["used"]


def test_without_recomputes_the_total() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    gradients = measure_gradients([("a", a), ("b", b)])
    assert gradients.without(["a"]).total_norm.item() == 4
    assert gradients.without(["c"]) is gradients


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


def test_scaling_sparse_rows() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([0, 0, 3])).sum().backward()
    assert embedding.weight.grad is not None
    dense = embedding.weight.grad.to_dense()
    rows = torch.arange(5.0).view(5, 1) / 10
    scale_gradients_(measure_gradients(embedding.named_parameters()), [rows])
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense * rows)
