"""Gradients of one optimizer step: their norms, and their scaling in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_gradguard.core.norms.norms import tensor_norms, total_norm_from_norms, unitwise_norm
from lightning_gradguard.core.norms.sharding import has_dtensors, local_shard, unit_places

#: Norms of the units of a gradient, and of the weights of the same units.
UnitNorms = tuple[Tensor, Tensor]


@lru_cache(maxsize=256)
def _index_tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns indices on a device, cached: each copy to a GPU would synchronize with it."""
    return torch.tensor(indices, dtype=torch.long, device=device)


@dataclass(slots=True)
class StepContext:
    """Facts about a step besides its gradients, for policies that relate a norm to its update.

    Args:
        loss: Mean loss of the step over ranks and accumulated batches; NaN if none was seen.
        learning_rate: With all factors on it; the mean over parameter groups by squared gradient norm. `None`
            for an optimizer whose step is not along the gradient, as that of Adam.
        momentum: The largest of the parameter groups.
        weight_norm: L2 norm of all weights that the optimizer updates; `None` if it was not measured in this
            step, see `ClippingPolicy.wants_weight_norm`.
    """

    loss: float | Tensor = math.nan
    learning_rate: float | Tensor | None = None
    momentum: float = 0.0
    weight_norm: float | Tensor | None = None


class _WhenRead:
    """A tensor, or a function that makes it from the gradients when it is first read."""

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Gradients | None, _: type) -> Tensor:
        if owner is None:
            raise AttributeError(self._name)  # there is no default
        value: Tensor | Callable[[Gradients], Tensor] = vars(owner)[self._name]
        if not isinstance(value, Tensor):
            value = vars(owner)[self._name] = value(owner)
        return value

    def __set__(self, owner: Gradients, value: Tensor | Callable[[Gradients], Tensor]) -> None:
        vars(owner)[self._name] = value


@dataclass
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
        context: Loss, rate and weights of the step; `None` outside of a training run.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    norms: _WhenRead = _WhenRead()
    total_norm: _WhenRead = _WhenRead()
    units: tuple[UnitNorms, ...] | None = None
    known_norm: float | None = None
    context: StepContext | None = None

    def unit_norms(self) -> tuple[UnitNorms, ...]:
        """Returns L2 norms of each unit of each gradient, and of the weights of the same units.

        See `unitwise_norm`; the shards of a sharded tensor are in the order of `unit_places`.

        Raises:
            ValueError: If gradients are sharded and their units were not summed over shards.
        """
        if self.units is not None:
            return self.units
        if has_dtensors(self.tensors):
            raise ValueError(
                "The units of sharded gradients were not summed over shards: a policy that calls "
                "`unit_norms()` needs `by_unit = True` in its class."
            )
        pairs = zip(self.tensors, self.parameters, strict=True)
        return tuple((unitwise_norm(tensor), unitwise_norm(weight.detach())) for tensor, weight in pairs)

    def norms_of(self, indices: Sequence[int]) -> Tensor:
        """Returns the norms of some of the gradients, by their positions; shape `(n,)`, float64."""
        return self.norms[_index_tensor(tuple(indices), self.norms.device)]

    def without(self, names: Collection[str]) -> Gradients:
        """Returns the same gradients without those of some parameters; unknown names are ignored."""
        kept = [i for i, name in enumerate(self.names) if name not in names]
        if len(kept) == len(self.names):
            return self
        norms = self.norms_of(kept)
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


def total_norm_of(gradients: Gradients) -> Tensor:
    """Computes the total norm from the norms."""
    return total_norm_from_norms(gradients.norms)


def with_gradient(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
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


@torch.no_grad()
def scale_gradients_(gradients: Gradients, coefficients: float | Tensor | Sequence[Tensor]) -> None:
    """Multiplies gradients in place.

    Args:
        gradients: The gradients.
        coefficients: One scalar for all, as a number or a tensor, or one tensor for each gradient that
            broadcasts to it; for a sharded one a scalar, or one number for each of its units. The number 1
            costs nothing.

    Raises:
        ValueError: If a coefficient does not fit a sharded gradient.
    """
    if isinstance(coefficients, (float, int)) and coefficients == 1:
        return
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    stored = [local_shard(gradient) for gradient in gradients.tensors]
    stored = [local._values() if local.is_sparse else local for local in stored]
    for index, values in enumerate(stored):
        groups.setdefault((values.device, values.dtype), []).append(index)
    if isinstance(coefficients, Sequence):
        named = zip(gradients.names, gradients.tensors, coefficients, strict=True)
        coefficients = [_local_coefficient(*each) for each in named]
    for (device, dtype), indices in groups.items():
        # rounded to half precision, a coefficient could leave a norm above its bound
        wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        factors: float | Tensor | list[Tensor]
        if isinstance(coefficients, Sequence):
            factors = [coefficients[index] for index in indices]
            if all(factor.ndim == 0 for factor in factors):
                factors = list(torch.stack(factors).to(device, wide).unbind())
            else:
                factors = [factor.to(device, wide) for factor in factors]
        else:
            factors = coefficients.to(device, wide) if isinstance(coefficients, Tensor) else coefficients
        torch._foreach_mul_([stored[index] for index in indices], factors)


def _local_coefficient(name: str, gradient: Tensor, coefficient: Tensor) -> Tensor:
    """Returns the coefficient that broadcasts to the values of the gradient on this rank."""
    if coefficient.ndim == 0:
        return coefficient
    if gradient.is_sparse:
        return coefficient[gradient._indices()[0]]
    if not has_dtensors([gradient]):
        return coefficient
    places, start = unit_places(gradient)
    if coefficient.shape != (places, *(1,) * (gradient.ndim - 1)):
        raise ValueError(
            f"A coefficient of shape {tuple(coefficient.shape)} does not fit the sharded gradient "
            f"of {name}, of shape {tuple(gradient.shape)}: return one of shape (), "
            "or like its `unit_norms()`."
        )
    return coefficient[start : start + len(local_shard(gradient))]
