"""Clipping by a fixed total norm equals that of torch."""

from __future__ import annotations

import torch
from torch import nn

from lightning_gradguard import GlobalNormClipping
from tests.core.clipping.steps import gradients_of, step


def test_global_norm_clipping_equals_torch() -> None:
    for norm in (0.3, 1.0, 5.0):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0]) * norm / 5
        nn.utils.clip_grad_norm_([parameter], 1.0)
        gradients = gradients_of(torch.tensor([3.0, 4.0]) * norm / 5)
        step(GlobalNormClipping(1.0), gradients)
        torch.testing.assert_close(gradients.tensors[0], parameter.grad, rtol=1e-6, atol=0)
