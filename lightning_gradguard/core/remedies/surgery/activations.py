"""Activations exchanged: modules, and functions that modules have as attributes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from lightning_gradguard.core.remedies.surgery.data_flow import (
    RECTIFYING,
    SATURATING,
    WEIGHTED,
    DataFlow,
    functions_of,
)
from lightning_gradguard.core.remedies.surgery.modules import RESIDUAL

_MODULES: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "leaky_relu": nn.functional.leaky_relu,
}
ACTIVATIONS = tuple(_MODULES)
#: An activation explodes that is above this power of a large value.
LARGE, MAX_POWER = 30.0, 4


def replaceable(module: nn.Module, flow: DataFlow, to: str, names: Collection[str]) -> list[str]:
    """Returns the names of activations that can be exchanged for another, in the order of the forward pass.

    Saturating and exponential ones for ReLU or GELU, rectifying ones for LeakyReLU. Without names, those
    whose output reaches another layer: no gates, no output of the network, none that repeats with a layer as
    in a recurrence.
    """
    kinds = RECTIFYING if to == "leaky_relu" else SATURATING
    functions = {kind.__name__.lower() for kind in kinds}
    found = []
    for name, layer in flow.layers.items():
        function = functions_of(layer.module).get(name.rpartition(".")[2]) if layer.is_attribute else None
        if not (type(layer.module) in kinds or (function or "") in functions):
            continue
        if name in names or (
            not names
            and layer.is_hidden
            and not (layer.is_gate or layer.is_in_a_recurrence or layer.is_frozen)
        ):
            found.append(name)
    if to != "leaky_relu":
        found += [name for name in _exploding(module, flow) if not names or name in names]
    for name, child in module.named_modules():
        if name in names and isinstance(child, nn.RNN) and child.nonlinearity == "tanh" and to == "relu":
            found.append(name)
    return found


def _exploding(module: nn.Module, flow: DataFlow) -> Iterator[str]:
    """Yields activations of the user's between two layers that grow without bound, as an exponential does."""
    children = [(name, child) for name, child in module.named_modules() if name]
    last = max((i for i, (_, child) in enumerate(children) if isinstance(child, WEIGHTED)), default=0)
    for name, child in children[:last]:
        layer = flow.layers.get(name)
        is_own = not type(child).__module__.startswith("torch.")
        if is_own and not any(True for _ in child.children()) and not (layer is None and flow.is_measured):
            if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
                continue
            if _explodes(child):
                yield name


@torch.no_grad()
def _explodes(activation: nn.Module) -> bool:
    given = torch.tensor([[0.0, 1.0, LARGE]])
    try:
        returned = activation(given)
    except Exception:  # no function of one tensor
        return False
    return (
        isinstance(returned, Tensor)
        and returned.shape == given.shape
        and bool(returned[0, 2].abs() > LARGE**MAX_POWER)
    )


def replace_activations(module: nn.Module, names: Collection[str], to: str) -> None:
    """Exchanges activations in place; a shared one is exchanged everywhere."""
    for name in names:
        parent, _, attribute = name.rpartition(".")
        owner = module.get_submodule(parent)
        old = owner._modules.get(attribute)
        if isinstance(old, nn.RNN):
            old.nonlinearity, old.mode = "relu", "RNN_RELU"
        elif old is not None:
            replace_module(module, old, _MODULES[to]())
        else:
            setattr(owner, attribute, _FUNCTIONS[to])
            if isinstance(owner, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                owner.activation_relu_or_gelu = {"relu": 1, "gelu": 2}.get(to, 0)


def replace_module(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in every place of another, with the hooks of that, and what changes have added to it."""
    new.train(old.training)
    if isinstance(weight := old._parameters.get(RESIDUAL), nn.Parameter):
        new.register_parameter(RESIDUAL, weight)
    for attribute in _HOOKS:
        getattr(new, attribute).update(getattr(old, attribute))
    for name, child in old.named_children():
        new.add_module(name, child)
    for parent, name in list(_places_of(module, old)):
        parent._modules[name] = new


_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name and "state_dict" not in name)


def _places_of(module: nn.Module, child: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in module.modules():
        for name, found in parent._modules.items():
            if found is child:
                yield parent, name
