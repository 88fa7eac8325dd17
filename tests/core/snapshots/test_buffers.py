"""Buffers are restored after any change."""

from __future__ import annotations

from typing import Any

import torch

from lightning_gradguard.core.snapshots import BufferCopies
from tests.core.snapshots.training import Net


def test_buffers_are_restored_after_writes_and_replacement() -> None:
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


def test_buffer_that_gets_other_memory_is_restored() -> None:
    net: Any = torch.nn.Module()
    net.register_buffer("queue", torch.ones(2, 3))
    queue = net.queue
    copies = BufferCopies(net)
    queue.data = torch.zeros(5, 3)
    copies.restore()
    assert net.queue is queue
    assert torch.equal(queue, torch.ones(2, 3))
    queue.data = torch.zeros(4, 3)
    copies.refresh()
    queue += 1
    copies.restore()
    assert torch.equal(queue, torch.zeros(4, 3))
