"""Unitwise clipping bounds every unit by its weights."""

from __future__ import annotations

import torch
from torch import nn

from lightning_gradguard import UnitwiseClipping
from lightning_gradguard.core.norms import measure_gradients, unitwise_norm
from tests.core.clipping.steps import gradients_of, step


def test_gradient_equals_reference_values() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    gradients = measure_gradients([("w", weight)])
    step(UnitwiseClipping(), gradients)
    expected = torch.tensor([[0.05, 0.0], [1.0000000656873453e-05, 0.0]])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=0)


def test_zero_weights_can_grow() -> None:
    gradients = gradients_of([[1.0, 1.0]], weight=0.0)
    assert step(UnitwiseClipping(), gradients) > 0


def test_bound_holds_for_every_unit() -> None:
    gradients = gradients_of(torch.randn(8, 5) * 100, torch.randn(4) * 100, torch.randn(2, 3, 3, 3))
    step(UnitwiseClipping(0.01), gradients)
    for parameter, tensor in zip(gradients.parameters, gradients.tensors, strict=True):
        assert bool((unitwise_norm(tensor) <= 0.01 * unitwise_norm(parameter) * (1 + 1e-5)).all())
