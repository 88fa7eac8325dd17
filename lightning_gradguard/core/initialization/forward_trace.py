"""A trace of one forward pass: its layers, blocks, activations and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

#: Activations by the name of the function that computes them; the in-place forms end in `_`.
RECTIFIERS = frozenset({"relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "relu6", "celu"})
SATURATING = {"tanh": 0.97, "sigmoid": 0.985}
LOSSES = frozenset({"cross_entropy", "nll_loss"})
#: Layers whose weights are checked.
WeightedLayer: TypeAlias = nn.Linear | _ConvNd
LAYERS = (nn.Linear, _ConvNd)


@dataclass
class Layer:
    """A weighted layer, and the measurements of one batch in it.

    Args:
        name: Name in the network.
        module: The layer.
        output: Its output, attached to the graph.
        activation: Name of the function applied before the next layer, if any.
        dead: Share of units that are zero after the activation for every sample.
        saturated: Share of outputs in the flat part of a saturating activation.
        gain: log10 of the rms of a random vector of unit rms, propagated back from the last hidden layer to
            the output of this one; `None` without a path between them.
    """

    name: str
    module: WeightedLayer
    output: Tensor
    activation: str | None = None
    dead: float | None = None
    saturated: float | None = None
    gain: float | None = None


class ForwardTrace(TorchFunctionMode):
    """Traces a forward pass: layers by hooks, activations and losses by intercepted functions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.blocks: list[Tensor] = []
        self.recurrent: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.last_input: Tensor | None = None
        self.n_classes: int | None = None
        self._module = module
        self._hooks = ExitStack()

    def __enter__(self) -> ForwardTrace:
        containers = (nn.Sequential, nn.ModuleList)
        for owner in self._module.modules():
            if isinstance(owner, containers):
                for child in owner:
                    if len(list(child.children())) > 1:
                        self._on_forward(child, self._record_block)
        for name, child in self._module.named_modules():
            if isinstance(child, LAYERS):
                self._on_forward(child, self._record_layer, name.replace("_orig_mod.", ""))
            elif isinstance(child, nn.RNNBase):
                handle = child.register_forward_pre_hook(_with_gradient_of_input)
                self._hooks.callback(handle.remove)
                self._on_forward(child, self._record_recurrent, name)
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "").rstrip("_")
        result = function(*args, **(kwargs or {}))
        if name in LOSSES and args:
            self.n_classes = args[0].shape[1] if args[0].ndim > 1 else None
        elif self.layers and (name in RECTIFIERS or name in SATURATING):
            self._record_activation(self.layers[-1], name, result)
        return result

    def _on_forward(self, module: nn.Module, record: Callable[..., None], *facts: Any) -> None:
        handle = module.register_forward_hook(lambda m, i, o: record(m, i, o, *facts))
        self._hooks.callback(handle.remove)

    def _record_layer(self, module: WeightedLayer, inputs: Any, output: Any, name: str) -> None:
        if all(layer.module is not module for layer in self.layers):
            self.layers.append(Layer(name, module, output))
            self.last_input = inputs[0] if inputs and inputs[0].requires_grad else self.last_input

    def _record_block(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self.blocks.append(output)

    def _record_recurrent(self, module: nn.RNNBase, inputs: Any, output: Any, name: str) -> None:
        if isinstance(inputs[0], Tensor) and inputs[0].ndim == 3:
            self.recurrent[name] = (inputs[0], output[0], 1 if module.batch_first else 0)

    def _record_activation(self, layer: Layer, name: str, output: Tensor) -> None:
        if layer.activation is not None:
            return
        layer.activation = name
        output = output.detach()
        if name in SATURATING:
            centred = output if name == "tanh" else 2 * output - 1
            flat = SATURATING[name] if name == "tanh" else 2 * SATURATING[name] - 1
            layer.saturated = float((centred.abs() > flat).float().mean())
        elif name == "relu" and output.ndim > 1:
            units = -1 if isinstance(layer.module, nn.Linear) else 1
            others = [d for d in range(output.ndim) if d != units % output.ndim]
            layer.dead = float((output.amax(dim=others) <= 0).float().mean())


def _with_gradient_of_input(module: nn.Module, inputs: Any) -> Any:
    first, *rest = inputs
    if isinstance(first, Tensor) and first.is_floating_point() and not first.requires_grad:
        first = first.detach().requires_grad_()
    return (first, *rest)
