"""Snapshots are qualified by good steps, and their memory is recycled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradguard.core.snapshots import SnapshotRing
from lightning_gradguard.core.snapshots.ring import GOOD_STEPS
from tests.core.snapshots.training import OPTIMIZERS


def test_ring_qualifies_rolls_back_further_and_recycles() -> None:
    layer = nn.Linear(1, 1, bias=False)
    ring = SnapshotRing(keep=2)

    def take(value: float, *, qualified: bool = False) -> None:
        nn.init.constant_(layer.weight, value)
        ring.capture(lambda snapshot: snapshot.capture([layer], []), qualified=qualified)

    def roll_back() -> float:
        ring.roll_back().restore([layer], [])
        return layer.weight.item()

    take(0.0, qualified=True)
    take(1.0)
    ring.good_step()
    assert ring.pending is not None
    assert roll_back() == 0.0  # 1.0 is not qualified
    take(2.0)
    for _ in range(GOOD_STEPS):
        ring.good_step()
    assert ring.pending is None
    assert roll_back() == 2.0
    assert roll_back() == 0.0  # again before another is qualified: one further back
    assert roll_back() == 0.0
    for value in (3.0, 4.0, 5.0):
        take(value)
        for _ in range(GOOD_STEPS):
            ring.good_step()
    assert len(ring) == 2
    assert [roll_back(), roll_back()] == [5.0, 4.0]


@pytest.mark.parametrize(
    ("loss", "snapshots", "restored"), [(2.29, 3, 0.0), (2.29, 6, 6.0), (1.9, 3, 3.0)], ids=str
)
def test_a_network_that_is_dead_goes_back_to_its_start_unless_it_had_learned(
    loss: float, snapshots: int, restored: float
) -> None:
    layer, ring = nn.Linear(1, 1, bias=False), SnapshotRing(keep=2)
    for value in range(snapshots + 1):
        nn.init.constant_(layer.weight, value)
        ring.capture(lambda snapshot: snapshot.capture([layer], []), qualified=value == 0)
        for _ in range(GOOD_STEPS):
            ring.good_step(loss if value else 2.3)
    ring.roll_back(trusted=True, learned=True).restore([layer], [])
    assert layer.weight.item() == restored


@pytest.mark.parametrize(("optimizer", "bytes_a_weight"), [("adam", 12), ("sgd", 8)])
def test_snapshots_take_the_documented_memory(optimizer: str, bytes_a_weight: int) -> None:
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
        n_bytes = sum(tensor.nbytes for tensor in snapshot._memory.values())
        assert n_bytes == pytest.approx(bytes_a_weight * (500 * 400 + 400), rel=1e-3)
