"""Norms of units stay below the bound, and skipped steps change no bit."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_gradguard import NaNRollback, WeightNormConstraint, default_callbacks
from lightning_gradguard.core.norms import local_shard, project_units_
from tests.tasks import NOT_A_NUMBER, Classifier, batches, fit, insert, optimizer_state, same, weights


def norms(weight: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1)
    return found


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    shape=st.sampled_from([(3, 4), (1, 300), (7, 2, 3, 3), (64, 512)]),
    dim=st.sampled_from([0, 1]),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_projection_is_that_of_torch_and_is_idempotent(
    seed: int, dtype: torch.dtype, shape: tuple[int, ...], dim: int, scale: float
) -> None:
    weight = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    expected = torch.renorm(weight.double(), 2, dim, 2.0)
    project_units_(weight, 2.0, dim)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.double(), expected, rtol=2 * eps + 2e-6, atol=1e-7)
    once = weight.clone()
    project_units_(weight, 2.0, dim)
    assert torch.equal(weight, once)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_unit_is_left_as_it_is(value: float) -> None:
    weight = torch.tensor([[value, 3.0], [3.0, 4.0]])
    project_units_(weight, 1.0)
    torch.testing.assert_close(weight, torch.tensor([[value, 3.0], [0.6, 0.8]]), equal_nan=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw fused"])
def test_units_stay_within_the_bound(optimizer: str) -> None:
    class Watch(pl.Callback):
        largest = 0.0

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self.largest = max(float(norms(p).max()) for p in pl_module.parameters() if p.ndim > 1)

    bare, watch = Watch(), Watch()
    fit(Classifier(optimizer), batches(30), [bare])
    fit(Classifier(optimizer), batches(30), [watch, WeightNormConstraint(max_norm=0.3)])
    assert bare.largest > 0.3
    assert watch.largest <= 0.3 * (1 + 1e-6)


def test_include_and_exclude() -> None:
    def run(**arguments: Any) -> list[bool]:
        module = Classifier()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(100)
        fit(module, batches(1), [WeightNormConstraint(max_norm=1.0, **arguments)])
        return [float(norms(p).max()) <= 1 + 1e-6 for p in module.parameters() if p.ndim > 1]

    assert run() == [True, True, True]
    assert run(exclude=["net.6"]) == [True, True, False]
    assert run(include=["net.0", "net.6"], exclude=["net.6"]) == [True, False, False]


@pytest.mark.parametrize("check", ["exact", "deferred"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_no_trace(check: Any, fused: bool) -> None:
    class Fused(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=3e-2, fused=fused)

    def run(data: Any) -> list[Tensor]:
        module = Fused(seed=3)
        constraint = WeightNormConstraint(max_norm=0.3)
        rollback = NaNRollback(check=check)
        trainer = fit(module, data, [constraint, rollback])
        skipped.append(rollback.skips)
        return [*weights(module), *optimizer_state(trainer)]

    skipped: list[int] = []
    data = batches(8)
    following = [] if check == "exact" else [batches(1, seed=9)[0]]  # lost with the bad one
    assert same(run(insert(data, 4, NOT_A_NUMBER, *following)), run(data))
    assert same(run(insert(data, 0, NOT_A_NUMBER, *following)), run(data))
    assert skipped == [1, 0, 1, 0]


def test_every_order_beside_the_suite_gives_the_same_weights() -> None:
    def run(last: bool) -> list[Tensor]:
        module, constraint = Classifier("adam"), WeightNormConstraint(max_norm=0.3)
        suite = default_callbacks()
        fit(module, batches(12), [*suite, constraint] if last else [constraint, *suite])
        return weights(module)

    assert same(run(True), run(False))


def test_hooks_are_removed_after_the_fit_and_after_an_exception() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    constraint = WeightNormConstraint()
    trainer = fit(Classifier(), batches(2), [constraint])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fails(), batches(4), [constraint])
    assert not constraint._handles


def test_units_that_ranks_hold_parts_of_are_rejected_by_name() -> None:
    def sharded(dim: int) -> nn.Module:
        layer = nn.Linear(8, 4)
        local = layer.weight.detach().clone()
        layer.weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)]))
        return layer

    constraint = WeightNormConstraint(0.1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        by_row = sharded(0)
        constraint._project(constraint._constrained(by_row))
        assert float(norms(local_shard(by_row.weight)).max()) <= 0.1 + 1e-6  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"units of 'weight': ranks hold parts of them \(S\(1\)\)"):
            constraint._constrained(sharded(1))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0}, "max_norm=0 must be a positive number"),
        ({"dim": 0.5}, "dim=0.5 must be a whole number"),
        ({"exclude": "head"}, "exclude='head' must be a list of names"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightNormConstraint(**arguments)
