"""A guarded loop ends as one without the bad batches, rolls back exactly, and resumes as if uninterrupted."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    GlobalNormClipping,
    LearningRateBackoff,
    NaNRollback,
    TrainingDivergedError,
    TrainingGuard,
    UnitwiseClipping,
    ZScoreClipping,
)
from lightning_gradguard.core.backoff import Backoff
from lightning_gradguard.core.training_guard import StepOutcome
from tests.fake_cuda import DEVICE, fake_cuda

NAN, INF, TOO_LARGE = torch.nan, torch.inf, 1e30
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
}


class Net(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        return self.body(x)  # type: ignore[no-any-return]


def batch(index: int, factor: float = 1.0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(index)) * factor


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x.sum(1, keepdim=True)).square().mean()  # type: ignore[no-any-return]


class Loop:
    """A training loop on seeded batches; `play` gives it some of them, each multiplied by a factor."""

    def __init__(self, optimizer: str = "adamw", device: Any = "cpu", **arguments: Any) -> None:
        torch.manual_seed(0)
        self.net = Net().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.guard = TrainingGuard(self.net, self.optimizer, **arguments)

    def step(self, index: int, factor: float = 1.0) -> StepOutcome:
        self.optimizer.zero_grad()
        loss = loss_of(self.net, batch(index, factor).to(self.net.seen.device))
        loss.backward()
        return self.guard.step(loss)

    def play(self, factors: Sequence[float], start: int = 0) -> list[StepOutcome]:
        return [self.step(index, factor) for index, factor in enumerate(factors, start)]

    def state(self) -> list[Tensor]:
        """Copies of weights, buffers, and the optimizer's state."""
        states = self.optimizer.state_dict()["state"].values()
        own = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [tensor.detach().clone() for tensor in (*self.net.parameters(), *self.net.buffers(), *own)]


def is_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=8)
@given(factors=st.lists(st.sampled_from([1.0, 1.0, 1.0, NAN, INF, TOO_LARGE]), min_size=1, max_size=12))
def test_skipped_batches_leave_no_trace(optimizer: str, factors: list[float]) -> None:
    loop, clean = (Loop(optimizer, patience=100, snapshot_every_n_steps=3) for _ in range(2))
    for index, (outcome, factor) in enumerate(zip(loop.play(factors), factors, strict=True)):
        assert outcome.action == ("stepped" if factor == 1 else "skipped")
        if factor == 1:
            assert clean.step(index) == outcome
    assert is_same(loop.state(), clean.state())
    assert loop.guard.skips == sum(factor != 1 for factor in factors)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_healthy_run_is_that_of_a_bare_loop(optimizer: str) -> None:
    guarded, bare = (Loop(optimizer, policy=GlobalNormClipping(1e9)) for _ in range(2))
    guarded.play([1.0] * 30)
    with patch.object(bare.guard, "step", lambda loss: bare.optimizer.step()):
        bare.play([1.0] * 30)
    assert is_same(guarded.state(), bare.state())


@pytest.mark.parametrize("policy", [ZScoreClipping, UnitwiseClipping])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rollback_restores_the_qualified_snapshot(optimizer: str, policy: Any) -> None:
    loop = Loop(optimizer, policy=policy(), snapshot_every_n_steps=12)
    start = loop.state()
    actions = [outcome.action for outcome in loop.play([1.0] * 5 + [NAN] * 3)]
    assert actions[5:] == ["skipped", "skipped", "rolled_back"]
    assert is_same(loop.state(), [*start, *loop.state()[len(start) :]])
    loop.play([1.0] * 12)
    snapshot, history = loop.state(), copy.deepcopy(loop.guard.policy.state_dict())
    loop.play([1.0] * 11, start=12)
    assert loop.play([NAN] * 3)[-1].action == "rolled_back"
    assert is_same(loop.state(), snapshot)
    assert str(loop.guard.policy.state_dict()) == str(history)
    assert loop.guard.rollbacks == 2


def test_rollback_on_rollback_goes_further_back() -> None:
    loop = Loop(snapshot_every_n_steps=1, patience=1)
    states = [loop.state()]
    for index in range(40):
        loop.step(index)
        states.append(loop.state())
    reached = []
    for _ in range(3):
        loop.step(0, NAN)
        reached.append(next(i for i, state in enumerate(states) if is_same(state, loop.state())))
    # a snapshot is pending for ten good steps, and the next is taken after them; two are kept
    assert reached == [21, 11, 11]


def test_flipped_bit_of_a_weight_is_rolled_back_at_once() -> None:
    loop = Loop(snapshot_every_n_steps=5)
    loop.play([1.0] * 20)
    loop.net.get_parameter("body.3.weight").data.view(torch.int32)[0, 0] ^= 1 << 30
    outcomes = loop.play([1.0] * 4, start=20)
    assert [outcome.action for outcome in outcomes] == ["skipped", "rolled_back", "stepped", "stepped"]
    assert outcomes[1].kind == "nonfinite_weights"
    assert all(tensor.abs().max() < 1e3 for tensor in loop.net.parameters())


def test_nonfinite_statistics_of_a_finite_loss_are_not_committed() -> None:
    loop = Loop()
    before = loop.state()
    # the variance overflows, the normalized output is zero
    loss = loop.net(batch(0, 1e25)).square().mean()
    loss.backward()
    outcome = loop.guard.step(loss)
    assert (outcome.action, outcome.kind) == ("skipped", "nonfinite_buffers")
    assert torch.isfinite(torch.tensor(outcome.loss))
    assert is_same(loop.state(), before)


def test_nonfinite_gradients_are_named() -> None:
    loop = Loop()
    weight = loop.net.get_parameter("body.3.weight")
    with weight.register_hook(lambda gradient: gradient * torch.nan):
        outcome = loop.step(0)
    assert (outcome.action, outcome.kind) == ("skipped", "nonfinite_gradient")
    assert outcome.where == ("body.3.weight",)
    assert all(parameter.grad is None for parameter in loop.net.parameters())


def test_finite_spike_is_clipped_and_taken() -> None:
    loop = Loop()
    loop.play([1.0] * 40)
    with loop.net.get_parameter("body.3.weight").register_hook(lambda gradient: gradient * 1000):
        outcome = loop.step(40)
    assert outcome.action == "stepped"
    assert outcome.total_norm > 100
    assert outcome.coefficient < 1


def test_coefficient_of_a_unitwise_policy_is_the_smallest() -> None:
    outcome = Loop(policy=UnitwiseClipping(clipping=1e-4)).step(0)
    assert isinstance(outcome.coefficient, Tensor)
    assert 0 < outcome.coefficient < 1


def test_lasting_spike_is_rolled_back() -> None:
    loop = Loop(optimizer="sgd", snapshot_every_n_steps=10)
    loop.play([1.0] * 60)
    for module in loop.net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(1000)
    outcomes = loop.play([1.0] * 12, start=60)
    (index,) = (i for i, outcome in enumerate(outcomes) if outcome.action == "rolled_back")
    assert outcomes[index].kind == "divergence"
    assert loop.net.get_parameter("body.3.weight").abs().max() < 100
    assert outcomes[-1].loss < outcomes[index].loss / 100


def test_collapse_is_rolled_back() -> None:
    loop = Loop(snapshot_every_n_steps=2)
    loop.play([1.0] * 20)
    for name in ("body.3.weight", "body.1.weight", "body.1.bias"):
        loop.net.get_parameter(name).data.zero_()
    loop.optimizer.param_groups[0]["lr"] = 0.0
    outcomes = loop.play([1.0] * 12, start=20)
    assert [outcome.kind for outcome in outcomes].index("gradient_collapse") == 9
    assert outcomes[9].action == "rolled_back"


@settings(max_examples=8)
@given(
    before=st.lists(st.sampled_from([1.0, 1.0, NAN]), min_size=1, max_size=30),
    after=st.lists(st.sampled_from([1.0, 1.0, NAN]), min_size=1, max_size=20),
)
def test_resumed_loop_is_the_uninterrupted_one(before: list[float], after: list[float]) -> None:
    loop, resumed = (Loop(patience=2, backoff=Backoff(rewarm_steps=5)) for _ in range(2))
    loop.play(before)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (loop.net, loop.optimizer, loop.guard)], file)
    file.seek(0)
    resumed.net.seen.copy_(loop.net.seen)  # not part of the module's state_dict
    net, optimizer, guard = torch.load(file)
    resumed.net.load_state_dict(net)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.guard.load_state_dict(guard)
    assert str(resumed.guard.state_dict()) == str(loop.guard.state_dict())
    for index, factor in enumerate(after, len(before)):
        outcome = loop.step(index, factor)
        assert str(resumed.step(index, factor)) == str(outcome)
        if outcome.action == "rolled_back":
            return  # snapshots are not part of the state
        assert is_same(resumed.state(), loop.state())
    assert str(resumed.guard.state_dict()) == str(loop.guard.state_dict())


def test_rollbacks_have_a_budget() -> None:
    loop = Loop(patience=1, max_rollbacks=2, snapshot_every_n_steps=2)
    start = loop.state()
    loop.play([1.0] * 14)
    loop.step(0, NAN)
    assert not is_same(loop.state(), start)
    loop.step(0, NAN)
    snapshot = loop.state()
    loop.step(0)
    with pytest.raises(TrainingDivergedError, match=r"after 2 rollbacks another .*\(max_rollbacks=2\)"):
        loop.step(0, NAN)
    assert is_same(loop.state(), snapshot)
    assert loop.guard.rollbacks == 2


def test_skips_have_a_budget() -> None:
    loop = Loop(max_skip_fraction=0.25)
    with pytest.raises(TrainingDivergedError, match=r"25% of the last 100 .*max_skip_fraction=0\.25"):
        loop.play([1.0, 1.0, NAN] * 40)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rate_is_reduced_only_within_the_step(optimizer: str) -> None:
    loop = Loop(optimizer, patience=1, backoff=Backoff(factor=0.5, rewarm_steps=0))
    used: list[float] = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: used.append(float(o.param_groups[0]["lr"])))
    asked = float(loop.optimizer.param_groups[0]["lr"])
    schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    outcomes = []
    for index, factor in enumerate([1.0, NAN, 1.0, 1.0]):
        outcomes.append(loop.step(index, factor))
        schedule.step()
    assert [outcome.learning_rate_scale for outcome in outcomes] == [1, 1, 0.5, 0.5]
    assert used == pytest.approx([asked, asked / 4 / 2, asked / 8 / 2])
    assert float(loop.optimizer.param_groups[0]["lr"]) == pytest.approx(asked / 16)


class Module(pl.LightningModule):
    """The same loop under a Trainer."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net = Net()
        self.optimizer = optimizer

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@settings(max_examples=3)
@given(bursts=st.lists(st.integers(1, 4), min_size=3, max_size=4))
def test_guard_decides_as_the_callbacks_do(optimizer: str, bursts: list[int]) -> None:
    factors = [factor for burst in bursts for factor in [1.0] * 13 + [NAN] * burst] + [1.0] * 3
    loop = Loop(optimizer, snapshot_every_n_steps=5, backoff=Backoff(rewarm_steps=5))
    loop.play(factors)
    torch.manual_seed(0)
    module = Module(optimizer)
    rollback = NaNRollback(snapshot_every_n_steps=5, max_dossiers=0)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callbacks = [AdaptiveGradientClipping(), rollback, LearningRateBackoff(rewarm_steps=5)]
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader([batch(*b) for b in enumerate(factors)], batch_size=None))  # type: ignore[arg-type]
    assert (rollback.skips, rollback.rollbacks) == (loop.guard.skips, loop.guard.rollbacks)
    trained, guarded = ([*net.parameters(), *net.buffers()] for net in (module.net, loop.net))
    assert is_same(trained, guarded)


def test_accumulated_gradients_of_a_bad_batch_are_dropped() -> None:
    layer = nn.Linear(2, 1)
    guard = TrainingGuard(layer, torch.optim.SGD(layer.parameters(), 0.1))
    before = layer.weight.detach().clone()
    layer(torch.full((1, 2), torch.nan)).sum().backward()
    loss = layer(torch.ones(1, 2)).sum()
    loss.backward()
    assert guard.step(loss).kind == "nonfinite_gradient"
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, before)


def test_several_modules_are_restored_together() -> None:
    encoder, decoder = nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    guard = TrainingGuard([encoder, decoder], optimizer, patience=1)
    before = copy.deepcopy([encoder.state_dict(), decoder.state_dict()])
    for factor in (1.0, NAN):
        optimizer.zero_grad()
        loss = decoder(encoder(torch.randn(8, 3) * factor)).square().mean()
        loss.backward()
        outcome = guard.step(loss)
    assert outcome.action == "rolled_back"
    assert {name.partition(".")[0] for name in outcome.where} == {"0", "1"}
    assert str([encoder.state_dict(), decoder.state_dict()]) == str(before)


@pytest.mark.parametrize("policy", [None, UnitwiseClipping()])
def test_step_synchronizes_once(policy: ClippingPolicy | None) -> None:
    with fake_cuda() as cuda:
        loop = Loop(device=DEVICE, policy=policy, snapshot_every_n_steps=3)
        loop.play([1.0] * 20)  # everything that is made once
        for index, factor in enumerate([1.0] * 12 + [NAN, 1.0, NAN, NAN], start=20):
            cuda.seen.clear()
            loop.step(index, factor)
            assert [sight.kind for sight in cuda.seen if sight.is_own].count("sync") == 1, cuda.seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience=0 must be a whole number of at least 1"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1 must be a whole number of at least 0"),
        ({"snapshot_every_n_steps": 2.5}, r"snapshot_every_n_steps=2\.5 must be"),
        ({"keep_snapshots": True}, "keep_snapshots=True must be"),
        ({"max_skip_fraction": 0}, r"max_skip_fraction=0 must be in \(0, 1\]"),
        ({"snapshot_device": "cuda"}, "snapshot_device='cuda' must be 'cpu' or 'same'"),
        ({"policy": 1.0}, r"policy=1\.0 is not a ClippingPolicy"),
        ({"backoff": 0.5}, r"backoff=0\.5 is not a Backoff"),
    ],
)
def test_bad_arguments_are_quoted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loop(**arguments)


def test_unsupported_optimizers_and_weights_are_rejected() -> None:
    layer = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="LBFGS is unsupported"):
        TrainingGuard(layer, torch.optim.LBFGS(layer.parameters()))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"optimizer is a Linear.*TrainingGuard\(network, optimizer\)"):
        TrainingGuard(optimizer, layer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 parameters of the optimizer are not in `modules`"):
        TrainingGuard(nn.Linear(2, 1), optimizer)
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nonfinite: load healthy ones first"):
        TrainingGuard(layer, optimizer)


def test_several_processes_are_rejected() -> None:
    with (
        patch("torch.distributed.is_initialized", return_value=True),
        patch("torch.distributed.get_world_size", return_value=2),
        pytest.raises(RuntimeError, match="one process; 2 train together"),
    ):
        Loop()


def test_step_needs_one_loss_and_gradients() -> None:
    guard = Loop().guard
    with pytest.raises(ValueError, match="No parameter of the optimizer has a gradient"):
        guard.step(torch.ones(()))
    with pytest.raises(ValueError, match=r"loss of shape \(2,\) must be one number"):
        guard.step(torch.ones(2))


def test_without_progress_a_rate_whose_steps_are_all_clipped_is_lowered() -> None:
    weight = nn.Parameter(torch.linspace(0, 1, 200))
    optimizer = torch.optim.SGD([weight], 1000.0)
    guard = TrainingGuard(nn.ParameterList([weight]), optimizer, policy=GlobalNormClipping(1e-3))
    kinds = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = 3 + (1e4 * weight).sin().mean()
        loss.backward()
        kinds.append(guard.step(loss).kind)
    assert kinds == [""] * 49 + ["divergence"]
    assert guard.backoff.level == 1 / 16
