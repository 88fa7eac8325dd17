"""Compiled networks, with and without CUDA graphs: a lost batch leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_gradguard import NaNRollback, default_callbacks
from tests.gpu.tasks import Network, everything, finite, fit_there
from tests.tasks import NOT_A_NUMBER, batches, insert, same

# the compiler advises on speed, and warns of its own parts
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_lost_batch_leaves_no_trace(mode: str) -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    counters.clear()
    clean = batches(60)
    # with running statistics, which a graph would have to write, CUDA graphs might be skipped
    network = Network("adamw fused", norm=False)
    network.net = torch.compile(network.net, mode=mode)  # type: ignore[assignment]
    start = copy.deepcopy(network.state_dict())
    storm = [NOT_A_NUMBER] * 3
    results = []
    # the first run compiles; after it all use the same kernels, from the first step to the last
    for data in (
        clean[:5],
        clean,
        insert(clean, 9, NOT_A_NUMBER),
        insert(clean, 31, *storm),
        [*clean[:20], *clean[31:]],
    ):
        network.load_state_dict(start)
        rollback = NaNRollback(snapshot_every_n_steps=10)
        suite: list[Any] = default_callbacks(nan_rollback=rollback, learning_rate_backoff=None)
        trainer = fit_there(network, data, suite)
        assert finite(trainer)
        results.append(([t.clone() for t in everything(trainer)], rollback.skips, rollback.rollbacks))
    _, bare, skipped, rolled_back, twin = results
    assert [r[1:] for r in (bare, skipped, rolled_back, twin)] == [(0, 0), (1, 0), (3, 1), (0, 0)]
    assert same(skipped[0], bare[0])
    assert same(rolled_back[0], twin[0])
    if mode == "reduce-overhead":
        assert counters["inductor"]["cudagraph_skips"] == 0
