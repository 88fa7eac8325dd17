"""A network, its inputs, and the origin of a loss computed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.core.forensics import Origin, OutOfRange, investigate
from lightning_gradguard.core.incidents import CAUSES


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs(value: float | None = None) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    if value is not None:
        x[2, 1] = value
    return x


def examine(
    module: nn.Module,
    loss_of: Callable[[], Tensor],
    batch: Any = None,
    out_of_range: Mapping[str, OutOfRange] | None = None,
    scale: float = 1.0,
) -> Origin:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        loss = loss_of()
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        return [loss], [g for g in found if g is not None]

    origin = investigate(module, run, batch, out_of_range=out_of_range)
    assert origin.cause in CAUSES
    assert origin.detail
    return origin


def summary(origin: Origin) -> tuple[str, str, str, str]:
    return origin.cause, origin.phase, origin.module, origin.operation
