"""DDP over NCCL and FSDP1, in a world of one process: the numbers and decisions of a single device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_gradguard import GradientNormMonitor, NaNRollback, default_callbacks
from tests.gpu.tasks import Network, Observer, fit_there
from tests.tasks import NOT_A_NUMBER, Batch, batches, insert, same

# NCCL and FSDP1 warn of a world of one process
pytestmark = pytest.mark.filterwarnings("ignore")
STRATEGIES = ["ddp", "fsdp"]


@pytest.fixture(autouse=True)
def _a_world_of_its_own() -> Iterator[None]:
    """Removes the process group that Lightning leaves, and the variables that name it."""
    with patch.dict(os.environ):
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


def run(
    data: Sequence[Batch], strategy: str, optimizer: str, *, norm: bool = True
) -> tuple[Observer, NaNRollback]:
    observer, rollback = Observer(), NaNRollback(snapshot_every_n_steps=10)
    suite = default_callbacks(
        nan_rollback=rollback,
        gradient_norm_monitor=GradientNormMonitor(every_n_steps=1),
        learning_rate_backoff=None,
    )
    arguments: dict[str, Any] = {"strategy": strategy, "use_distributed_sampler": False}
    fit_there(Network(optimizer, norm=norm), data, [*suite, observer], **arguments)
    assert all(bool(tensor.isfinite().all()) for tensor in observer.final)
    return observer, rollback


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numbers_are_those_of_a_single_device(strategy: str, optimizer: str) -> None:
    data = insert(batches(30), 9, NOT_A_NUMBER)
    # ahead of normalization, a bias has a gradient of rounding errors, from which Adam makes full steps
    single, _ = run(data, "auto", optimizer, norm=False)
    there, rollback = run(data, strategy, optimizer, norm=False)
    assert dist.get_backend() == "nccl"
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert [kind for kind, step in there.received if step == 9] == ["nonfinite_loss"]
    assert len(there.totals) == 31
    assert there.totals == pytest.approx(single.totals, rel=1e-5)
    for one, two in zip(there.final, single.final, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skip_leaves_no_trace(strategy: str) -> None:
    clean = batches(20)
    poisoned_run, rollback = run(insert(clean, 9, NOT_A_NUMBER), strategy, "adamw fused")
    twin, _ = run(clean, strategy, "adamw fused")
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(poisoned_run.final, twin.final)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rollback_is_exact(strategy: str) -> None:
    clean = batches(60)
    poisoned_run, rollback = run(insert(clean, 31, *[NOT_A_NUMBER] * 3), strategy, "adamw fused")
    twin, _ = run([*clean[:20], *clean[31:]], strategy, "adamw fused")
    assert (rollback.skips, rollback.rollbacks) == (3, 1)
    assert same(poisoned_run.final, twin.final)
