"""Networks that cannot train are told from those that can, by layer, with a cure that cures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gradguard.core.initialization import (
    Finding,
    check,
    check_weights,
    holds_default_initialization,
    preserve_state,
    probe,
    repair,
    table,
)
from tests.tasks import same, weights


def digits() -> tuple[Tensor, Tensor]:
    inputs, target = load_digits(return_X_y=True)
    return torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(target)


def mlp(
    depth: int = 12,
    activation: type[nn.Module] = nn.ReLU,
    initialize: Callable[[Tensor], object] | None = None,
) -> Any:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), activation())]
    network = nn.Sequential(*layers, nn.Linear(64, 10))
    if initialize is not None:
        for layer in network:
            if isinstance(layer, nn.Linear):
                initialize(layer.weight)
    return network


def he(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def loss_of(network: nn.Module) -> Callable[[], Tensor]:
    inputs, target = digits()
    return lambda: nn.functional.cross_entropy(network(inputs[:128]), target[:128])


def fails(network: nn.Module) -> list[Finding]:
    return [f for f in check(network, loss_of(network))[0] if f.severity == "fail"]


def train(network: Any) -> float:
    inputs, target = digits()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        chosen = torch.randint(0, 1400, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs[chosen]), target[chosen]).backward()
        optimizer.step()
    return float((network(inputs[1400:]).argmax(1) == target[1400:]).float().mean())


def test_torch_s_default_is_rejected_with_the_cure_and_trains_once_cured() -> None:
    network = mlp()
    findings = fails(network)
    assert findings[0].criterion == "gradient_gain"
    assert findings[0].value < -4
    assert findings[1].cure == "nn.init.kaiming_normal_(model.2.weight, nonlinearity='relu')"
    sick = train(network)
    cured = mlp()
    done = repair(cured, loss_of(cured))
    assert len(done) == 12
    assert "0: He normal" in done[0]
    assert fails(cured) == []
    assert train(cured) > 0.8 > sick


def test_repair_gives_unit_variance_and_the_same_weights_each_time() -> None:
    first, second = mlp(6, nn.Tanh), mlp(6, nn.Tanh)
    state = torch.get_rng_state()
    repair(first, loss_of(first))
    torch.rand(3)
    repair(second, loss_of(second))
    torch.set_rng_state(state)
    assert same(weights(first), weights(second))
    outputs = [layer.output.std().item() for layer in probe(first, loss_of(first)).layers[:-1]]
    assert outputs == pytest.approx([1.0] * 6, abs=0.02)


def test_repair_leaves_what_a_person_has_initialized() -> None:
    network = mlp()
    nn.init.orthogonal_(network[4].weight)
    before = network[4].weight.clone(), network[24].weight.clone()
    done = repair(network, loss_of(network))
    assert torch.equal(network[4].weight, before[0])
    assert torch.equal(network[24].weight, before[1])  # the head
    assert all(not line.startswith("4:") for line in done)
    assert any(line.startswith("4:") for line in repair(network, loss_of(network), names=["4"]))


@pytest.mark.parametrize("layer", [nn.Linear(5, 300), nn.Conv2d(3, 16, 3), nn.Linear(1000, 20)])
def test_default_initialization_is_recognised(layer: nn.Linear | nn.Conv2d) -> None:
    assert holds_default_initialization(layer)
    nn.init.xavier_uniform_(layer.weight, gain=0.5)
    assert not holds_default_initialization(layer)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + branch


def convolutions() -> nn.Sequential:
    block = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *block,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNN] | type[nn.LSTM]) -> None:
        super().__init__()
        self.rnn = kind(8, 32, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh") and kind is nn.RNN:
                nn.init.orthogonal_(weight)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])
        return output


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


def planted(network: Any, plant: Callable[[Any], object]) -> Any:
    with torch.no_grad():
        plant(network)
    return network


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
        (lambda: planted(mlp(4, initialize=he), lambda n: n[2].weight.zero_()), "zero_weights", "2"),
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
def test_planted_defects_are_found_where_they_are(
    make: Callable[[], nn.Sequential], criterion: str, module: str
) -> None:
    assert (criterion, module) in [(f.criterion, f.module) for f in fails(make())]


def test_an_explosion_is_no_failure_for_a_scale_free_optimizer() -> None:
    network = mlp(initialize=lambda w: nn.init.normal_(w, 0, 0.8))
    findings, _ = check(network, loss_of(network), scale_free=True)
    assert [f.severity for f in findings if f.criterion == "gradient_gain"] == ["warn"]
    assert "Adam may" in findings[0].expected


def test_a_zero_head_and_a_zero_residual_branch_are_habits() -> None:
    network: Any = nn.Sequential(*[Residual() for _ in range(3)], nn.Linear(64, 10))
    for block in network[:3]:
        nn.init.zeros_(block.down.weight)
    nn.init.zeros_(network[3].weight)
    assert fails(network) == []


def test_a_loss_above_guessing_is_told() -> None:
    network = mlp(3, initialize=lambda w: nn.init.normal_(w, 0, 0.5))
    criteria = [f.criterion for f in check(network, loss_of(network))[0]]
    assert "loss_over_guessing" in criteria


def test_nothing_is_left_behind() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 10))
            self.net: Any = nn.Sequential(*layers)
            self.calls, self.outputs, self.running = 0, [1.0], torch.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.outputs.append(2.0)
            self.running += 1
            self.extra = x
            self.eval()
            output: Tensor = self.net(x)
            return output

    network = Counts()
    network.net[0].weight.grad = torch.ones(64, 64)
    running, before, state = network.running, weights(network), torch.get_rng_state()
    for _ in range(2):
        probe(network, loss_of(network))
    assert same(before, weights(network))
    assert torch.equal(state, torch.get_rng_state())
    assert (network.calls, network.outputs, network.training) == (0, [1.0], True)
    assert network.running is running
    assert not bool(running.any())
    assert not hasattr(network, "extra")
    assert all(p.grad is None for n, p in network.named_parameters() if n != "net.0.weight")
    assert torch.equal(network.net[0].weight.grad, torch.ones(64, 64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_an_exception_leaves_nothing_behind_either() -> None:
    network = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
    before = weights(network)

    def run_loss() -> Tensor:
        network(torch.randn(8, 64))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        probe(network, run_loss)
    assert same(before, weights(network))
    assert not any(m._forward_hooks for m in network.modules())
    with preserve_state(network):
        pass


def test_the_table_names_layer_value_and_cure() -> None:
    text = table(check_weights(planted(mlp(2), lambda n: n[2].weight[0, 0].fill_(math.nan))))
    assert "FAIL" in text
    assert "nonfinite_weights" in text
    assert "model.2.reset_parameters()" in text
