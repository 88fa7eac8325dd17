"""A trial finds the largest stable rate of a quadratic, and leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_gradguard.core.initialization.rate_trial import (
    RateTrial,
    largest_stable_factor,
    optimizer_copy,
    rate_finding,
    rises,
)


class Quadratic(nn.Module):
    """A loss of curvature 4, whose largest stable rate under gradient descent is a half."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(batch.mean()))
        batch.mul_(2)  # as steps do that normalize in place
        return 2 * self.weight.square().sum() + 0 * batch.sum() + 0 * torch.rand(())


def trial_of(network: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> RateTrial:
    batch = torch.ones(4)
    return RateTrial(network, optimizer, network, [[batch]] * 12, [batch], [rate])


@pytest.mark.parametrize("rate", [3e-4, 0.1, 2.0, 300.0])
def test_the_edge_is_found_from_below_and_above(rate: float) -> None:
    network = Quadratic()
    trial = trial_of(network, torch.optim.SGD(network.parameters(), rate), rate)
    factor = largest_stable_factor(lambda factor: not rises(trial.path(factor)))
    assert factor is not None
    assert 0.25 <= rate * factor <= 1.0


@pytest.mark.parametrize(
    ("losses", "is_stable", "n_steps"),
    [
        ([2.35, 2.26, 2.22, 2.33], False, 36),  # it dies, with momentum, later than it learns
        ([2.35, 2.2, 2.0, 2.1], True, 36),
        ([2.35, 2.4], False, 12),
        ([2.35, math.nan], False, 12),
    ],
)
def test_a_rate_is_stable_if_the_loss_keeps_its_progress(
    losses: list[float], is_stable: bool, n_steps: int
) -> None:
    network, steps, expected = nn.Linear(1, 1), [], iter(losses)

    def loss_of(batch: Tensor) -> Tensor:
        if batch.ndim:
            return torch.tensor(next(expected))
        steps.append(batch)
        return network.weight.square().sum()

    batch = torch.ones(())
    sgd = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    trial = RateTrial(network, sgd, loss_of, [[batch]] * 36, [torch.ones(1)], [0.1])
    assert rises(trial.path(1.0)) is not is_stable
    assert len(steps) == n_steps


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, torch.tensor(0.1), amsgrad=True),
    lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    lambda p: torch.optim.RMSprop(p, 0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_no_trace_is_left(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    network = Quadratic()
    optimizer = make(network.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    network(torch.ones(4)).backward()
    optimizer.step()
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict(), network.seen, network.weight.grad))
    random_numbers, calls = torch.get_rng_state(), []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    trial_of(network, optimizer, 0.1).losses(4.0)
    handle.remove()
    after = (network.state_dict(), optimizer.state_dict(), network.seen, network.weight.grad)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert calls == []
    assert scheduler.optimizer is optimizer


def test_what_a_subclass_of_an_optimizer_adds_is_copied() -> None:
    class Averaging(torch.optim.SGD):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, lr)
            self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr)
            self.n_steps = 0

        def step(self, closure: Any = None) -> Any:
            self.n_steps += 1
            return self.inner.step(closure)

    network = Quadratic()
    optimizer = Averaging(network.parameters(), 0.1)
    trial_of(network, optimizer, 0.1).losses(1.0)
    assert optimizer.n_steps == 0
    copied = optimizer_copy(optimizer)
    assert isinstance(copied, Averaging)
    assert copied.inner is not optimizer.inner
    assert copied.inner.param_groups[0]["params"][0] is network.weight


def test_a_finding_is_made_only_when_it_is_certain() -> None:
    def criterion(
        factor: float | None, losses: tuple[float, float], n_steps: float = 1e3, **how: bool
    ) -> str:
        finding = rate_finding("group", 0.1, factor, losses, n_steps, **how)
        return "" if finding is None else f"{finding.severity} {finding.criterion}"

    assert criterion(1 / 5, (2.0, 9.0)) == "warn learning_rate_too_high"
    assert criterion(1 / 20, (2.0, math.nan)) == "fail learning_rate_too_high"
    assert criterion(1 / 20, (2.0, 9.0), warms_up=True) == "warn learning_rate_too_high"
    assert criterion(1 / 20, (2.0, 2.1)) == ""  # it barely rises, and may fall later
    assert criterion(1 / 5, (-2.0, -1.9)) == ""
    assert criterion(1 / 5, (-2.0, 0.0)) == "warn learning_rate_too_high"
    assert criterion(1 / 2, (2.0, 9.0)) == ""
    assert criterion(None, (2.0, math.nan)) == ""
    assert criterion(1e5, (2.0, 1.999999)) == "warn learning_rate_too_low"
    assert criterion(1e5, (2.0, 1.999)) == ""
    assert criterion(1e5, (2.0, 1.99999), math.inf) == ""
