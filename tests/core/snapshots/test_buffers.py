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
