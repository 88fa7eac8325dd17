"""The way of activations through a network: what follows each layer, in a run of a batch or by structure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_gradguard.core.forensics.location import user_location
from lightning_gradguard.core.snapshots import preserve_state

#: Modules with weights whose outputs are followed.
WEIGHTED = (nn.Linear, _ConvNd)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
SATURATING = (nn.Sigmoid, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid)
RECTIFYING = (nn.ReLU, nn.ReLU6)
OTHER_ACTIVATIONS = (nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.PReLU, nn.Softplus)
ACTIVATIONS = (*SATURATING, *RECTIFYING, *OTHER_ACTIVATIONS)
#: Functions by what they do to the tensors that they are given; the in-place forms end in `_`.
_ACTIVATION_FUNCTIONS = frozenset(
    {"sigmoid", "tanh", "softsign", "hardtanh", "hardsigmoid", "relu", "relu6", "leaky_relu", "elu", "selu"}
    | {"celu", "gelu", "silu", "mish", "prelu", "softplus", "exp"}
)
SATURATING_FUNCTIONS = tuple(kind.__name__.lower() for kind in SATURATING)
_FUNCTIONS: dict[type[nn.Module], str] = {nn.LeakyReLU: "leaky_relu"}
_NORMALIZING = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
_MIXING = frozenset(
    {"linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"}
    | {"conv_transpose3d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
    | {"rnn_tanh", "rnn_relu", "lstm", "gru", "rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell"}
    | {"multi_head_attention_forward", "scaled_dot_product_attention"}
)
_JOINING = frozenset({"cat", "concat", "concatenate", "hstack", "column_stack"})
_ADDING = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_MULTIPLYING = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})


@dataclass
class Layer:
    """A module with weights, an activation, or a block of both, in one forward pass.

    An activation function of the user's code is one too, with the network as its module.

    Args:
        name: Name in the network.
        module: The module.
        calls: Number of times that it ran.
        activation: Of a layer, name of the function that its output goes to before the next layer.
        is_normalized: True if a normalization comes between the layer and its activation.
        is_hidden: True if its output reaches another layer.
        is_gate: True if the activation multiplies another tensor.
        is_residual: Of a block, True if its input is added to its output.
        takes_input: True if what it is given comes from no layer, or a part of it, joined to others.
        shapes: Shapes of its first input and of its output, if both are tensors.
        overwrites_input: True if it writes to its input.
        is_recurrent: Of a layer, True if what it is given comes from an earlier output of its own.
        is_cell: Of a module of the user's, True if the state that it is given comes from its earlier output.
        is_attribute: True for an activation function that `module` has as an attribute.
        function: Name of an activation function that the user's code calls.
        follows: Of an activation, the layers that its input comes from.
    """

    name: str
    module: nn.Module
    calls: int = 0
    activation: str | None = None
    is_normalized: bool = False
    is_hidden: bool = False
    is_gate: bool = False
    is_residual: bool = False
    takes_input: bool = False
    shapes: tuple[torch.Size, torch.Size] | None = None
    overwrites_input: bool = False
    is_recurrent: bool = False
    is_cell: bool = False
    is_attribute: bool = False
    function: str = ""
    follows: dict[str, Layer] = field(default_factory=dict)

    @property
    def is_in_a_recurrence(self) -> bool:
        """True if its output comes back to a layer before it."""
        return any(layer.is_recurrent for layer in self.follows.values())

    @property
    def is_frozen(self) -> bool:
        """True if the layer, or those before the activation, are not trained."""
        layers = [layer.module for layer in self.follows.values()] or [self.module]
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        return bool(weights) and not any(weight.requires_grad for weight in weights)

    @property
    def saturates(self) -> bool:
        """True for a saturating activation, and a layer that one follows."""
        functions = {self.activation, self.function, functions_of(self.module).get(self._attribute)}
        return isinstance(self.module, SATURATING) or not functions.isdisjoint(SATURATING_FUNCTIONS)

    @property
    def _attribute(self) -> str:
        return self.name.rpartition(".")[2] if self.is_attribute else ""

    @property
    def keeps_shape(self) -> bool:
        """True if its output has the shape of its input."""
        return self.shapes is not None and self.shapes[0] == self.shapes[1]


def functions_of(module: nn.Module) -> dict[str, str]:
    """Returns the activation functions that a module has as attributes, by attribute."""
    named = (
        (name, getattr(value, "__name__", "")) for name, value in vars(module).items() if callable(value)
    )
    return {
        name: function
        for name, function in named
        if function in _ACTIVATION_FUNCTIONS and not isinstance(getattr(module, name), nn.Module)
    }


class DataFlow:
    """Modules of a network, each with the ones that follow it.

    Args:
        layers: Modules that ran, by name, in the order of their first call.
        is_measured: False if no batch was run: then only what lies in an `nn.Sequential` is known.
    """

    def __init__(self, layers: dict[str, Layer], *, is_measured: bool) -> None:
        self.layers = layers
        self.is_measured = is_measured

    @classmethod
    def of(cls, module: nn.Module, run: Callable[[], object] | None) -> DataFlow:
        """Follows a batch through a network, which is unchanged afterwards; by its structure without one."""
        if run is None:
            return cls(_by_structure(module), is_measured=False)
        with preserve_state(module), torch.enable_grad(), _Tracer(module) as tracer:
            run()
        return cls(tracer.layers, is_measured=True)

    def named(self, module: nn.Module, names: Collection[str]) -> list[Layer]:
        """Modules by name, as they ran, or as they are if it is unknown; a block by its first module."""
        return [self.layers.get(name) or Layer(name, module.get_submodule(name)) for name in names]

    def weighted(self) -> list[Layer]:
        """Returns linear and convolutional layers, in the order of the forward pass."""
        return [layer for layer in self.layers.values() if isinstance(layer.module, WEIGHTED)]

    def functions(self) -> list[Layer]:
        """Returns activation functions that the user's code calls."""
        return [layer for layer in self.layers.values() if layer.function]


def _by_structure(module: nn.Module) -> dict[str, Layer]:
    """Returns what the order of modules in each `nn.Sequential` shows."""
    layers: dict[str, Layer] = {}
    first = next((m for m in module.modules() if isinstance(m, (*WEIGHTED, *RECURRENT, nn.Embedding))), None)
    for name, child in module.named_modules():
        if isinstance(child, nn.Sequential) and not any(name.startswith(f"{n}.") for n in layers):
            leaves = [(f"{name}.{n}".lstrip("."), m) for n, m in child.named_modules() if n]
            leaves = [(n, m) for n, m in leaves if not isinstance(m, (nn.Sequential, nn.ModuleList))]
            _follow(leaves, layers, first)
    return layers


def _follow(
    leaves: Sequence[tuple[str, nn.Module]], layers: dict[str, Layer], first: nn.Module | None
) -> None:
    pending: Layer | None = None
    sources: list[Layer] = []
    for name, leaf in leaves:
        if isinstance(leaf, (*WEIGHTED, *RECURRENT, nn.MultiheadAttention)):
            for source in sources:
                source.is_hidden = True
            sources = []
        if isinstance(leaf, WEIGHTED):
            pending = layers[name] = Layer(name, leaf, calls=1, takes_input=leaf is first)
            sources = [pending]
        elif isinstance(leaf, NORMALIZATIONS) and pending is not None:
            pending.is_normalized = True
        elif isinstance(leaf, ACTIVATIONS):
            if pending is not None:
                pending.activation = _FUNCTIONS.get(type(leaf), type(leaf).__name__.lower())
                pending = None
            sources.append(layers.setdefault(name, Layer(name, leaf, calls=1)))


@dataclass
class _Origin:
    """Layers and activations that a tensor comes from, back to the last layer."""

    tensor: Tensor
    sources: dict[str, Layer] = field(default_factory=dict)
    #: Layers and activations to which nothing was added.
    pending: dict[str, Layer] = field(default_factory=dict)
    #: Running blocks whose input it is, but for functions without weights.
    blocks: frozenset[str] = frozenset()
    #: All layers that it comes from.
    ancestors: frozenset[str] = frozenset()
    #: True if a part of it is input of the network, beside embeddings or what layers give.
    has_input: bool = False


class _Tracer(TorchFunctionMode):
    """Follows tensors from layer to layer by intercepting functions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layers: dict[str, Layer] = {}
        self._module = module
        self._origins: dict[int, _Origin] = {}
        self._running: list[nn.Module] = []
        self._versions: list[tuple[Tensor | None, int]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> _Tracer:
        for name, child in self._module.named_modules():
            if child is not self._module and not isinstance(child, torch.jit.ScriptModule):
                self._hook(child, name)
            for attribute in functions_of(child):
                self._wrap(child, attribute, f"{name}.{attribute}".lstrip("."))
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()
        self._origins.clear()

    def _hook(self, child: nn.Module, name: str) -> None:
        before = child.register_forward_pre_hook(lambda m, args: self._enter_module(m, args, name))
        after = child.register_forward_hook(lambda m, args, output: self._leave_module(m, args, output, name))
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)

    def _wrap(self, owner: nn.Module, attribute: str, name: str) -> None:
        """Follows what a function that is an attribute returns, until the trace ends."""
        function = vars(owner)[attribute]

        def followed(*args: Any, **kwargs: Any) -> Any:
            layer = self.layers.setdefault(name, Layer(name, owner, is_attribute=True))
            layer.calls += 1
            self._running.append(nn.ReLU())
            output = function(*args, **kwargs)
            self._running.pop()
            if isinstance(output, Tensor):
                self._record_output(layer, output)
            return output

        vars(owner)[attribute] = followed
        self._hooks.callback(vars(owner).__setitem__, attribute, function)

    def _enter_module(self, child: nn.Module, args: tuple[Any, ...], name: str) -> None:
        layer = self.layers.setdefault(name, Layer(name, child))
        layer.calls += 1
        given = args[0] if args and isinstance(args[0], Tensor) else None
        self._running.append(child)
        self._versions.append((given, 0 if given is None else given._version))
        if given is not None and given.is_floating_point():
            origin = self._origin([given])
            is_input = not (given.requires_grad or origin.ancestors)
            layer.takes_input = is_input or (origin.has_input and name not in origin.ancestors)
            layer.is_recurrent |= isinstance(child, WEIGHTED) and name in origin.ancestors
            origin.blocks |= {name}
            self._origins[id(given)] = origin
        for state in filter(lambda tensor: self._is_from(tensor, name), _tensors(args[1:])):
            self._origins[id(state)].blocks |= {name}

    def _leave_module(self, child: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
        layer = self.layers[name]
        self._running.pop()
        given, version = self._versions.pop()
        if not isinstance(output, Tensor):
            return
        if given is not None:
            layer.shapes = (given.shape, output.shape)
            layer.overwrites_input |= given._version != version
        state = state_of(args, output)
        layer.is_cell |= state is not None and self._is_from(state, name)
        if isinstance(child, WEIGHTED):
            ancestors = self._origin([output]).ancestors | {name}
            self._origins[id(output)] = _Origin(output, {name: layer}, {name: layer}, ancestors=ancestors)
        elif isinstance(child, ACTIVATIONS):
            self._record_output(layer, output)

    def _record_output(self, activation: Layer, output: Tensor) -> None:
        origin, name = self._origin([output]), activation.name
        activation.follows |= {n: x for n, x in origin.sources.items() if isinstance(x.module, WEIGHTED)}
        origin.sources, origin.pending = ({**x, name: activation} for x in (origin.sources, origin.pending))
        self._origins[id(output)] = origin

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        name = getattr(function, "__name__", "")
        if name in _JOINING and any(map(self._is_input, given)):
            self._derive(result, replace(self._origin(given), has_input=True))
        elif given and any(id(tensor) in self._origins for tensor in given):
            self._record(name, given, args[0] if name == "__setitem__" else result)
        return result

    def _record(self, name: str, given: list[Tensor], result: Any) -> None:
        if name in _MIXING:
            for source in self._origin(given).sources.values():
                source.is_hidden = True
            self._derive(result, _Origin(given[0], ancestors=self._origin(given).ancestors))
            return
        origin = self._origin(given)
        if name in _NORMALIZING:
            for layer in origin.pending.values():
                layer.is_normalized |= layer.activation is None
        elif name.rstrip("_") in _ACTIVATION_FUNCTIONS:
            self._record_activation(name.rstrip("_"), given, result)
            return
        elif name in _ADDING and len(given) > 1:
            self._record_addition(given)
            origin.pending = {}
        elif name in _MULTIPLYING and len(given) > 1 and min(t.numel() for t in given[:2]) > 1:
            for layer in origin.pending.values():
                layer.is_gate |= layer.saturates
        self._derive(result, origin)

    def _derive(self, result: Any, origin: _Origin) -> None:
        for tensor in _tensors([result]):
            if tensor.is_floating_point():
                self._origins[id(tensor)] = replace(origin, tensor=tensor)

    def _record_activation(self, name: str, given: list[Tensor], output: Tensor) -> None:
        origin = self._origin(given)
        for layer in origin.pending.values():
            if isinstance(layer.module, WEIGHTED) and layer.activation is None:
                layer.activation = name
        self._derive(output, origin)
        if not (self._running and isinstance(self._running[-1], ACTIVATIONS)):
            location = str(user_location() or "a line that was not found")
            found = Layer(f"{name} at {location}", self._module, function=name)
            found = self.layers.setdefault(found.name, found)
            found.calls += 1
            self._record_output(found, output)

    def _record_addition(self, given: list[Tensor]) -> None:
        first, second = (self._origin([tensor]).blocks for tensor in given[:2])
        if given[0].shape == given[1].shape:
            for name in first ^ second:
                self.layers[name].is_residual = True

    def _is_from(self, tensor: Tensor, name: str) -> bool:
        """True if a tensor comes from a layer within a module."""
        return any(layer.startswith(f"{name}.") for layer in self._origin([tensor]).ancestors)

    def _is_input(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and not (tensor.requires_grad or self._origin([tensor]).ancestors)

    def _origin(self, tensors: Sequence[Tensor]) -> _Origin:
        """Returns where any of the tensors come from."""
        found = [self._origins[id(tensor)] for tensor in tensors if id(tensor) in self._origins]
        whole = _Origin(tensors[0])
        for origin in found:
            whole.sources = {**whole.sources, **origin.sources}
            whole.pending = {**whole.pending, **origin.pending}
            whole.blocks |= origin.blocks
            whole.ancestors |= origin.ancestors
            whole.has_input |= origin.has_input
        return whole


def state_of(args: Sequence[Any], output: Tensor) -> Tensor | None:
    """Returns the state that a cell is given, as in `cell(inputs, state)`: the last of the output's shape."""
    same = [one for one in args if isinstance(one, Tensor) and one.shape == output.shape]
    return same[-1] if same else None


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
