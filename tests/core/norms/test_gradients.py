"""Gradients are selected, measured and excluded by parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_gradguard.core.norms import measure_gradients, with_gradient


def test_with_gradient_omits_unused_frozen_and_empty_parameters() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad = torch.ones(2)
    frozen.requires_grad_(False)
    named: list[Any] = [
        ("used", used),
        ("unused", unused),
        ("frozen", frozen),
        ("empty", nn.Parameter(torch.ones(0))),
    ]
    assert [name for name, _ in with_gradient(named)] == ["used"]


def test_without_recomputes_the_total_norm() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    gradients = measure_gradients([("a", a), ("b", b)])
    assert gradients.without(["a"]).total_norm.item() == 4
    assert gradients.without(["c"]) is gradients
