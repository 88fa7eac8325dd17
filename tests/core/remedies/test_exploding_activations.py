"""Activations of the user's that grow without bound are exchanged; those that do not are left alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradguard.core.remedies.changes import Change, apply, places


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def network(kind: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), kind(), nn.Linear(4, 4), kind(), nn.Linear(4, 1), kind())


def test_exponential_activations_are_exchanged_but_for_that_of_the_output() -> None:
    net = network(Exponential)
    assert apply(net, Change("replace_activation")) == ["1", "3"]
    assert [type(child).__name__ for child in list(net)[1::2]] == ["ReLU", "ReLU", "Exponential"]


def test_other_activations_of_the_user_are_left_alone() -> None:
    net = network(Swish)
    assert not places(net, Change("replace_activation"), lambda: net(torch.ones(8, 2)).sum())


def test_exponential_activations_are_normalized() -> None:
    net = network(Exponential)
    run_loss = lambda: net(torch.ones(8, 2)).sum()  # noqa: E731
    assert places(net, Change("add_normalization"), run_loss) == ["0", "2"]
