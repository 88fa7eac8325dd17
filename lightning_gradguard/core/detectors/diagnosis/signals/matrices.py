"""Matrices that functions are called with, where no layer of torch is called: functional code, own layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_gradguard.core.parameter_names import plain_name

#: Functions that multiply by a matrix; of methods and in-place forms, without `_`.
PRODUCTS = frozenset(
    {
        *("linear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear"),
        *("conv1d", "conv2d", "conv3d", "embedding"),
    }
)
#: Modules whose parameters are used elsewhere, and those whose are no matrices of a layer.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict, parametrize.ParametrizationList)
_OPAQUE = (torch.jit.ScriptModule, parametrize.ParametrizationList)


def is_layer(module: nn.Module) -> bool:
    """True for a layer of torch, or derived from one, with a matrix of its own.

    Example:
        >>> is_layer(nn.Linear(2, 2)), is_layer(nn.LayerNorm(2))
        (True, False)
    """
    if isinstance(module, _CONTAINERS):
        return False
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules")]
    if len(kinds) < 2:  # `nn.Module` alone
        return False
    return any(True for _ in own_matrices(module)) or parametrize.is_parametrized(module)


def own_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters with two dimensions or more that are a module's own, with their names."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim > 1:
            yield name, parameter


class BareMatrices:
    """Names matrices that belong to no layer of torch, when a function is called with one.

    Args:
        module: The module that is trained.

    Attributes:
        unregistered: Parameters that take part in the forward pass and that no module has registered, as of
            layers in a list of Python, by name.

    Example:
        >>> net = nn.Module()
        >>> net.a, net.b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        >>> BareMatrices(net).name_of([torch.ones(1, 2), net.b.T])
        'b'
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names: dict[int, str] = {}
        self._used: set[int] = set()
        self.unregistered: dict[str, nn.Parameter] = {}
        for path, owner in module.named_modules():
            if is_layer(owner) or isinstance(owner, _OPAQUE):
                continue
            found = list(own_matrices(owner))
            is_one = len(found) == 1 and path and not owner._modules and not isinstance(owner, _CONTAINERS)
            for name, parameter in found:
                self._names[id(parameter)] = plain_name(path if is_one else f"{path}.{name}".lstrip("."))

    def name_of(self, given: Sequence[Tensor]) -> str:
        """Returns the name of the first bare matrix, or view of one, among the arguments of a function."""
        for tensor in given:
            matrix = tensor if tensor._base is None else tensor._base
            name = self._names.get(id(matrix), "")
            if name:
                self._used.add(id(matrix))
                return name
            if isinstance(matrix, nn.Parameter) and matrix.requires_grad and torch.is_grad_enabled():
                self._keep_unregistered(matrix)
        return ""

    def has_seen(self, module: nn.Module) -> bool:
        """True if a function was called with a matrix of a module's own."""
        return any(id(parameter) in self._used for _, parameter in own_matrices(module))

    def _keep_unregistered(self, parameter: nn.Parameter) -> None:
        if all(parameter is not other for other in self._module.parameters()):
            name = _place(self._module, parameter)
            if name:
                self.unregistered[name] = parameter


def _place(module: nn.Module, parameter: nn.Parameter) -> str:
    """Returns where a list, a tuple or a dictionary of a module has a parameter; empty if none has it."""
    for path, owner in module.named_modules():
        for attribute, value in vars(owner).items():
            if attribute.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                name = plain_name(f"{path}.{attribute}.{key}".lstrip("."))
                if item is parameter:
                    return name
                if isinstance(item, nn.Module):
                    for own, other in item.named_parameters():
                        if other is parameter:
                            return f"{name}.{own}"
    return ""
