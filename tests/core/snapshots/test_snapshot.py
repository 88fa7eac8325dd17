"""A snapshot restores every tensor bit for bit, in place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_gradguard.core.snapshots import BufferCopies, Snapshot, rng_state, set_rng_state
from lightning_gradguard.core.snapshots.snapshot import SMALL_START
from tests.core.snapshots.training import OPTIMIZERS, Net, steps
from tests.tasks import copy_late


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_restored_run_is_repeated_bitwise(name: str, before: int) -> None:
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


def test_memory_is_allocated_once() -> None:
    net = Net()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps(net, optimizer, 1)
    snapshot = Snapshot()
    snapshot.capture([net], [optimizer])
    memory = {key: tensor.data_ptr() for key, tensor in snapshot._memory.items()}
    steps(net, optimizer, 1)
    snapshot.capture([net], [optimizer])
    assert memory == {key: tensor.data_ptr() for key, tensor in snapshot._memory.items()}


def test_compare_synchronizes_with_a_copy_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_late(monkeypatch)
    layer, snapshot = nn.Linear(2, 2), Snapshot()
    nn.init.constant_(layer.weight, 7.0)
    snapshot.capture([layer], [])
    compared = {name: saved for name, _, saved in snapshot.compare(layer.named_parameters(), [])}
    assert torch.equal(compared["weight"], layer.weight)


def test_distance_of_the_trained_weights() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    zeros, optimizers = nn.Linear(2, 2, bias=False), {}
    nn.init.zeros_(zeros.weight)
    snapshot = Snapshot()
    snapshot.capture([layer, zeros], [])
    for module in (layer, other, zeros):
        optimizers[module] = torch.optim.SGD(module.parameters(), lr=1.0)
        assert snapshot.distance([optimizers[module]]) == 0.0
    with torch.no_grad():
        for weight in (*layer.parameters(), *other.parameters(), *zeros.parameters()):
            weight.mul_(3.0).add_(weight == 0)
    found = {module: snapshot.distance([optimizer]) for module, optimizer in optimizers.items()}
    assert found[layer] == pytest.approx(2.0)
    assert found[other] == 0.0  # there is no copy of it
    assert found[zeros] == pytest.approx(2.0 / (SMALL_START * (2 / 3) ** 0.5))  # zeros have no scale


def test_distance_from_nothing_is_infinite() -> None:
    bias, snapshot = nn.Parameter(torch.zeros(2)), Snapshot()
    optimizer = torch.optim.SGD([bias], lr=1.0)
    module = nn.ParameterList([bias])
    snapshot.capture([module], [])
    with torch.no_grad():
        bias.add_(1.0)
    assert snapshot.distance([optimizer]) == math.inf


def test_each_copy_is_of_one_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert [len(kind) for kind in kinds] == [1] * 9
    assert len(set.union(*kinds)) == 2
