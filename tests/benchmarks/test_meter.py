"""The meter counts what can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cost.meter import Meter, meter_on_cuda

TENSORS = [torch.randn(1000) for _ in range(10)]
BYTES = 40_000


def norms(tensors: list[Tensor]) -> list[float]:
    return [tensor.norm().item() for tensor in tensors]


def as_one_tensor(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.norm() for tensor in tensors])


def indexed(tensor: Tensor) -> Tensor:
    return tensor[tensor > 0]


def read_whole(tensor: Tensor) -> None:
    (tensor + 1).cpu().tolist()


def read_twice(tensor: Tensor) -> None:
    moved = tensor + 1
    moved.cpu()
    moved.tolist()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda: norms(TENSORS), {"ops": 10, "syncs": 10, "read": BYTES, "write": 40}),
        (lambda: torch.stack(torch._foreach_norm(TENSORS, 2)), {"ops": 2, "syncs": 0, "read": BYTES + 40}),
        (lambda: (float(TENSORS[0].sum()), bool(TENSORS[0].sum() > 0)), {"ops": 3, "syncs": 2}),
        (lambda: (TENSORS[0] + 1).tolist(), {"ops": 1, "syncs": 1}),
        (lambda: TENSORS[0].tolist(), {"ops": 0, "syncs": 0, "late": 1}),
        (lambda: (TENSORS[0] + 1).cpu().numpy(), {"syncs": 1}),
        (lambda: (TENSORS[0] + 1).to("cpu", non_blocking=True), {"syncs": 0, "d2h_async": 1}),
        (lambda: TENSORS[0].to(torch.device("cpu")), {"ops": 0, "syncs": 0}),
        (lambda: read_whole(TENSORS[0]), {"syncs": 1}),
        (lambda: read_twice(TENSORS[0]), {"syncs": 2}),
        (lambda: as_one_tensor(TENSORS), {"syncs": 10}),
        (lambda: indexed(TENSORS[0]), {"syncs": 1}),
        (lambda: TENSORS[0].clone().masked_fill_(TENSORS[0] > 0, 0.0), {"syncs": 0}),
        (
            lambda: torch._foreach_mul(TENSORS, torch.tensor(1.0)),
            {"ops": 1, "read": BYTES + 4, "write": BYTES},
        ),
        (
            lambda: torch._foreach_copy_([torch.empty(1000) for _ in TENSORS], TENSORS),
            {"ops": 1, "read": BYTES, "write": BYTES},
        ),
        (lambda: TENSORS[0].view(10, 100).t().detach(), {"ops": 0, "read": 0, "write": 0}),
        (lambda: torch.zeros(1000).fill_(1.0), {"ops": 2, "read": 0, "write": 8000}),
        (lambda: torch.add(TENSORS[0], TENSORS[0]), {"ops": 1, "read": 4000, "write": 4000}),
    ],
)
def test_on_a_cpu(code: Callable[[], object], expected: dict[str, int]) -> None:
    with Meter() as meter:
        code()
    row = meter.row()
    assert {name: row[name] for name in expected} == expected


def test_backward_is_counted() -> None:
    weight = nn.Parameter(torch.ones(1000))
    with Meter() as forward:
        loss = (weight * weight).sum()
    with Meter() as backward:
        loss.backward()
    assert forward.ops == 2
    assert backward.names["mul"] == 2
    assert weight.grad is not None
    assert backward.read >= 2 * weight.nbytes


def test_reading_a_host_copy_is_free_and_the_original_is_counted() -> None:
    with Meter() as meter:
        original = torch.ones(3) * 2
        copy = original.cpu()
        copy.tolist()
        assert meter.syncs == 1
        original.tolist()
        assert meter.syncs == 2
        (copy + 1).tolist()
    assert meter.syncs == 3


def build(device: str) -> list[Tensor]:
    return [torch.empty(1000, device=device) for _ in range(10)]


def clip(tensors: list[Tensor]) -> None:
    weights = [nn.Parameter(tensor) for tensor in tensors]
    torch.nn.utils.clip_grads_with_norm_(weights, 1.0, torch.nn.utils.get_total_norm(tensors))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (norms, {"syncs": 10, "d2h_async": 0}),
        (
            lambda t: torch.stack(torch._foreach_norm(t, 2)).to("cpu", non_blocking=True),
            {"syncs": 0, "d2h_async": 1},
        ),
        (lambda t: torch.stack(torch._foreach_norm(t, 2)).cpu().tolist(), {"syncs": 1, "d2h_async": 0}),
        (lambda t: t[0].tolist(), {"syncs": 1}),
        (lambda t: torch._foreach_copy_([torch.empty(1000) for _ in t], t), {"syncs": 10}),
        (
            lambda t: torch._foreach_copy_([torch.empty(1000) for _ in t], t, non_blocking=True),
            {"d2h_async": 10},
        ),
        (lambda t: torch.empty(1000).copy_(t[0], non_blocking=True), {"syncs": 0, "d2h_async": 1}),
        (lambda t: t[0].to(torch.device("cpu")), {"syncs": 1}),
        (lambda t: torch.tensor([1.0, 2.0], device=t[0].device), {"syncs": 1}),
        (lambda t: t[0].to(t[1].device), {"ops": 0, "syncs": 0}),
        (clip, {"syncs": 0}),
    ],
)
def test_on_a_simulated_gpu(code: Callable[[list[Tensor]], object], expected: dict[str, int]) -> None:
    row = meter_on_cuda(build, code).row()
    assert {name: row[name] for name in expected} == expected


def test_events_of_the_same_step_are_synchronizations() -> None:
    def mark(device: str) -> Any:
        return torch.cuda.current_stream().record_event()

    def wait_for_both(earlier: Any) -> None:
        earlier.synchronize()
        mark("cuda").synchronize()

    meter = meter_on_cuda(mark, wait_for_both)
    assert (meter.waits, meter.late) == ({"event": 1}, 1)


def test_missing_values_are_ones() -> None:
    def read(tensor: Tensor) -> None:
        assert tensor.tolist() == [[1.0, 1.0]]
        assert tensor.sum().item() == 1.0
        assert (tensor.argmax().item(), bool((tensor > 0).all())) == (1, True)

    assert meter_on_cuda(lambda device: torch.zeros(1, 2, device=device), read).syncs == 4


def test_lists_are_launched_in_pieces() -> None:
    many, large = [torch.empty(1) for _ in range(220)], [torch.empty(321 * 65536)]
    for tensors, expected in ((TENSORS, 1), (many, 2), (large, 2)):
        with Meter() as meter:
            torch._foreach_mul_(tensors, 1.0)
        assert (meter.ops, meter.launches) == (1, expected)
