"""The parameters that a step measures, and their constants: names, shapes, shards, buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.core.norms import Buckets, FlatShard, has_dtensors, replica_factor, tensor_norms
from lightning_gradguard.runtime import distributed

CPU = torch.device("cpu")
_GRADIENT, _LAYOUT, _PARAMETERS = attrgetter("grad"), attrgetter("layout"), itemgetter("params")
#: Gives parameters their names.
Naming = Callable[[Sequence[nn.Parameter]], Mapping[nn.Parameter, str]]


class Selection:
    """Parameters that are measured together; what is found out about them is kept from step to step.

    Args:
        named: The parameters.
        flat: Those that FSDP1 flattened and sharded.
        device: Where numbers about them go.

    Attributes:
        is_matrix: By parameter.
        has_dtensors: True if any of them is a DTensor, of FSDP2 or tensor parallelism.
        is_sharded: True if ranks hold different parts of any of them, also as FSDP1 flattens them.
        has_doubles: True if any of them is of float64.
        n_ranks: Number of ranks that train together.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        flat: Mapping[Tensor, FlatShard],
        device: torch.device,
    ) -> None:
        named = tuple(named)
        self.names = tuple(name for name, _ in named)
        self.parameters = tuple(parameter for _, parameter in named)
        self.device = self.parameters[0].device if self.parameters else device
        shapes = [flat.get(parameter, parameter) for parameter in self.parameters]
        self.is_matrix = [shape.ndim > 1 for shape in shapes]
        self.has_dtensors = has_dtensors(self.parameters)
        self.is_sharded = self.has_dtensors or any(parameter in flat for parameter in self.parameters)
        self.has_doubles = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        self._flat = flat
        self.n_ranks = distributed.world_size()
        self._is_plain = not self.has_dtensors and not any(p.is_complex() for p in self.parameters)

    @cached_property
    def matrices(self) -> Tensor:
        """1 for those of two dimensions or more, 0 for others; shape `(n,)`, float64."""
        return torch.tensor(self.is_matrix, dtype=torch.float64, device=self.device)

    @cached_property
    def replica_factors(self) -> Tensor:
        """Factors of the sums over local shards before ranks add them up, shape `(n,)`, float64."""
        ranks, flat = self.n_ranks, self._flat
        factors = [flat[p].pieces / ranks if p in flat else replica_factor(p, ranks) for p in self.parameters]
        return torch.tensor(factors, dtype=torch.float64, device=self.device)

    @cached_property
    def zero(self) -> Tensor:
        """A scalar on the device, float64."""
        return torch.zeros((), dtype=torch.float64, device=self.device)

    @cached_property
    def one(self) -> Tensor:
        """A scalar on the device, float64."""
        return torch.ones((), dtype=torch.float64, device=self.device)

    def gradients(self) -> tuple[Tensor, ...]:
        """Returns the gradients; an empty tensor where this rank holds no part of one."""
        if not self._flat:
            return tuple(map(_GRADIENT, self.parameters))
        return tuple([p.detach().new_zeros(0) if (grad := p.grad) is None else grad for p in self.parameters])

    def norms(self, tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
        """Returns the norm of each of the gradients, or of the weights; shape `(n,)`, float64."""
        if self._is_plain and {*map(_LAYOUT, tensors)} == {torch.strided}:
            return self._buckets.norms(tensors, norm_type).to(self.device)
        return tensor_norms(tensors, norm_type).to(self.device)

    def norms_and(self, tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
        """Returns the L2 norm of each of the gradients, and then other numbers, in one tensor."""
        if self._is_plain and {*map(_LAYOUT, tensors)} == {torch.strided}:
            return self._buckets.norms_and(tensors, numbers)
        return torch.cat([self.norms(tensors), *[number.reshape(1) for number in numbers]])

    @cached_property
    def _buckets(self) -> Buckets:
        return Buckets(self.gradients())


class ParameterLayout:
    """The sharding of parameters over ranks, and the parameters of each optimizer."""

    def __init__(self, flat: Mapping[Tensor, FlatShard], device: torch.device = CPU) -> None:
        self._flat = flat
        self._device = device
        self._by_optimizer: dict[Optimizer, _OptimizerParameters] = {}

    def select(self, named: Iterable[tuple[str, nn.Parameter]]) -> Selection:
        """Selects those of the parameters that have a gradient on any rank."""
        parameters = dict(named)
        names = {parameter: name for name, parameter in parameters.items()}
        return _OptimizerParameters(list(names), names, self._flat, self._device).with_gradient()

    def with_gradient(self, optimizer: Optimizer, naming: Naming) -> Selection:
        """Selects those parameters of an optimizer that have a gradient on any rank."""
        parameters = list(chain.from_iterable(map(_PARAMETERS, optimizer.param_groups)))
        known = self._by_optimizer.get(optimizer)
        if known is None or known.ids != list(map(id, parameters)):
            known = _OptimizerParameters(parameters, naming(parameters), self._flat, self._device)
            self._by_optimizer[optimizer] = known
        return known.with_gradient()


class _OptimizerParameters:
    """The parameters of one optimizer, and the last selection among them."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        names: Mapping[nn.Parameter, str],
        flat: Mapping[Tensor, FlatShard],
        device: torch.device,
    ) -> None:
        self.ids = list(map(id, parameters))
        # an empty piece of a flattened parameter may be a part of one that is measured
        self._parameters = [p for p in parameters if p.numel() > 0 or p in flat]
        self._names = names
        self._flat = flat
        self._device = device
        self._has_gradient: list[bool] = []
        self._selection = Selection((), flat, device)

    def with_gradient(self) -> Selection:
        flat, parameters = self._flat, self._parameters
        has_gradient = [p.requires_grad and (p.grad is not None or p in flat) for p in parameters]
        if has_gradient != self._has_gradient:
            self._has_gradient = has_gradient
            here = (p for p, has in zip(parameters, has_gradient, strict=True) if has)
            self._selection = Selection(((self._names[p], p) for p in here), flat, self._device)
        return self._selection
