"""Between logged steps the host never synchronizes (deferred), or once a step (exact), without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import MeanSquaredError

from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    GlobalNormClipping,
    GradientNormMonitor,
    InitializationCheck,
    LearningRateBackoff,
    NaNRollback,
    PercentileClipping,
    PerTensorClipping,
    UnitwiseClipping,
    ZScoreClipping,
    default_callbacks,
)
from lightning_gradguard.core.norms import Gradients
from tests.fake_cuda import DEVICE, BatchTracker, FakeCuda, Interaction, Kind, fake_cuda, strategy
from tests.tasks import NOT_A_NUMBER, Batch, Classifier, batches, fit, insert, same, weights

N = 24
LOGGED = 6
#: Batches in which one-time allocations happen: state, memory, Lightning's own records.
WARM_UP = 8
HOT = [batch for batch in range(WARM_UP, N - 1) if (batch + 1) % LOGGED]
LOGGING = [batch for batch in range(WARM_UP, N - 1) if (batch + 1) % LOGGED == 0]
CHECKS = ["deferred", "exact"]


class Network(Classifier):
    """Has the state that a forward pass changes: BatchNorm, a metric, epoch means."""

    def __init__(self, optimizer: str = "adamw fused") -> None:
        super().__init__(optimizer, norm=True, dropout=0.1)
        self.error = MeanSquaredError()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, target = batch
        self.error(self.net(inputs).detach()[:, 0], target.float())
        self.log("error", self.error, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def suite(check: Any, policy: ClippingPolicy | None = None) -> list[Any]:
    return default_callbacks(
        training_diagnosis=None,  # its sampled steps have one transfer more
        nan_rollback=NaNRollback(check=check, snapshot_every_n_steps=4),
        adaptive_gradient_clipping=AdaptiveGradientClipping(policy),
    )


def seen_of(
    callbacks: Sequence[Any],
    module: pl.LightningModule | None = None,
    data: Sequence[Batch] | None = None,
    **arguments: Any,
) -> list[Interaction]:
    """Fits on the device; returns the recorded interactions."""
    with fake_cuda() as cuda:
        fit_there(cuda, module or Network(), data or batches(N), callbacks, **arguments)
    return cuda.seen


def fit_there(
    cuda: FakeCuda,
    module: pl.LightningModule,
    data: Sequence[Batch],
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> None:
    settings = {"strategy": strategy(), "accelerator": "auto", "log_every_n_steps": LOGGED, **arguments}
    fit(module, data, [BatchTracker(cuda), *callbacks], **settings)


def expect(n: int, kind: Kind, seen: Iterable[Interaction], at: Iterable[int] = HOT) -> None:
    """Asserts the number of interactions of the package in each batch; prints their lines otherwise."""
    seen = [sight for sight in seen if sight.kind == kind and sight.is_own]
    for batch in at:
        found = [str(sight) for sight in seen if sight.batch == batch]
        assert len(found) == n, "\n".join(["", *dict.fromkeys(found)])


def expect_of(
    check: str, seen: Sequence[Interaction], at: Iterable[int] = HOT, logged: int = 0, sent: int = 2
) -> None:
    """Asserts no synchronization for a deferred step, one for an exact one, and those of logging.

    A deferred step sends the values of its check and those of the default clipping policy, and reads them
    a whole batch later. Snapshots are copied on a
    stream of their own, without a synchronization.
    """
    at = list(at)
    if check == "exact":
        expect(logged + 1, "sync", seen, at)
        expect(0, "late sync", seen, at)
    else:
        expect(logged, "sync", seen, at)
        expect(sent, "late sync", seen, at)
        expect(sent, "send", [sight for sight in seen if not sight.aside], at)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw fused", "sgd", "sgd fused"])
def test_between_logged_steps(optimizer: str, check: str) -> None:
    callbacks = suite(check)
    seen = seen_of(callbacks, Network(optimizer))
    expect_of(check, seen)
    assert any(sight.aside and sight.batch in HOT for sight in seen), "no snapshot was taken"
    # numbers that are read before their copy completes are NaN
    assert [c.skips for c in callbacks if isinstance(c, NaNRollback)] == [0]
    # nor do torch and Lightning synchronize with values of the suite, such as a scale for a fused optimizer
    assert others(seen) == others(seen_of([], Network(optimizer)))


def others(seen: Iterable[Interaction]) -> list[str]:
    return [str(sight) for sight in seen if not sight.is_own and sight.batch in HOT]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "policy", [GlobalNormClipping, ZScoreClipping, PercentileClipping, UnitwiseClipping, PerTensorClipping]
)
def test_synchronizations_with_any_policy(policy: Callable[[], ClippingPolicy], check: str) -> None:
    expect_of(check, seen_of(suite(check, policy()), Classifier("sgd")), sent=1)


@pytest.mark.parametrize("check", CHECKS)
def test_while_gradients_accumulate(check: str) -> None:
    seen = seen_of(suite(check), accumulate_grad_batches=2, log_every_n_steps=LOGGED // 2)
    expect_of(check, seen, [batch for batch in HOT if batch % 2])
    between = [sight for sight in seen if sight.batch in HOT and sight.batch % 2 == 0]
    assert [str(sight) for sight in between if sight.is_own and not sight.aside] == []


@pytest.mark.parametrize("check", CHECKS)
def test_logged_step_takes_one_transfer(check: str) -> None:
    expect_of(check, seen_of(suite(check)), LOGGING, logged=1)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("device", ["cpu", "same"])
def test_nan_rollback_alone(device: Any, check: Any) -> None:
    rollback = NaNRollback(check=check, snapshot_every_n_steps=4, snapshot_device=device)
    expect_of(check, seen_of([rollback]), sent=1)


@pytest.mark.parametrize(
    "callback", [AdaptiveGradientClipping, GradientNormMonitor, InitializationCheck, LearningRateBackoff]
)
def test_others_alone(callback: Callable[[], pl.Callback]) -> None:
    seen = seen_of([callback()])
    expect(0, "sync", seen)
    expect(int(callback is AdaptiveGradientClipping), "late sync", seen)


# The rest tests the simulated device itself: no synchronization is missed.

HIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda g: g.sum().item(),
    "bool": lambda g: bool(g.sum() > 0),
    "float": lambda g: float(g.sum()),
    "format": lambda g: f"{g.sum():.3f}",
    "tolist": lambda g: g.sum(0).tolist(),
    "cpu": lambda g: g.cpu(),
    "to a name": lambda g: g.to("cpu", torch.float64),
    "to a tensor": lambda g: g.to(torch.zeros(())),
    "copy into memory that is not pinned": lambda g: torch.empty(g.shape).copy_(g, non_blocking=True),
    "copy that blocks": lambda g: torch.empty(g.shape, pin_memory=True).copy_(g),
    "many copies": lambda g: torch._foreach_copy_([torch.empty(g.shape)], [g]),
    "from a list": lambda g: torch.tensor([1.0, 2.0], device=g.device),
    "from memory that is not pinned": lambda g: torch.ones(2).to(g.device, non_blocking=True),
    "list of tensors": lambda g: torch.tensor([g.sum()]),
    "nonzero": lambda g: g.nonzero(),
    "mask": lambda g: g[g > 0],
    "places on the host": lambda g: g[torch.tensor([0])],
    "list of places": lambda g: g[[0, 1]],
    "equal": lambda g: torch.equal(g, g),
    "event": lambda g: torch.cuda.current_stream().record_event().synchronize(),
    "stream": lambda g: torch.cuda.current_stream().synchronize(),
    "device": lambda g: torch.cuda.synchronize(),
}
HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda g: torch.stack(torch._foreach_norm([g, g])).nanquantile(0.5).clamp(max=1.0),
    "fill": lambda g: torch.zeros(3, device=g.device).index_fill_(0, (g[0, :1] > 0).long(), 2.0),
    "places": lambda g: g[(g[:1, 0] > 0).long()][0, :2],
    "put": lambda g: g.clone().index_put_((g > 0,), g.sum()),
    "where": lambda g: g.masked_fill(g > 0, 1.0).where(g < 0, torch.tensor(2.0)),
    "there already": lambda g: g.to(g.device).to(g.sum()).to(torch.float64),
    "sent": lambda g: g.to("cpu", non_blocking=True),
    "sent into pinned memory": lambda g: torch.empty(g.shape, pin_memory=True).copy_(g, non_blocking=True),
    "from pinned memory": lambda g: torch.empty(2, pin_memory=True).to(g.device, non_blocking=True),
}


class Curious(ClippingPolicy):
    """Reads a gradient in a given way."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        self.look = look

    def coefficients(self, gradients: Gradients) -> Tensor:
        self.look(gradients.tensors[0])
        return torch.ones_like(gradients.total_norm)


@pytest.mark.parametrize("look", HIDDEN.values(), ids=HIDDEN.keys())
def test_hidden_synchronization_is_recorded(look: Callable[[Tensor], Any]) -> None:
    seen = seen_of([AdaptiveGradientClipping(Curious(look))], Classifier("sgd"), batches(3))
    expect(1, "sync", seen, [1])
    (where,) = [sight.where for sight in seen if sight.kind == "sync" and sight.is_own and sight.batch == 1]
    assert where.startswith("lightning_gradguard/callbacks/adaptive_gradient_clipping.py:")


@pytest.mark.parametrize("look", HARMLESS.values(), ids=HARMLESS.keys())
def test_harmless_operation_is_not_recorded(look: Callable[[Tensor], Any]) -> None:
    seen = seen_of([AdaptiveGradientClipping(Curious(look))], Classifier("sgd"), batches(3))
    expect(0, "sync", seen, [1])


def test_copies_complete_on_synchronization() -> None:
    with fake_cuda():
        there = torch.tensor([1.0, 2.0], device=DEVICE)
        here = there.to("cpu", non_blocking=True)
        sent = torch.cuda.current_stream().record_event()
        later = (2 * there).to("cpu", non_blocking=True)
        assert here.isnan().all()
        sent.synchronize()
        assert here.tolist() == [1.0, 2.0]
        assert later.isnan().all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
def test_the_device_computes_what_a_cpu_computes(optimizer: str) -> None:
    there, here = Classifier(optimizer, norm=True), Classifier(optimizer, norm=True)
    with fake_cuda() as cuda:
        fit_there(cuda, there, batches(5))
    assert not any(sight.is_own for sight in cuda.seen)
    fit(here, batches(5))
    assert same(weights(there), weights(here))


@pytest.mark.parametrize("check", CHECKS)
def test_nan_batch_is_skipped_on_the_device(check: str) -> None:
    callbacks = suite(check)
    network = Network()
    seen_of(callbacks, network, insert(batches(12), 6, NOT_A_NUMBER))
    assert [c.skips for c in callbacks if isinstance(c, NaNRollback)] == [1]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(network))
