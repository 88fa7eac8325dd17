"""What was copied comes back bit for bit, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard.core.snapshots import (
    BufferCopies,
    Snapshot,
    SnapshotRing,
    any_nonfinite,
    rng_state,
    set_rng_state,
)
from tests.tasks import copy_late


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("large", torch.zeros(100_000))


def steps(net: Net, optimizer: torch.optim.Optimizer, n: int) -> list[torch.Tensor]:
    for _ in range(n):
        optimizer.zero_grad()
        net.body(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    return [*(p.detach().clone() for p in net.parameters()), *(b.clone() for b in net.buffers())]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_run_repeats_itself(name: str, before: int) -> None:
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    steps(net, optimizer, before)
    snapshot, state = Snapshot(), rng_state()
    snapshot.capture([net], [optimizer])
    addresses = [p.data_ptr() for p in net.parameters()]
    first = steps(net, optimizer, 3)
    snapshot.restore([net], [optimizer])
    set_rng_state(state)
    second = steps(net, optimizer, 3)
    assert all(map(torch.equal, first, second))
    assert addresses == [p.data_ptr() for p in net.parameters()]


def test_memory_is_taken_once() -> None:
    net = Net()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps(net, optimizer, 1)
    snapshot = Snapshot()
    snapshot.capture([net], [optimizer])
    memory = {key: tensor.data_ptr() for key, tensor in snapshot._memory.items()}
    steps(net, optimizer, 1)
    snapshot.capture([net], [optimizer])
    assert memory == {key: tensor.data_ptr() for key, tensor in snapshot._memory.items()}
    assert snapshot.n_bytes() == sum(t.numel() * t.element_size() for t in snapshot._memory.values())


def test_buffers_come_back_whatever_was_done_to_them() -> None:
    net: Any = Net()
    copies = BufferCopies(net)
    net.body(torch.full((16, 4), torch.nan))
    net.hidden += 1
    net.large[5] = 1
    replaced = net.body[1].running_var
    net.body[1].running_var = torch.ones(8) * 7
    copies.restore()
    assert all(bool(torch.isfinite(buffer).all()) for buffer in net.buffers())
    assert not bool(net.hidden.any())
    assert not bool(net.large.any())
    assert net.body[1].running_var is replaced
    assert torch.equal(replaced, torch.ones(8))


def test_the_ring_qualifies_goes_further_back_and_recycles() -> None:
    layer = nn.Linear(1, 1, bias=False)
    ring = SnapshotRing(keep=2, good_steps=3)

    def take(value: float, *, qualified: bool = False) -> None:
        nn.init.constant_(layer.weight, value)
        ring.capture(lambda snapshot: snapshot.capture([layer], []), qualified=qualified)

    def roll_back() -> float:
        ring.roll_back().restore([layer], [])
        return layer.weight.item()

    take(0.0, qualified=True)
    take(1.0)
    ring.good_step()
    assert ring.is_pending
    assert roll_back() == 0.0  # 1.0 had not proven itself
    take(2.0)
    for _ in range(3):
        ring.good_step()
    assert not ring.is_pending
    assert roll_back() == 2.0
    assert roll_back() == 0.0  # again, before another was qualified: one further back
    assert roll_back() == 0.0
    for value in (3.0, 4.0, 5.0):
        take(value)
        for _ in range(3):
            ring.good_step()
    assert len(ring) == 2
    assert [roll_back(), roll_back()] == [5.0, 4.0]


def test_any_nonfinite() -> None:
    assert not any_nonfinite([])
    assert not any_nonfinite([torch.ones(2), torch.ones(2, dtype=torch.long)])
    assert any_nonfinite([torch.ones(2), torch.tensor([torch.inf])])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinity_is_seen_in_any_precision(dtype: torch.dtype) -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        sick = [torch.tensor([1.0, value], dtype=dtype)]
        assert any_nonfinite(sick)
        assert any_nonfinite([], squares=sick)
    assert not any_nonfinite([torch.full((2,), torch.finfo(torch.float16).max).to(dtype)])


def test_squares_may_be_larger() -> None:
    squares = [torch.tensor([1e20])]
    assert any_nonfinite(squares)
    assert not any_nonfinite([], squares)
    assert any_nonfinite([], [*squares, torch.tensor([1e35])])


@pytest.mark.parametrize("is_first", [True, False])
def test_the_flag_is_on_the_device_and_not_on_the_host(is_first: bool) -> None:
    counter, weight = torch.ones(()), torch.ones(2, device="meta")
    assert any_nonfinite([counter, weight] if is_first else [weight, counter]).is_meta
    assert any_nonfinite([weight], squares=[counter]).is_meta


def test_what_is_still_being_copied_is_compared_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_late(monkeypatch)
    layer, snapshot = nn.Linear(2, 2), Snapshot()
    nn.init.constant_(layer.weight, 7.0)
    snapshot.capture([layer], [])
    compared = {name: saved for name, _, saved in snapshot.compare(layer.named_parameters(), [])}
    assert torch.equal(compared["weight"], layer.weight)


def test_each_copy_is_of_one_device_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch copies tensor by tensor."""
    copy, kinds = torch._foreach_copy_, []

    def spy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        pairs = zip(targets, sources, strict=True)
        kinds.append({(t.device, t.dtype, s.device, s.dtype) for t, s in pairs})
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", spy)
    net = Net()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps(net, optimizer, 1)
    snapshot, copies = Snapshot(), BufferCopies(net)
    snapshot.capture([net], [optimizer])
    snapshot.restore([net], [optimizer])
    copies.refresh()
    copies.restore()
    assert [len(kind) for kind in kinds] == [1] * 8
    assert len(set.union(*kinds)) == 2


def test_random_numbers_of_a_gpu_that_nobody_uses_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for them would set up CUDA, and processes that are forked later could not use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("CUDA was set up"))
    set_rng_state(rng_state())


@pytest.mark.parametrize(("optimizer", "bytes_a_weight"), [("adam", 12), ("sgd", 8)])
def test_a_snapshot_takes_the_memory_that_the_docs_say(optimizer: str, bytes_a_weight: int) -> None:
    net = nn.Linear(500, 400)
    trained = OPTIMIZERS[optimizer](net.parameters())
    net(torch.ones(1, 500)).sum().backward()
    trained.step()
    ring = SnapshotRing(keep=2)
    for _ in range(10):
        ring.capture(lambda snapshot: snapshot.capture([net], [trained]))
        for _ in range(10):
            ring.good_step()
    snapshots = {id(s): s for s in (ring.newest(), ring.oldest(), *ring._free)}
    assert len(snapshots) == 3
    for snapshot in snapshots.values():
        assert snapshot.n_bytes() == pytest.approx(bytes_a_weight * (500 * 400 + 400), rel=1e-3)
