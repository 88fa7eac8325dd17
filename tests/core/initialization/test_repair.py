"""Repair makes a network trainable, and changes default initializations only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard.core.initialization import holds_default_initialization, propagate, repair
from tests.core.initialization.networks import digits, fails, loss_of, mlp
from tests.tasks import same, weights


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


def test_default_initialization_fails_and_trains_after_repair() -> None:
    network = mlp()
    findings = fails(network)
    assert findings[0].criterion == "gradient_gain"
    assert findings[0].value < -4
    assert findings[1].cure == "nn.init.kaiming_normal_(model[2].weight, nonlinearity='relu')"
    accuracy = train(network)
    cured = mlp()
    done = repair(cured, loss_of(cured))
    assert len(done.lines) == 12
    assert done.summary == ("0 to 22 (12 layers): He normal, scaled to unit variance",)
    assert fails(cured) == []
    assert train(cured) > 0.8 > accuracy


def test_repair_gives_unit_variance_and_is_reproducible() -> None:
    first, second = mlp(6, nn.Tanh), mlp(6, nn.Tanh)
    state = torch.get_rng_state()
    repair(first, loss_of(first))
    torch.rand(3)
    repair(second, loss_of(second))
    torch.set_rng_state(state)
    assert same(weights(first), weights(second))
    outputs = [layer.output.std().item() for layer in propagate(first, loss_of(first)).layers[:-1]]
    assert outputs == pytest.approx([1.0] * 6, abs=0.02)


def test_repair_changes_other_initializations_only_if_named() -> None:
    network = mlp()
    nn.init.orthogonal_(network[4].weight)
    before = network[4].weight.clone(), network[24].weight.clone()
    done = repair(network, loss_of(network))
    assert done.left_alone == ("4",)
    assert torch.equal(network[4].weight, before[0])
    assert torch.equal(network[24].weight, before[1])  # the head
    assert "4" not in done.changed
    assert "4" in repair(network, loss_of(network), names=["4"]).changed


@pytest.mark.parametrize("layer", [nn.Linear(5, 300), nn.Conv2d(3, 16, 3), nn.Linear(1000, 20)])
def test_default_initialization_is_recognized(layer: nn.Linear | nn.Conv2d) -> None:
    assert holds_default_initialization(layer)
    nn.init.xavier_uniform_(layer.weight, gain=0.5)
    assert not holds_default_initialization(layer)
