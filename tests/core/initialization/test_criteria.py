"""Networks that cannot train are distinguished from those that can."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization import check
from tests.core.initialization.networks import (
    Recurrent,
    Residual,
    convolutions,
    digits,
    fails,
    he,
    loss_of,
    mlp,
    planted,
)


def zeroed(layer: nn.Module) -> None:
    """Sets the parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(initialize=he),
        lambda: mlp(3),
        lambda: nn.Sequential(*[Residual() for _ in range(6)], nn.LayerNorm(64), nn.Linear(64, 10)),
        convolutions,
        lambda: Recurrent(nn.RNN),
        lambda: Recurrent(nn.LSTM),
    ],
    ids=["he", "shallow", "residual", "convolutions", "orthogonal rnn", "lstm"],
)
def test_healthy_networks_pass(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert fails(make()) == []


@pytest.mark.parametrize(
    ("make", "criterion", "module"),
    [
        (lambda: mlp(20, nn.Sigmoid), "gradient_gain", ""),
        (lambda: mlp(initialize=lambda w: nn.init.normal_(w, 0, 0.8)), "gradient_gain", ""),
        (lambda: planted(mlp(4, initialize=he), lambda n: n[4].weight.fill_(0.1)), "symmetric_units", "4"),
        (
            lambda: planted(mlp(4, initialize=he), lambda n: n[4].weight[3].copy_(n[4].weight[7])),
            "symmetric_units",
            "4",
        ),
        (lambda: planted(mlp(4, initialize=he), lambda n: n[2].apply(zeroed)), "zero_weights", "2"),
        (lambda: planted(mlp(4, initialize=he), lambda n: n[2].bias.fill_(-100)), "dead_units", "2"),
        (
            lambda: planted(mlp(4, nn.Tanh), lambda n: n[2].weight.mul_(1000)),
            "saturated_units",
            "2",
        ),
        (
            lambda: planted(mlp(4, initialize=he), lambda n: n[6].weight[0, 0].fill_(math.nan)),
            "nonfinite_weights",
            "6",
        ),
    ],
)
def test_planted_defects_are_found_in_their_modules(
    make: Callable[[], nn.Sequential], criterion: str, module: str
) -> None:
    assert (criterion, module) in [(f.criterion, f.module) for f in fails(make())]


def test_explosion_is_a_warning_for_a_scale_free_optimizer() -> None:
    network = mlp(initialize=lambda w: nn.init.normal_(w, 0, 0.8))
    findings, _ = check(network, loss_of(network), scale_free=True)
    assert [f.severity for f in findings if f.criterion == "gradient_gain"] == ["warn"]
    assert "Adam may" in findings[0].expected


@pytest.mark.parametrize(("bias", "severity"), [(0.0, "warn"), (1.0, "fail")])
def test_a_scale_free_optimizer_makes_up_for_small_gradients_but_not_for_equal_samples(
    bias: float, severity: str
) -> None:
    network = mlp(12, initialize=lambda w: nn.init.normal_(w, 0, 0.02))
    for layer in network[::2]:
        nn.init.constant_(layer.bias, bias)
    for scale_free, expected in ((False, "fail"), (True, severity)):
        findings, _ = check(network, loss_of(network), scale_free=scale_free)
        assert [f.severity for f in findings if f.criterion == "gradient_gain"] == [expected]


@pytest.mark.parametrize(("has_bias", "severity"), [(True, "warn"), (False, "fail")])
def test_weights_of_zero_move_layer_by_layer_under_a_scale_free_optimizer(
    has_bias: bool, severity: str
) -> None:
    network = mlp(3, initialize=nn.init.zeros_)
    for layer in network[::2]:
        layer.bias.data.mul_(has_bias)
    for scale_free, expected in ((False, "fail"), (True, severity)):
        findings, _ = check(network, loss_of(network), scale_free=scale_free)
        assert findings[0].severity == expected


def test_saturation_of_the_first_layer_is_reported_only() -> None:
    network = planted(mlp(4, nn.Tanh), lambda n: n[0].weight.mul_(30))
    found = [f for f in check(network, loss_of(network))[0] if f.criterion == "saturated_units"]
    assert [(f.module, f.severity) for f in found] == [("0", "info")]


def test_zero_head_and_zero_residual_branches_pass() -> None:
    network: Any = nn.Sequential(*[Residual() for _ in range(3)], nn.Linear(64, 10))
    for block in network[:3]:
        nn.init.zeros_(block.down.weight)
    nn.init.zeros_(network[3].weight)
    assert fails(network) == []


class LowRank(nn.Module):
    """A frozen layer with a product of two matrices beside it, the second of which begins with zeros."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out).requires_grad_(False)
        self.down, self.up = nn.Linear(n_in, 4, bias=False), nn.Linear(4, n_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(LowRank(64, 32), nn.ReLU(), LowRank(32, 32), nn.ReLU(), nn.Linear(32, 10)),
        lambda: planted(mlp(4, initialize=he), lambda n: n[2].weight.zero_()),
    ],
    ids=["adapters", "biases pass the activation"],
)
def test_zero_weights_with_a_gradient_pass(make: Callable[[], nn.Module]) -> None:
    # they move in the first step, and let gradients pass from then on
    torch.manual_seed(0)
    network = make()
    assert [f for f in check(network, loss_of(network))[0] if f.criterion == "zero_weights"]
    assert fails(network) == []


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


def test_a_gradient_that_is_cut_off_fails_also_below_a_head_of_zeros() -> None:
    network = planted(mlp(4, initialize=he), lambda n: n[-1].weight.zero_())
    network.insert(3, Rounded())
    assert "gradient_gain" in [f.criterion for f in fails(network)]


def test_loss_above_guessing_is_a_finding() -> None:
    network = mlp(3, initialize=lambda w: nn.init.normal_(w, 0, 0.5))
    criteria = [f.criterion for f in check(network, loss_of(network))[0]]
    assert "loss_over_guessing" in criteria


def test_a_sum_of_losses_is_not_compared_with_guessing() -> None:
    network = mlp(3)
    inputs, target = digits()
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert check(network, lambda: summed(network(inputs[:64]), target[:64]))[0] == []


def test_another_term_of_the_loss_is_not_compared_with_guessing() -> None:
    network = mlp(3)
    inputs, target = digits()

    def run_loss() -> Tensor:
        answers = network(inputs[:64])
        loss: Tensor = nn.functional.cross_entropy(answers, target[:64]) + (answers - 5).square().sum()
        return loss

    assert [f.criterion for f in check(network, run_loss)[0]] == []


class Steps(nn.Module):
    """A loop over a cell, or a recurrent module, whose last output or each output is classified."""

    def __init__(self, cell: nn.Module, *, per_step: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.per_step = cell, nn.Linear(16, 4), per_step

    def loss(self) -> Tensor:
        x = torch.randn(32, 30, 4, generator=torch.Generator().manual_seed(0))
        if isinstance(self.cell, nn.RNNBase):
            states = self.cell(x)[0]
        else:
            state, found = x.new_zeros(32, 16), []
            for t in range(30):
                state = self.cell(x[:, t], state)
                found.append(state)
            states = torch.stack(found, 1)
        states = states if self.per_step else states[:, -1:]
        target = torch.zeros(states.shape[:2], dtype=torch.long)
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), target.flatten())


@pytest.mark.parametrize("make", [lambda: nn.RNNCell(4, 16), lambda: nn.RNN(4, 16, batch_first=True)])
def test_recurrence_fails_where_only_its_last_output_reaches_the_loss(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = Steps(make())
    (finding,) = check(network, network.loss, scale_free=True)[0]
    assert (finding.criterion, finding.module, finding.severity) == ("gain_through_time", "cell", "fail")
    network.per_step = True
    assert [f.severity for f in check(network, network.loss, scale_free=True)[0]] == ["info"]


def test_a_loss_far_above_guessing_is_a_failure_for_an_optimizer_of_plain_gradients() -> None:
    network = mlp(3, initialize=lambda w: nn.init.normal_(w, 0, 2.0))
    for scale_free, severity in ((False, "fail"), (True, "warn")):
        findings, _ = check(network, loss_of(network), scale_free=scale_free)
        assert [f.severity for f in findings if f.criterion == "loss_over_guessing"] == [severity]


@pytest.mark.parametrize("at", [0, 4])
def test_values_that_are_nonfinite_before_a_layer_are_no_fault_of_the_network(at: int) -> None:
    class Standardized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x[:1]) / (x - x).sum()

    layers = list(mlp(4, initialize=he))
    network = nn.Sequential(*layers[:at], Standardized(), *layers[at:])
    findings = fails(network)
    assert [(f.criterion, f.module) for f in findings] == [("nonfinite_input", str(at + 1)), ("loss", "")]
    assert "division by 0" in findings[0].cure
    assert "residual" not in findings[0].cure


@pytest.mark.parametrize(
    "rectify",
    [
        lambda x: x.clamp(min=0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x * (x > 0),
        torch.relu_,
        nn.functional.relu6,
    ],
)
def test_units_that_are_dead_behind_any_rectifier_are_found_in_their_layer(
    rectify: Callable[[Tensor], Tensor],
) -> None:
    class Rectified(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rectify(x)

    network = planted(mlp(3, Rectified, he), lambda n: n[2].bias.fill_(-20.0))
    assert ("dead_units", "2") in [(f.criterion, f.module) for f in fails(network)]
    assert fails(mlp(3, Rectified, he)) == []
