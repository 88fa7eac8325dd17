"""Criteria that weights must meet before a batch is seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.finding import Finding, initializer_line
from lightning_gradguard.core.initialization.forward_trace import LAYERS
from lightning_gradguard.core.norms import local_shard


def check_weights(module: nn.Module) -> list[Finding]:
    """Checks without a batch for nonfinite weights, and for units that are copies of each other.

    Args:
        module: The network.
    """
    return nonfinite_weights(module) or copied_units(module)


def nonfinite_weights(module: nn.Module) -> list[Finding]:
    """Returns a finding for each layer with nonfinite weights, in the local shard of sharded ones."""
    findings = []
    for name, parameter in module.named_parameters():
        owner, _, _ = name.rpartition(".")
        finite = torch.isfinite(local_shard(parameter.detach()))
        if not bool(finite.all()):
            share = 1 - float(finite.float().mean())
            cure = f"model.{owner}.reset_parameters()" if owner else f"model.{name} = ..."
            findings.append(Finding("nonfinite_weights", owner, share, "0", "fail", cure))
    return findings


def copied_units(
    module: nn.Module, whole: Callable[[Tensor], Tensor] = lambda weight: weight
) -> list[Finding]:
    """Returns a finding for each layer that has units with the same weights.

    Args:
        module: The network.
        whole: Returns the whole weight of a layer that is sharded over ranks.
    """
    findings = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        weight = whole(layer.weight.detach())
        if bool(weight.any()) and (copies := _equal_rows(weight)) > 0:
            findings.append(
                Finding("symmetric_units", name, copies, "0", "fail", initializer_line(name, "relu"))
            )
    return findings


def _equal_rows(weight: Tensor) -> int:
    """Counts rows that equal another row, by their projections on a random vector."""
    rows = weight.flatten(1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    projections = (rows.double() @ direction).sort().values
    return int((projections.diff() == 0).sum())
