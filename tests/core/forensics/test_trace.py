"""Nonfinite values are followed through every kind of operation and module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.core.forensics import Origin, investigate
from tests.core.forensics.cases import examine, inputs, network, summary

NAN, INF = math.nan, math.inf


def test_infinity_is_followed_to_the_module_that_made_it() -> None:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (200 + x.abs()).exp()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Exp(), nn.LayerNorm(8), nn.Linear(8, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert summary(origin) == ("forward_pass", "forward", "1", "aten::exp")
    assert origin.low is not None
    assert origin.low >= 200


def test_in_place_operations_are_followed() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x.clone()
            y.sub_(y.detach().clone())
            y.log_()
            y.mul_(2.0)
            return y.add_(1.0)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), InPlace(), nn.LeakyReLU(inplace=True), nn.Linear(8, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert summary(origin) == ("forward_pass", "forward", "1", "aten::log_")
    assert (origin.low, origin.high) == (0.0, 0.0)


def test_input_changed_in_place_is_still_the_input() -> None:
    net = network()
    x = inputs(NAN)
    x_used = x.clone()

    def loss() -> Any:
        x_used.mul_(0.5)
        return net(x_used).mean()

    origin = examine(net, loss, (x_used,))
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))


def test_values_written_into_a_slice_are_followed() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Any:
            out = x.new_zeros(x.shape[0], 10)
            out[:, :8] = (x - x).log()
            return out

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Padded(), nn.Linear(10, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert summary(origin) == ("forward_pass", "forward", "1", "aten::log")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_are_followed(reentrant: bool) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x * x.gt(0)).sqrt()

    class Log(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x - x).log()

    class Net(nn.Module):
        def __init__(self, middle: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(4, 8), middle, nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return self.last(checkpoint(self.middle, x, use_reentrant=reentrant))

    def examined(net: Net) -> Origin:
        def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            loss = net(x).mean()
            loss.backward()  # what a reentrant checkpoint needs
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            for p in net.parameters():
                p.grad = None
            return [loss], gradients

        return investigate(net, run, (x,))

    x = inputs()
    assert summary(examined(Net(Log()))) == ("forward_pass", "forward", "middle", "aten::log")
    origin = examined(Net(Root()))
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")
    assert "SqrtBackward" in origin.operation
    assert origin.module == "middle"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_followed(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = kind(4, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.encoder(x)[0][:, -1])

    x = torch.randn(3, 5, 4)
    net = Net()
    assert examine(net, lambda: net(x).mean(), (x,)).cause == "transient"
    with torch.no_grad():
        net.encoder.weight_hh_l1[2, 3] = NAN
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("encoder.weight_hh_l1",))
    x[1, 4, 0] = NAN
    net = Net()
    origin = examine(net, lambda: net(x).mean(), {"x": x})
    assert (origin.cause, origin.where) == ("bad_input", ("batch['x']",))


def test_shared_modules_are_followed() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sqrt()

    class Twice(nn.Module):
        def __init__(self, first: float, second: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.shared, self.root, self.head = nn.Linear(4, 4), Root(), nn.Linear(4, 1)
            self.again = self.shared
            self.offsets = (first, second)

        def forward(self, x: Tensor) -> Any:
            for offset in self.offsets:
                x = self.root(self.again(self.shared(x)).square() * (offset != 0) + offset.real)
            return self.head(x)

    x = inputs()
    for first in (True, False):
        healthy = Twice(1.0, 1.0)
        assert examine(healthy, lambda net=healthy: net(x).mean(), (x,)).cause == "transient"  # type: ignore[misc]
        root = Twice(*((0.0, 1.0) if first else (1.0, 0.0)))
        origin = examine(root, lambda net=root: net(x).mean(), (x,))  # type: ignore[misc]
        assert (origin.cause, origin.phase, origin.module) == ("backward_pass", "backward", "root")
        negative = Twice(*((-1e4, 1.0) if first else (1.0, -1e4)))
        origin = examine(negative, lambda net=negative: net(x).mean(), (x,))  # type: ignore[misc]
        assert summary(origin) == ("forward_pass", "forward", "root", "aten::sqrt")


def test_compiled_modules_are_followed() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x - x).log()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Log(), nn.Linear(8, 1))
    compiled = torch.compile(net, backend="eager")
    x = inputs()
    compiled(x)  # so that there is compiled code
    origin = examine(compiled, lambda: compiled(x).mean(), (x,))  # type: ignore[arg-type]
    assert summary(origin) == ("forward_pass", "forward", "1", "aten::log")
    outer = nn.ModuleDict({"net": compiled})  # type: ignore[dict-item]
    origin = examine(outer, lambda: compiled(x).mean(), (x,))
    assert summary(origin) == ("forward_pass", "forward", "net.1", "aten::log")
    with torch.no_grad():
        net[2].weight[0, 0] = NAN  # type: ignore[operator]
    net[1] = nn.Identity()
    origin = examine(compiled, lambda: compiled(x).mean(), (x,))  # type: ignore[arg-type]
    assert (origin.cause, origin.where) == ("corrupted_weights", ("2.weight",))


def test_sparse_gradients_are_followed() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        loss = (embedding(torch.tensor([1, 2])) * 0).square().sum().sqrt()
        return [loss], torch.autograd.grad(loss, list(embedding.parameters()))

    origin = investigate(embedding, run, None)
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")
    assert "Sqrt" in origin.operation
