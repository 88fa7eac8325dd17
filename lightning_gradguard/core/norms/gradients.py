"""Gradients of one optimizer step, with their norms."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_gradguard.core.norms.buckets import index_tensor
from lightning_gradguard.core.norms.norms import tensor_norms, total_norm_from_norms, unitwise_norm
from lightning_gradguard.core.norms.sharding import is_sharded

#: Norms of the units of a gradient, and of the weights of the same units.
UnitNorms = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gradients:
    """Gradients of one optimizer step with their norms, as a clipping policy receives them.

    Args:
        names: Name of each parameter.
        parameters: The parameters.
        tensors: Their gradients.
        norms: L2 norm of each gradient, shape `(n,)`, float64.
        total_norm: L2 norm of all of them together, a scalar, float64.
        units: The result of `unit_norms`, where it was summed over shards.
        known_norm: The total norm as a number, if the host has read it: decisions from it cost no operation
            on the device.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    norms: Tensor
    total_norm: Tensor
    units: tuple[UnitNorms, ...] | None = None
    known_norm: float | None = None

    def unit_norms(self) -> tuple[UnitNorms, ...]:
        """Returns L2 norms of each unit of each gradient, and of the weights of the same units.

        See `unitwise_norm`; the shards of a sharded tensor are in the order of `unit_places`.

        Raises:
            ValueError: If gradients are sharded and their units were not summed over shards.
        """
        if self.units is not None:
            return self.units
        if is_sharded(self.tensors):
            raise ValueError(
                "The units of sharded gradients were not summed over shards: a policy that calls "
                "`unit_norms()` needs `by_unit = True` in its class."
            )
        pairs = zip(self.tensors, self.parameters, strict=True)
        return tuple((unitwise_norm(tensor), unitwise_norm(weight.detach())) for tensor, weight in pairs)

    def without(self, names: Collection[str]) -> Gradients:
        """Returns the same gradients without some of them.

        Args:
            names: Parameters to exclude; unknown names are ignored.
        """
        kept = [i for i, name in enumerate(self.names) if name not in names]
        if len(kept) == len(self.names):
            return self
        norms = self.norms[index_tensor(tuple(kept), self.norms.device)]
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            parameters=tuple(self.parameters[i] for i in kept),
            tensors=tuple(self.tensors[i] for i in kept),
            norms=norms,
            total_norm=total_norm_from_norms(norms),
            units=None if self.units is None else tuple(self.units[i] for i in kept),
            known_norm=None,
        )


def with_gradient(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters with a gradient; frozen, unused and empty ones are omitted."""
    return [
        (name, parameter)
        for name, parameter in named_parameters
        if parameter.grad is not None and parameter.requires_grad and parameter.numel() > 0
    ]


def measure_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Gradients:
    """Measures the gradients of a module on one device or under DistributedDataParallel.

    Args:
        named_parameters: As from `module.named_parameters()`, after `backward`.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> measure_gradients(layer.named_parameters()).total_norm
        tensor(5., dtype=torch.float64)
    """
    named = with_gradient(named_parameters)
    tensors = tuple(p.grad for _, p in named if p.grad is not None)
    norms = tensor_norms(tensors)
    return Gradients(
        names=tuple(name for name, _ in named),
        parameters=tuple(parameter for _, parameter in named),
        tensors=tensors,
        norms=norms,
        total_norm=total_norm_from_norms(norms),
    )
