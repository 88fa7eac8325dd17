"""Propagating a batch leaves the network unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization import propagate
from lightning_gradguard.core.snapshots import preserve_state
from tests.core.initialization.networks import loss_of
from tests.tasks import same, weights


def test_probe_changes_nothing() -> None:
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
            with torch.no_grad():  # as of a perturbation, or of an average of weights
                self.net[3].bias.add_(1.0)
            output: Tensor = self.net(x)
            return output

    network = Counts()
    network.net[0].weight.grad = torch.ones(64, 64)
    running, before, state = network.running, weights(network), torch.get_rng_state()
    for _ in range(2):
        propagate(network, loss_of(network))
    assert same(before, weights(network))
    assert torch.equal(state, torch.get_rng_state())
    assert (network.calls, network.outputs, network.training) == (0, [1.0], True)
    assert network.running is running
    assert not bool(running.any())
    assert not hasattr(network, "extra")
    assert all(p.grad is None for n, p in network.named_parameters() if n != "net.0.weight")
    assert torch.equal(network.net[0].weight.grad, torch.ones(64, 64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_probe_changes_nothing_on_an_exception() -> None:
    network = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
    before = weights(network)

    def run_loss() -> Tensor:
        network(torch.randn(8, 64))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        propagate(network, run_loss)
    assert same(before, weights(network))
    assert not any(m._forward_hooks for m in network.modules())
    with preserve_state(network):
        pass


@pytest.mark.parametrize("frozen", ["target network", "backbone", "recurrent backbone"])
def test_what_is_frozen_is_left_out(frozen: str) -> None:
    """A network without a gradient, such as the target of a DQN, does not hinder the check of the others."""
    trained = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    other: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if frozen == "recurrent backbone":
        other = nn.GRU(8, 8, batch_first=True)
    network = nn.ModuleDict({"frozen": other.requires_grad_(False), "trained": trained})
    inputs = torch.randn(32, 8)

    def run_loss() -> Tensor:
        if frozen == "target network":
            target: Tensor = other(inputs).sum()
            return trained(inputs).square().mean().sub(target)  # type: ignore[no-any-return]
        with torch.no_grad():
            features = other(inputs[:, None])[0][:, 0] if frozen == "recurrent backbone" else other(inputs)
        return trained(features).square().mean()  # type: ignore[no-any-return]

    found = propagate(network, run_loss)
    assert [layer.name for layer in found.layers] == ["trained.0", "trained.2", "trained.4"]
    assert [layer.activation for layer in found.layers] == ["relu", "relu", None]
    assert all(layer.gain is not None for layer in found.layers[:2])
    assert not found.recurrent_gains
